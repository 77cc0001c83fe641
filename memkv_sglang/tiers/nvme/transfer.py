"""Pages to and from runs of consecutive slots, one system call a run."""

from collections.abc import Sequence
from typing import NamedTuple

from memkv_sglang.page import Page, PageKey, gather, page_checksum, scatter, spill_checksum
from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK
from memkv_sglang.tiers.nvme.disk.io_executor import Move
from memkv_sglang.tiers.nvme.disk.scratch import Scratch
from memkv_sglang.tiers.nvme.footer import FOOTER_SIZE, Footer
from memkv_sglang.tiers.nvme.segment import Place, Segment
from memkv_sglang.tiers.nvme.segments import RUN_SIZE

_SMALL_RUN = 256 << 10
"""Bytes that are not worth another request."""


class Run(NamedTuple):
    """Pages in consecutive slots, from `first` on; `members` are their positions in the call."""

    segment: Segment
    first: int
    members: list[int]


def into_runs(places: dict[int, Place], depth: int) -> list[Run]:
    """Gather pages whose slots follow one another, as far as `depth` requests come of it.

    `places` is by position in the call; a run is moved by one system call if it has no more buffers
    than that takes.
    """
    total = sum(place.segment.slot_size for place in places.values())
    limit = min(max(total // depth, _SMALL_RUN), RUN_SIZE)
    runs: list[Run] = []
    size = 0
    for member in sorted(places, key=lambda member: _address(places[member])):
        segment, slot = places[member]
        size += segment.slot_size
        if (
            runs
            and runs[-1].segment is segment
            and runs[-1].first + len(runs[-1].members) == slot
            and size <= limit
        ):
            runs[-1].members.append(member)
        else:
            runs.append(Run(segment, slot, [member]))
            size = segment.slot_size
    return runs


def _address(place: Place) -> tuple[int, int]:
    return place.segment.number, place.slot


def write_run(
    run: Run, pages: Sequence[Page], ticks: Sequence[int], scratch: Scratch
) -> Move[None]:
    """Write a run's pages with their footers; `ticks` are by position too.

    The disk reads a client's buffers after the checksum has: a page that the client changes in
    between fails its checksum when it is loaded. Raises `OSError` and `ChangedPageError`.
    """
    members = [pages[member] for member in run.members]
    image = _lay_out(run.segment, members, scratch)
    for member, page, content, footer in zip(
        run.members, members, image.contents, image.footers, strict=True
    ):
        if content is not page.buffers:
            gather(page.buffers, content[0])
        checksum = spill_checksum(page, content)
        Footer(page.key, page.length, ticks[member], checksum).pack_into(footer)
    yield run.segment.write(image.vectors, run.first)


def read_run(run: Run, pages: Sequence[Page], scratch: Scratch) -> Move[list[bytes | None]]:
    """Read a run's pages; return each one's verified checksum, None if it is not intact.

    Raises `OSError`, and `EOFError` where the segment is truncated.
    """
    members = [pages[member] for member in run.members]
    image = _lay_out(run.segment, members, scratch)
    yield run.segment.read(image.vectors, run.first)
    checksums: list[bytes | None] = []
    for page, content, block in zip(members, image.contents, image.footers, strict=True):
        checksums.append(verify(page.key, page.length, content, Footer.unpack(block)))
        if checksums[-1] and content is not page.buffers:
            scatter(content[0], page.buffers)
    return checksums


def verify(
    key: PageKey, length: int, content: Sequence[memoryview], footer: Footer | None
) -> bytes | None:
    """Return the footer's checksum if it names this page and confirms its content, else None."""
    if footer is None or (footer.key, footer.length) != (key, length):
        return None
    return footer.checksum if footer.checksum == page_checksum(key, content) else None


def holds_page(slot: memoryview, key: PageKey, length: int) -> bool:
    """Tell whether a whole slot, as it was read, is intact and holds this page."""
    footer = Footer.unpack(slot[-FOOTER_SIZE:])
    return verify(key, length, [slot[:length]], footer) is not None


class _Image(NamedTuple):
    """A run as it lies on disk, in memory."""

    vectors: list[memoryview]
    contents: Sequence[tuple[memoryview, ...]]
    """By page, where its content lies: in its own buffers unless they had to be bounced."""
    footers: list[memoryview]


def _lay_out(segment: Segment, pages: Sequence[Page], scratch: Scratch) -> _Image:
    if segment.takes([buffer for page in pages for buffer in page.buffers]):
        return _lay_out_in_place(pages, scratch)
    return _lay_out_in_bounce(segment.slot_size, pages, scratch)


def _lay_out_in_place(pages: Sequence[Page], scratch: Scratch) -> _Image:
    vectors: list[memoryview] = []
    footers: list[memoryview] = []
    for page, tail in zip(pages, scratch.tails(len(pages)), strict=True):
        vectors += page.buffers
        vectors.append(tail[BLOCK - (-page.length % BLOCK) :])
        footers.append(tail[BLOCK:])
    return _Image(vectors, [page.buffers for page in pages], footers)


def _lay_out_in_bounce(slot_size: int, pages: Sequence[Page], scratch: Scratch) -> _Image:
    memory = scratch.bounce(len(pages) * slot_size)
    slots = [memory[i * slot_size : (i + 1) * slot_size] for i in range(len(pages))]
    contents = [(slot[: page.length],) for slot, page in zip(slots, pages, strict=True)]
    return _Image([memory], contents, [slot[-FOOTER_SIZE:] for slot in slots])

"""Transfer pages to and from runs of consecutive slots, each with one system call."""

from collections.abc import Sequence
from typing import NamedTuple

from memkv_sglang.page import Page, PageKey, gather, page_checksum, scatter, spill_checksum
from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK
from memkv_sglang.tiers.nvme.disk.io_executor import IoTask
from memkv_sglang.tiers.nvme.disk.scratch import Scratch
from memkv_sglang.tiers.nvme.footer import FOOTER_SIZE, Footer
from memkv_sglang.tiers.nvme.segment import Place, Segment
from memkv_sglang.tiers.nvme.segments import RUN_SIZE

_SMALL_RUN = 256 << 10
"""Shorter runs are not split to get more requests in flight."""


class Run(NamedTuple):
    """Pages in consecutive slots from `first` on. `members` are their positions in the call."""

    segment: Segment
    first: int
    members: list[int]


def into_runs(places: dict[int, Place], depth: int) -> list[Run]:
    """Group pages in consecutive slots into runs, and split these into about `depth` if possible.

    `places` maps positions in the call to slots. A run takes one system call, unless it has more
    buffers than a system call accepts.
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
) -> IoTask[None]:
    """Write a run's pages with their footers. `ticks` is indexed by position in the call.

    The disk reads the client's buffers after their checksum was computed. If the client changes the
    page in between, the page fails verification when it is loaded. Raises `OSError` and
    `ChangedPageError`.
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


def read_run(run: Run, pages: Sequence[Page], scratch: Scratch) -> IoTask[list[bytes | None]]:
    """Read a run's pages; return the verified checksum of each page, None for a corrupt one.

    Raises `OSError`, or `EOFError` if the segment is truncated.
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
    """Return the checksum in the footer if it matches the page and its content, else None."""
    if footer is None or (footer.key, footer.length) != (key, length):
        return None
    return footer.checksum if footer.checksum == page_checksum(key, content) else None


def holds_page(slot: memoryview, key: PageKey, length: int) -> bool:
    """Return whether the content of a slot is an intact copy of this page."""
    footer = Footer.unpack(slot[-FOOTER_SIZE:])
    return verify(key, length, [slot[:length]], footer) is not None


class _Image(NamedTuple):
    """The parts of memory that correspond to a run on disk."""

    vectors: list[memoryview]
    contents: Sequence[tuple[memoryview, ...]]
    """The memory of each page's content: its own buffers, or a bounce buffer."""
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

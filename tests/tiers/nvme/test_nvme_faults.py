"""Disk faults, full disks and short transfers: misses and one log line, never wrong bytes."""

import contextlib
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MIB
from memkv_sglang.page import Page, PageKey, spill_checksum
from memkv_sglang.testing.conformance import load, soon, spill
from memkv_sglang.testing.pages import (
    holds_content,
    make_chain,
    make_namespace,
    make_page,
    page_content,
)
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.nvme import faults, transfer
from memkv_sglang.tiers.nvme.quarantine import FILES_KEPT
from tests.tiers.nvme.nvme_support import SLOT, Disk, capacity_for, disk, present

NAMESPACE = make_namespace()
KEYS = make_chain(NAMESPACE, 12).keys()
MORE = make_chain(NAMESPACE, 12, "more").keys()
STORED, REFUSED, FAILED = SpillResult.STORED, SpillResult.REFUSED, SpillResult.FAILED


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "nvme", queue_depth=2) as opened:
        yield opened


def wait_until_writing_resumes(nvme: Disk) -> None:
    give_up = time.monotonic() + 20
    while not nvme.tier._gate.is_open:
        assert time.monotonic() < give_up
        time.sleep(0.01)


class FailingCall:
    """Replaces a system call on segments; fails with `code` while `on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
        self.on = True
        self.code = code
        self._real = getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, fd: int, *args: Any) -> Any:
        if self.on:
            raise OSError(self.code, os.strerror(self.code))
        return self._real(fd, *args)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["pwritev", "pwrite"])  # writes of pages and of the journal
def test_failed_write_pauses_spills_but_not_loads(
    nvme: Disk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    code: int,
) -> None:
    monkeypatch.setattr(faults, "PAUSE", 0.3)
    spill(nvme.tier, KEYS)
    failing = FailingCall(monkeypatch, call, code)
    assert set(spill(nvme.tier, MORE)) == {FAILED}
    assert spill(nvme.tier, [*KEYS, *MORE]) == [SpillResult.PRESENT] * 12 + [REFUSED] * 12
    load(nvme.tier, KEYS)
    assert not any(present(nvme.tier, MORE))
    assert nvme.tier.usage()[:2] == (12, 12 * SLOT)
    assert nvme.tier.check_integrity() == []
    assert [record.message for record in caplog.records] == ["disk accepts no pages"]
    failing.on = False
    wait_until_writing_resumes(nvme)
    assert set(spill(nvme.tier, MORE)) == {STORED}
    load(nvme.reopen(), [*KEYS, *MORE])


def test_failed_write_publishes_no_later_page(nvme: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages are too long to share a system call; the write of the third slot fails."""
    size, real = (1 << 20,), os.pwritev
    third = 4096 + 2 * ((1 << 20) + 4096)

    def fail_third(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == third:
            raise OSError(errno.EIO, "broken")
        return real(fd, buffers, offset)

    nvme.reopen(capacity=512 * MIB)
    monkeypatch.setattr(os, "pwritev", fail_third)
    monkeypatch.setattr(faults, "PAUSE", 0.0)
    assert spill(nvme.tier, KEYS[:5], size) == [STORED] * 2 + [FAILED] * 3
    assert present(nvme.tier, KEYS[:5]) == [True] * 2 + [False] * 3
    monkeypatch.undo()
    wait_until_writing_resumes(nvme)
    assert spill(nvme.tier, KEYS[:5], size) == [SpillResult.PRESENT] * 2 + [STORED] * 3
    load(nvme.tier, KEYS[:5], size)
    assert nvme.tier.check_integrity() == []


def test_failing_journal_refuses_removals(nvme: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    spill(nvme.tier, KEYS)
    failing = FailingCall(monkeypatch, "pwrite", errno.ENOSPC)
    with pytest.raises(TierError, match="journal"):
        nvme.tier.remove(KEYS[:3])
    with pytest.raises(TierError, match="journal"):
        nvme.tier.clear(NAMESPACE.digest)
    nvme.tier.mark_pending(KEYS)
    load(nvme.tier, KEYS)
    failing.on = False
    assert nvme.tier.remove(KEYS[:3]) == 3


def test_uploaded_pages_can_be_evicted_although_the_journal_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "PAUSE", 0.1)
    with disk(tmp_path / "nvme", capacity=capacity_for(16)) as nvme:
        keys = make_chain(NAMESPACE, 16).keys()
        spill(nvme.tier, keys)
        nvme.tier.mark_pending(keys)
        failing = FailingCall(monkeypatch, "pwrite", errno.ENOSPC)
        nvme.tier.mark_uploaded(keys)
        assert list(nvme.tier.pending()) == []
        failing.on = False
        wait_until_writing_resumes(nvme)
        assert set(spill(nvme.tier, MORE)) == {STORED}
        load(nvme.reopen(), MORE)


def test_full_disk_uses_the_existing_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with disk(tmp_path / "nvme", capacity=capacity_for(64)) as nvme:
        spill(nvme.tier, KEYS[:4])  # fills a segment, which has four slots
        FailingCall(monkeypatch, "posix_fallocate", errno.ENOSPC)
        assert spill(nvme.tier, MORE[:4]) == [STORED] * 4
        load(nvme.tier, MORE[:4])
        assert not any(present(nvme.tier, KEYS))
        assert spill(nvme.tier, MORE[4:9]) == [STORED] * 4 + [REFUSED]
        assert [r.message for r in caplog.records] == ["cannot create another segment"]
        assert len(list((nvme.path / "segments").iterdir())) == 1


def test_segments_that_cannot_be_removed_cause_no_more_evictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "PAUSE", 0.0)
    with disk(tmp_path / "nvme", capacity=capacity_for(64)) as nvme:
        keys, small = make_chain(NAMESPACE, 60, "cold").keys(), (100,)
        spill(nvme.tier, keys)  # fills 15 segments of four slots
        spill(nvme.tier, KEYS[:5], small)  # fills the sixteenth segment
        files, held = nvme.segments(), nvme.tier._segments.total

        def refuse(path: str, *, dir_fd: int) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)

        monkeypatch.setattr(os, "unlink", refuse)
        for _ in range(3):
            assert set(spill(nvme.tier, MORE, small)) == {FAILED}
        assert present(nvme.tier, keys).count(False) == 4
        assert (nvme.segments(), nvme.tier._segments.total) == (files, held)
        assert len(nvme.tier._segments.by_number) == len(files)
        assert nvme.tier.check_integrity() == []
        monkeypatch.undo()
        assert set(spill(nvme.tier, MORE, small)) == {STORED}
        load(nvme.tier, [*KEYS[:5], *MORE], small)


def test_unreadable_page_does_not_fail_its_neighbours(
    nvme: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill(nvme.tier, KEYS)
    bad, real = nvme.find(KEYS[5]), os.preadv

    def fail_bad(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= bad.offset < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "bad sector")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail_bad)
    pages = [make_page(key, (4096, 4096), filled=False) for key in KEYS]
    results = nvme.tier.load(pages, soon())
    assert results == [LoadResult.FAILED if i == 5 else LoadResult.LOADED for i in range(12)]
    assert all(holds_content(page) for i, page in enumerate(pages) if i != 5)
    monkeypatch.undo()
    load(nvme.tier, KEYS)


def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readv, writev = os.preadv, os.pwritev

    def first_bytes(buffers: Sequence[memoryview]) -> list[memoryview]:
        long = next(buffer for buffer in buffers if len(buffer))
        return [long[:1500]]

    monkeypatch.setattr(os, "preadv", lambda fd, b, at: readv(fd, first_bytes(b), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, b, at: writev(fd, first_bytes(b), at))
    with disk(tmp_path / "nvme", direct_io="never") as nvme:
        spill(nvme.tier, KEYS, (4096, 5, 4096))
        monkeypatch.setattr(os, "pwritev", writev)
        load(nvme.tier, KEYS, (4096, 5, 4096))
        monkeypatch.setattr(os, "preadv", readv)
        load(nvme.reopen(), KEYS, (4096, 5, 4096))


def test_quarantine_is_bounded(nvme: Disk, caplog: pytest.LogCaptureFixture) -> None:
    keys = make_chain(NAMESPACE, FILES_KEPT + 3).keys()
    spill(nvme.tier, keys)
    place = nvme.find(keys[0])
    for key in keys:
        nvme.flip(key)
    pages = [make_page(key, (4096, 4096), filled=False) for key in keys]
    assert set(nvme.tier.load(pages, soon())) == {LoadResult.CORRUPT}
    assert nvme.tier.corrupt == len(keys)
    assert nvme.tier.usage().pages == 0
    assert [r.message for r in caplog.records] == ["corrupt page quarantined"]
    assert len(nvme.quarantined()) == FILES_KEPT
    copy = next(path for path in nvme.quarantined() if keys[0].hash.hex() in path.name)
    content = copy.read_bytes()
    assert len(content) == place.slot_size
    assert content[1:8192] == page_content(keys[0], 8192)[1:]
    assert copy.stat().st_mode & 0o777 == 0o600


def test_corrupt_page_on_a_read_only_file_system_is_a_miss(
    nvme: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill(nvme.tier, KEYS)
    nvme.flip(KEYS[3])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("touch", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    pages = [make_page(key, (4096, 4096), filled=False) for key in KEYS]
    assert nvme.tier.load(pages, soon()).count(LoadResult.CORRUPT) == 1
    assert present(nvme.tier, KEYS).count(False) == 1


def test_page_overwritten_by_a_client_during_the_load_stays(
    nvme: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill(nvme.tier, KEYS)
    nvme.tier.mark_pending(KEYS)
    real = os.preadv

    def scribble(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        monkeypatch.undo()
        read = real(fd, buffers, offset)
        buffers[0][0] ^= 1
        return read

    monkeypatch.setattr(os, "preadv", scribble)
    page = make_page(KEYS[3], (4096, 4096), filled=False)
    assert nvme.tier.load([page], soon()) == [LoadResult.FAILED]
    assert (nvme.tier.corrupt, nvme.quarantined()) == (0, [])
    assert [waiting.key for waiting in nvme.tier.pending()] == KEYS
    load(nvme.tier, KEYS)


class _NoDirectIo:
    """Behave like `os.open` on a file system without O_DIRECT."""

    def __init__(self) -> None:
        self._open = os.open

    def __call__(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return self._open(path, flags, *args, **kwargs)


def test_file_system_without_direct_io(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "open", _NoDirectIo())
    with disk(tmp_path / "nvme") as nvme:
        spill(nvme.tier, KEYS, (4096, 100))
        load(nvme.reopen(), KEYS, (4096, 100))
        messages = [r.message for r in caplog.records]
        # One line for each of the two starts.
        assert messages == ["no O_DIRECT, using buffered I/O"] * 2
    with pytest.raises(ConfigError, match=r"nvme\.direct_io"):
        Disk(tmp_path / "other", direct_io="always")


def test_direct_io_is_detected_on_a_full_disk(nvme: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    spill(nvme.tier, KEYS)
    nvme.tier.close()
    FailingCall(monkeypatch, "pwritev", errno.ENOSPC)
    load(nvme.open(direct_io="always"), KEYS)
    nvme.tier.close()

    def refuse(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("memkv_sglang.tiers.nvme.disk.direct_io._write_probe", refuse)
    monkeypatch.setattr(os, "open", _NoDirectIo())
    load(nvme.open(direct_io="auto"), KEYS)


@pytest.mark.parametrize("direct_io", ["auto", "never"])
def test_memory_file_system(direct_io: str) -> None:
    path = Path("/dev/shm") / f"memkv-test-{os.getpid()}-{direct_io}"
    try:
        with disk(path, direct_io=direct_io, capacity=4 * MIB) as nvme:
            spill(nvme.tier, KEYS)
            load(nvme.reopen(), KEYS)
    finally:
        for place in sorted(path.rglob("*"), reverse=True):
            place.rmdir() if place.is_dir() else place.unlink()
        path.rmdir()


class Shape(NamedTuple):
    """Return a 16 KiB page in two buffers, each with this offset from a page boundary."""

    shifts: tuple[int, int]
    first: int = 8192


SHAPES = [
    Shape((0, 0)),
    Shape((0, 1)),
    Shape((0, 0), first=8000),
    Shape((512, 0)),
    Shape((0, 0)),
    Shape((4095, 7), first=1),
    Shape((0, 0)),
]


def page_of_shape(key: PageKey, shape: Shape, *, filled: bool) -> Page:
    content = page_content(key, 16384)
    buffers = []
    parts = content[: shape.first], content[shape.first :]
    for shift, part in zip(shape.shifts, parts, strict=True):
        memory = memoryview(mmap.mmap(-1, 32768))[shift : shift + len(part)]
        memory[:] = part if filled else bytes(len(part))
        buffers.append(memory)
    return Page(key, tuple(buffers))


@pytest.mark.parametrize("direct_io", ["auto", "never"])
def test_buffers_may_have_any_alignment(tmp_path: Path, direct_io: str) -> None:
    """Mix aligned and unaligned pages in one call; spill from one kind, load into the other."""
    keys = KEYS[: len(SHAPES)]
    with disk(tmp_path / "nvme", direct_io=direct_io) as nvme:
        pages = [page_of_shape(*page, filled=True) for page in zip(keys, SHAPES, strict=True)]
        assert set(nvme.tier.spill(pages[:3], soon())) == {STORED}
        for page in pages[3:]:
            assert nvme.tier.spill([page], soon()) == [STORED]
        for turn in range(len(SHAPES)):
            turned = zip(keys, SHAPES[turn:] + SHAPES[:turn], strict=True)
            pages = [page_of_shape(*page, filled=False) for page in turned]
            for page in pages:
                assert nvme.tier.load([page], soon()) == [LoadResult.LOADED]
                assert holds_content(page)
                page.buffers[0][:] = bytes(len(page.buffers[0]))
            assert set(nvme.tier.load(pages, soon())) == {LoadResult.LOADED}
            assert all(map(holds_content, pages))


def test_read_only_memory_can_be_spilled(nvme: Disk) -> None:
    content = page_content(KEYS[0], 8192)
    assert nvme.tier.spill([Page(KEYS[0], (memoryview(content),))], soon()) == [STORED]
    load(nvme.tier, KEYS[:1])


def test_page_with_more_buffers_than_a_system_call_accepts(nvme: Disk) -> None:
    lengths = (16,) * 3000
    spill(nvme.tier, KEYS[:3], lengths)
    load(nvme.tier, KEYS[:3], lengths)
    pages = []
    for key in MORE[:3]:
        memory = memoryview(mmap.mmap(-1, 1500 * 4096))
        memory[:] = page_content(key, len(memory))
        pages.append(Page(key, tuple(memory[i * 4096 : (i + 1) * 4096] for i in range(1500))))
    nvme.reopen(capacity=128 * MIB)
    assert nvme.tier.spill(pages, soon()) == [STORED] * 3
    assert nvme.tier.load(pages, soon()) == [LoadResult.LOADED] * 3
    assert all(map(holds_content, pages))


def test_requests_not_started_by_the_deadline_are_dropped(
    nvme: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only thread blocks in its first read past the deadline; other buffers do not change."""
    size = (512 * 1024,)
    nvme.reopen(queue_depth=1, capacity=128 * MIB)
    spill(nvme.tier, KEYS[::2], size)
    spill(nvme.tier, KEYS[1::2], size)
    monkeypatch.setattr("memkv_sglang.tiers.nvme.transfer.RUN_SIZE", 1)
    real, reads = os.preadv, []
    pages = [make_page(key, size, filled=False) for key in KEYS]
    before = [bytes(page.buffers[0]) for page in pages]
    deadline = time.monotonic() + 0.2

    def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        reads.append(offset)
        while time.monotonic() < deadline:
            time.sleep(0.01)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    results = nvme.tier.load(pages, deadline)
    assert len(reads) == 1
    assert results.count(LoadResult.FAILED) == 11
    for page, result, content in zip(pages, results, before, strict=True):
        assert holds_content(page) if result is LoadResult.LOADED else page.buffers[0] == content


def test_spill_computes_no_checksum_after_the_deadline(
    nvme: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (512 * 1024,)
    nvme.reopen(queue_depth=1, capacity=128 * MIB)
    monkeypatch.setattr("memkv_sglang.tiers.nvme.transfer.RUN_SIZE", 1)
    spill(nvme.tier, make_chain(NAMESPACE, 1, "first").keys(), size)  # creates a segment
    real, checked = os.pwritev, []
    pages = [make_page(key, size, filled=True) for key in KEYS]
    deadline = time.monotonic() + 0.2

    def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        while time.monotonic() < deadline:
            time.sleep(0.01)
        return real(fd, buffers, offset)

    def check(page: Page, content: Sequence[memoryview]) -> bytes:
        checked.append(page.key)
        return spill_checksum(page, content)

    monkeypatch.setattr(os, "pwritev", slow)
    monkeypatch.setattr(transfer, "spill_checksum", check)
    results = nvme.tier.spill(pages, deadline)
    assert results[0] is SpillResult.STORED
    assert results[2:] == [SpillResult.FAILED] * 10
    assert checked == KEYS[:1]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), RuntimeError("a bug")])
def test_load_returns_only_when_no_thread_uses_its_buffers(
    nvme: Disk, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The first read fails at once while the others are still in flight."""
    size = (512 * 1024,)
    nvme.reopen(capacity=128 * MIB, queue_depth=4)
    spill(nvme.tier, KEYS[:4], size)
    monkeypatch.setattr("memkv_sglang.tiers.nvme.transfer.RUN_SIZE", 1)
    real, done = os.preadv, []
    together = threading.Barrier(4, timeout=20)

    def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        together.wait()
        if offset == 4096:
            raise error
        time.sleep(0.1)
        done.append(offset)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    pages = [make_page(key, size, filled=False) for key in KEYS[:4]]
    with contextlib.suppress(RuntimeError):
        assert nvme.tier.load(pages, soon()) == [LoadResult.FAILED] + [LoadResult.LOADED] * 3
    assert len(done) == 3
    monkeypatch.undo()
    load(nvme.tier, KEYS[:4], size)

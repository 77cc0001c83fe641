"""Shared memory as the agent and the servers map it."""

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from ctypes import addressof, c_char
from pathlib import Path
from types import SimpleNamespace

import pytest

from memkv_sglang import shared_memory
from memkv_sglang.shared_memory import HUGE_PAGE, map_memory, populate

SIZE = 3 * HUGE_PAGE + 4096


@pytest.fixture
def descriptor() -> Iterator[int]:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, SIZE)
    yield descriptor
    os.close(descriptor)


def mappings(descriptor: int) -> list[str]:
    inode = str(os.fstat(descriptor).st_ino)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if line.split()[4] == inode]


def test_two_mappings_share_the_bytes(descriptor: int) -> None:
    mine, theirs = map_memory(descriptor, SIZE), map_memory(descriptor, SIZE)
    assert len(mine) == SIZE
    assert populate(mine) in (True, False)
    mine[:4] = b"head"
    mine[-4:] = b"tail"
    assert (bytes(theirs[:4]), bytes(theirs[-4:])) == (b"head", b"tail")
    assert bytes(theirs[4:-4]).count(0) == SIZE - 8


def test_populating_keeps_the_content_and_allocates_every_page(descriptor: int) -> None:
    os.pwrite(descriptor, b"kept", HUGE_PAGE)
    memory = map_memory(descriptor, SIZE)
    populate(memory)
    assert bytes(memory[HUGE_PAGE : HUGE_PAGE + 4]) == b"kept"
    assert os.fstat(descriptor).st_blocks * 512 >= SIZE


def test_memory_is_unmapped_with_the_last_view(descriptor: int) -> None:
    memory = map_memory(descriptor, SIZE)
    piece = memory[HUGE_PAGE : 2 * HUGE_PAGE]
    del memory
    assert len(mappings(descriptor)) == 1
    piece[0] = 1  # a view of a part keeps the mapping
    del piece
    assert mappings(descriptor) == []


def test_memory_is_aligned_for_huge_pages(descriptor: int) -> None:
    memory = map_memory(descriptor, SIZE)
    (line,) = mappings(descriptor)
    begin = int(line.split("-")[0], 16)
    assert begin % HUGE_PAGE == 0
    assert len(memory) == SIZE


@pytest.mark.parametrize("page", [HUGE_PAGE, 1 << 30])
def test_hugetlb_mapping_fits_in_the_reserved_range(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """Uses a stand-in for MFD_HUGETLB memory, which only nodes with reserved huge pages can map."""
    status = SimpleNamespace(st_blksize=page)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda _: status)
        memory = map_memory(descriptor, SIZE)
    assert isinstance(memory.obj, mmap.mmap)
    reserved = addressof(c_char.from_buffer(memory.obj))
    begin = addressof(c_char.from_buffer(memory))
    assert begin % page == 0
    assert begin + -(-SIZE // page) * page <= reserved + len(memory.obj)


@pytest.mark.parametrize("flags", [os.MFD_HUGETLB, os.MFD_HUGETLB | os.MFD_HUGE_1GB])
def test_hugetlb_memory_reports_its_page_size(flags: int) -> None:
    try:
        descriptor = os.memfd_create("huge", flags)
    except OSError as error:
        pytest.skip(f"no such pages here: {error}")
    size = 1 << 30 if flags & os.MFD_HUGE_1GB else HUGE_PAGE
    assert os.fstat(descriptor).st_blksize == size
    os.close(descriptor)


def test_invalid_descriptor_is_refused() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_memory(-1, SIZE)


def test_progress_is_reported_until_all_is_allocated(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, reported = threading.Event(), []
    real = shared_memory._populate_chunk

    def populate_chunk(chunk: tuple[int, int]) -> bool:
        if chunk[1] != HUGE_PAGE:  # the last chunk is shorter than the others
            assert last.wait(30)
        return real(chunk)

    def report(done: int) -> None:
        reported.append(done)
        if done == 3 * HUGE_PAGE:
            last.set()

    monkeypatch.setattr(shared_memory, "_populate_chunk", populate_chunk)
    monkeypatch.setattr(shared_memory, "CHUNK", HUGE_PAGE)
    monkeypatch.setattr(shared_memory, "REPORT_SECONDS", 0.01)
    populate(map_memory(descriptor, SIZE), report)
    assert reported == sorted(reported)
    assert reported[-1] == 3 * HUGE_PAGE


def test_memory_that_cannot_be_allocated_is_an_error(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(chunk: tuple[int, int]) -> bool:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(shared_memory, "_populate_chunk", fail)
    monkeypatch.setattr(shared_memory, "CHUNK", 4096)
    with pytest.raises(OSError, match="no memory"):
        populate(map_memory(descriptor, SIZE))

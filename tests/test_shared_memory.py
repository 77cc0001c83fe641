"""Memory as the agent and the servers map it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_populating_keeps_what_is_there_and_takes_every_page(descriptor: int) -> None:
    os.pwrite(descriptor, b"kept", HUGE_PAGE)
    memory = map_memory(descriptor, SIZE)
    populate(memory)
    assert bytes(memory[HUGE_PAGE : HUGE_PAGE + 4]) == b"kept"
    assert os.fstat(descriptor).st_blocks * 512 >= SIZE


def test_is_unmapped_with_the_last_view(descriptor: int) -> None:
    memory = map_memory(descriptor, SIZE)
    piece = memory[HUGE_PAGE : 2 * HUGE_PAGE]
    del memory
    assert len(mappings(descriptor)) == 1
    piece[0] = 1  # still there
    del piece
    assert mappings(descriptor) == []


def test_lies_where_huge_pages_fit(descriptor: int) -> None:
    memory = map_memory(descriptor, SIZE)
    (line,) = mappings(descriptor)
    begin = int(line.split("-")[0], 16)
    assert begin % HUGE_PAGE == 0
    assert len(memory) == SIZE


def test_refuses_what_is_no_descriptor() -> None:
    with pytest.raises(OSError, match="map memory"):
        map_memory(-1, SIZE)

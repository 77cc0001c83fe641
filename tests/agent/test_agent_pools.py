"""Pools accept only stable memory and buffers inside it, and are unmapped after the last use."""

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.agent.pools import (
    ALL_PROCESSES_MULTIPLE,
    MAX_POOLS,
    PoolBudget,
    Pools,
    RequestError,
)
from memkv_sglang.page import Buffer

SIZE = 8192
NAMESPACE = b"n" * 16
HASH = b"h" * 32


def memory(size: int = SIZE, flags: int = os.MFD_ALLOW_SEALING, name: str = "m") -> int:
    descriptor = os.memfd_create(name, flags)
    os.ftruncate(descriptor, size)
    return descriptor


def make_pools(budget: PoolBudget | None = None, pid: int = 1) -> Pools:
    return Pools(budget or PoolBudget(), pid)


def maps(name: str) -> bool:
    return f"/memfd:{name} " in Path("/proc/self/maps").read_text()


def pool_of(size: int = SIZE, name: str = "m") -> Pools:
    pools, descriptor = make_pools(), memory(size, name=name)
    pools.register(0, size, descriptor)
    os.close(descriptor)
    return pools


def test_buffer_is_the_memory_itself() -> None:
    pools, descriptor = make_pools(), memory()
    pools.register(7, SIZE, descriptor)
    [page] = pools.pages(NAMESPACE, HASH, [[Buffer(7, 4096, 3), Buffer(7, 0, 2)]])
    page.buffers[0][:] = b"abc"
    page.buffers[1][:] = b"de"
    assert os.pread(descriptor, 3, 4096) == b"abc"
    assert os.pread(descriptor, 2, 0) == b"de"
    os.close(descriptor)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_only_buffers_inside_a_pool_are_accepted(offset: int, length: int) -> None:
    inside = length > 0 and offset >= 0 and offset + length <= SIZE
    try:
        [page] = POOLS.pages(NAMESPACE, HASH, [[Buffer(0, offset, length)]])
    except RequestError:
        assert not inside
    else:
        assert inside and page.length == length


POOLS = pool_of()


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (SIZE - 1, 1), (0, 1)])
def test_buffers_up_to_the_end_are_accepted(offset: int, length: int) -> None:
    [page] = POOLS.pages(NAMESPACE, HASH, [[Buffer(0, offset, length)]])
    assert page.length == length


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (SIZE, 1), (-1, 2), (0, 0)])
def test_buffers_past_the_end_are_refused(offset: int, length: int) -> None:
    with pytest.raises(RequestError, match="outside pool 0"):
        POOLS.pages(NAMESPACE, HASH, [[Buffer(0, offset, length)]])


@pytest.mark.parametrize(
    ("namespace", "hashes", "buffers"),
    [
        (b"short", HASH, [[Buffer(0, 0, 1)]]),
        (NAMESPACE, HASH[:-1], [[Buffer(0, 0, 1)]]),
        (NAMESPACE, HASH * 2, [[Buffer(0, 0, 1)]]),
        (NAMESPACE, HASH, [[Buffer(1, 0, 1)]]),
    ],
)
def test_malformed_requests_are_refused(
    namespace: bytes, hashes: bytes, buffers: list[list[Buffer]]
) -> None:
    with pytest.raises(RequestError):
        POOLS.pages(namespace, hashes, buffers)


def test_memory_is_sealed_against_shrinking() -> None:
    pools, descriptor = make_pools(), memory()
    pools.register(0, SIZE, descriptor)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


def test_already_sealed_memory_is_accepted() -> None:
    pools, descriptor = make_pools(), memory()
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    pools.register(0, SIZE, descriptor)
    os.close(descriptor)


def test_unsuitable_descriptors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE))
    sealed = memory()
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    readable = memory()
    descriptors = {
        "cannot be sealed": memory(flags=0),
        "in a file of 4096": memory(4096),
        "is not a memory file": os.pipe()[0],
        "reading and writing": os.open(f"/proc/self/fd/{readable}", os.O_RDONLY),
        "cannot be sealed against": os.open(file, os.O_RDWR),
        "cannot be mapped": sealed,
    }
    for reason, descriptor in descriptors.items():
        pools = make_pools()
        with pytest.raises(RequestError, match=reason):
            pools.register(0, SIZE, descriptor)
        assert len(pools) == 0
        os.close(descriptor)


@pytest.mark.parametrize("length", [0, -1, SIZE + 1, 2**62])
def test_length_beyond_the_memory_is_refused(length: int) -> None:
    descriptor = memory()
    with pytest.raises(RequestError):
        make_pools().register(0, length, descriptor)
    os.close(descriptor)


def test_pool_numbers_are_unique() -> None:
    descriptor = memory()
    with pytest.raises(RequestError, match="already registered"):
        POOLS.register(0, SIZE, descriptor)
    with pytest.raises(RequestError, match="unknown pool 5"):
        POOLS.release(5)
    os.close(descriptor)


def test_released_pool_is_unmapped_with_its_last_page() -> None:
    pools = pool_of(name="released")
    pages = pools.pages(NAMESPACE, HASH, [[Buffer(0, 0, 1)]])
    pools.release(0)
    with pytest.raises(RequestError):
        pools.pages(NAMESPACE, HASH, [[Buffer(0, 0, 1)]])
    assert maps("released"), "a call in flight still uses it"
    pages[0].buffers[0][:] = b"x"
    del pages
    assert not maps("released")


def sparse(pools: Pools, number: int, size: int) -> None:
    descriptor = memory(size)
    try:
        pools.register(number, size, descriptor)
    finally:
        os.close(descriptor)


def test_limit_of_a_process_covers_all_its_sessions() -> None:
    budget = PoolBudget()
    first, second, other = make_pools(budget), make_pools(budget), make_pools(budget, pid=2)
    sparse(first, 0, budget.limit)
    with pytest.raises(RequestError, match=f"this process may map {budget.limit} bytes"):
        sparse(second, 0, SIZE)
    sparse(other, 0, budget.limit)
    del first  # sessions release their pools in this way when they end
    sparse(second, 0, budget.limit)


def test_bytes_count_until_the_last_call_that_uses_them_has_ended() -> None:
    pools = make_pools(budget := PoolBudget())
    sparse(pools, 0, budget.limit)
    pages = pools.pages(NAMESPACE, HASH, [[Buffer(0, 0, 1)]])
    pools.release(0)
    with pytest.raises(RequestError, match="are mapped"):
        sparse(pools, 1, SIZE)
    del pages
    sparse(pools, 1, SIZE)


def test_all_processes_together_are_limited() -> None:
    budget = PoolBudget()
    everyone = [make_pools(budget, pid) for pid in range(ALL_PROCESSES_MULTIPLE + 1)]
    for pools in everyone[:-1]:
        sparse(pools, 0, budget.limit)
    with pytest.raises(RequestError, match="all processes"):
        sparse(everyone[-1], 0, SIZE)


def test_pool_count_of_a_process_covers_all_its_sessions() -> None:
    sessions = [make_pools(budget := PoolBudget()), make_pools(budget)]
    for number in range(MAX_POOLS):
        sparse(sessions[number % 2], number, SIZE)
    with pytest.raises(RequestError, match=f"may have at most {MAX_POOLS} pools"):
        sparse(sessions[0], MAX_POOLS, SIZE)
    sparse(make_pools(budget, pid=2), 0, SIZE)


BUFFERS = st.lists(
    st.lists(
        st.builds(Buffer, st.integers(0, 2), st.integers(0, 60), st.integers(1, 4)),
        min_size=1,
        max_size=3,
    ),
    max_size=5,
)


@given(BUFFERS)
def test_buffers_are_refused_if_and_only_if_two_share_a_byte(buffers: list[list[Buffer]]) -> None:
    first, second = memory(64), memory(64)
    pools = make_pools()
    for number, descriptor in enumerate((first, second, first)):
        pools.register(number, 64, descriptor)
    os.close(first)
    os.close(second)
    named = [
        (pool % 2, byte)
        for page in buffers
        for pool, offset, length in page
        for byte in range(offset, offset + length)
    ]
    if len(named) == len(set(named)):
        pools.check_disjoint(buffers)
    else:
        with pytest.raises(RequestError, match=r"^two buffers of a request overlap at offset \d+"):
            pools.check_disjoint(buffers)

"""Memory that its owner shrinks, punches or cannot seal must not crash the agent."""

import ctypes
import fcntl
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_sglang.agent import protocol
from memkv_sglang.agent.pools import PoolBudget, Pools, RequestError
from memkv_sglang.config.schema import Config
from memkv_sglang.page import Buffer
from memkv_sglang.testing.pages import make_chain
from tests.agent.agent_harness import (
    BLOCK,
    NAMESPACE,
    PAGE_BYTES,
    HostPool,
    RawClient,
    RunningAgent,
    connected_client,
    eventually,
    make_config,
    running_agent,
)

RACE_SECONDS = 3.0
PUNCH = 0x03
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE."""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


@pytest.fixture
def agent(config: Config) -> Iterator[RunningAgent]:
    with running_agent(config) as running:
        yield running


def memory(size: int = PAGE_BYTES, flags: int = os.MFD_ALLOW_SEALING) -> int:
    descriptor = os.memfd_create("shrunk", flags)
    os.ftruncate(descriptor, size)
    return descriptor


def serves(config: Config) -> bool:
    chain = make_chain(NAMESPACE, 2)
    with HostPool(2) as pool, connected_client(config) as client:
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(2))
        pool.fill(chain)
        client.spill(chain, buffers)
        return client.lookup(chain).length == 2


def test_memory_shrunk_just_before_it_is_sealed_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, descriptor = fcntl.fcntl, memory()

    def shrink_before_seal(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_ADD_SEALS:
            os.ftruncate(fd, 0)
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", shrink_before_seal)
    with pytest.raises(RequestError, match="in a file of 0 bytes"):
        Pools(PoolBudget(), os.getpid()).register(0, PAGE_BYTES, descriptor)
    os.close(descriptor)


def test_shrinking_during_registration_affects_only_the_owner(
    agent: RunningAgent, config: Config
) -> None:
    chance, page = random.Random(5), make_chain(NAMESPACE, 1)
    end = time.monotonic() + RACE_SECONDS
    while time.monotonic() < end:
        descriptor = memory()
        with RawClient(agent.socket) as raw:
            raw.greet()
            raw.send(protocol.RegisterPool(0, PAGE_BYTES), descriptor)
            moment = time.perf_counter() + chance.uniform(0, 3e-4)
            while time.perf_counter() < moment:
                pass
            try:
                os.ftruncate(descriptor, 0)
            except PermissionError:
                assert raw.receive() == protocol.Done()
            else:
                assert isinstance(raw.receive(), protocol.Refused)
            # If the agent has accepted the pool, this makes it access the pool's memory.
            spill = protocol.SpillPages(
                NAMESPACE.digest, page.hashes[0], [[Buffer(0, 0, PAGE_BYTES)]], b""
            )
            raw.ask(spill)
        os.close(descriptor)
    assert serves(config)


def test_hole_in_a_pool_reads_as_zeros(agent: RunningAgent, config: Config) -> None:
    descriptor, page = memory(), make_chain(NAMESPACE, 1)
    os.pwrite(descriptor, b"x" * PAGE_BYTES, 0)
    buffers = [[Buffer(0, 0, PAGE_BYTES)]]
    with RawClient(agent.socket) as raw:
        raw.greet()
        assert raw.ask(protocol.RegisterPool(0, PAGE_BYTES), descriptor) == protocol.Done()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
        assert libc.fallocate(descriptor, PUNCH, 0, PAGE_BYTES) == 0
        spill = protocol.SpillPages(NAMESPACE.digest, page.hashes[0], buffers, b"")
        assert isinstance(raw.ask(spill), protocol.SpilledPages)
        os.pwrite(descriptor, b"x" * PAGE_BYTES, 0)
        load = protocol.LoadPages(NAMESPACE.digest, page.hashes[0], buffers)
        assert isinstance(raw.ask(load), protocol.LoadedPages)
        assert os.pread(descriptor, PAGE_BYTES, 0) == bytes(PAGE_BYTES)
    os.close(descriptor)
    assert serves(config)


def odd_descriptors(directory: Path) -> dict[str, int]:
    """Return descriptors that are not client memory, by kind."""
    file = directory / "file"
    file.write_bytes(bytes(PAGE_BYTES))
    shared = Path("/dev/shm") / f"memkv-test-{os.getpid()}"
    shared.write_bytes(bytes(PAGE_BYTES))
    mine, theirs = socket.socketpair()
    theirs.close()
    odd = {
        "file on disk": os.open(file, os.O_RDWR),
        "file in /dev/shm": os.open(shared, os.O_RDWR),
        "only a path": os.open(file, os.O_PATH),
        "directory": os.open(directory, os.O_RDONLY),
        "device": os.open("/dev/zero", os.O_RDWR),
        "socket": mine.detach(),
        "pipe": os.pipe()[1],
        "eventfd": os.eventfd(0),
        "never sealed": memory(flags=0),
        "empty": memory(0),
        "too short": memory(PAGE_BYTES - 1),
    }
    shared.unlink()
    read_only = memory()
    odd["read only"] = os.open(f"/proc/self/fd/{read_only}", os.O_RDONLY)
    os.close(read_only)
    for name in ("F_SEAL_WRITE", "F_SEAL_FUTURE_WRITE"):
        odd[name] = memory()
        seal = getattr(fcntl, name, 0x10)
        fcntl.fcntl(odd[name], fcntl.F_ADD_SEALS, seal)
    try:
        odd["huge pages only"] = os.memfd_create("huge", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
        os.ftruncate(odd["huge pages only"], 2 << 20)
    except OSError:  # the kernel has no huge pages
        odd.pop("huge pages only", None)
    return odd


def test_descriptor_of_any_other_kind_is_refused(
    agent: RunningAgent, config: Config, tmp_path: Path
) -> None:
    odd = odd_descriptors(tmp_path)
    with RawClient(agent.socket) as raw:
        raw.greet()
        before = agent.descriptors()
        for kind, descriptor in odd.items():
            reply = raw.ask(protocol.RegisterPool(0, PAGE_BYTES), descriptor)
            assert isinstance(reply, protocol.Refused), kind
            assert "\n" not in reply.reason
            os.close(descriptor)
        for count in (0, 2, 4, 5, 250):
            with HostPool(1) as pool:
                reply = raw.ask(protocol.RegisterPool(0, pool.length), *[pool.descriptor] * count)
            assert isinstance(reply, protocol.Refused), count
        eventually(lambda: agent.descriptors() == before)
    assert serves(config)


def test_memory_may_be_registered_as_several_pools(agent: RunningAgent, config: Config) -> None:
    descriptor = memory(16 * BLOCK)
    with RawClient(agent.socket) as raw:
        raw.greet()
        for pool, length in enumerate((16 * BLOCK, BLOCK, 1)):
            assert raw.ask(protocol.RegisterPool(pool, length), descriptor) == protocol.Done()
        for length in (0, -1, 16 * BLOCK + 1, 2**63 - 1):
            reply = raw.ask(protocol.RegisterPool(9, length), descriptor)
            assert isinstance(reply, protocol.Refused), length
    os.close(descriptor)
    assert serves(config)

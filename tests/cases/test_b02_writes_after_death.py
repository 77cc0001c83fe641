"""After a load has returned none of its pages changes, even if another process keeps the killed
agent's memory map.
"""

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from memkv_testbed.kills import MIB, Kills
from memkv_testbed.slow_disk import HUNG, SlowDisk

from memkv_sglang.agent.lifetime import Lifetime, has_ended
from memkv_sglang.client.client import AgentClient
from memkv_sglang.client.connection import END_LIMIT
from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.testing.pages import holds_content, make_chain, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.nvme import NvmeTier
from memkv_sglang.tiers.nvme import segments as segments_module
from tests.agent.agent_harness import (
    NAMESPACE,
    PAGE_BYTES,
    HostPool,
    connected_client,
    environment,
    eventually,
    make_config,
    running_agent,
)

BUSY = 30 * MIB
"""Bytes per second of a slow disk; the writes in flight at the kill take it half a second."""

PAGES = 4
CHAIN = make_chain(NAMESPACE, PAGES)
MISSES = [LoadResult.FAILED] * PAGES
OURS = b"\xa5" * PAGE_BYTES
AGENT_WITH_LATE_WRITES = str(Path(__file__).with_name("agent_with_late_writes.py"))


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[SlowDisk]:
    try:
        disk = SlowDisk(tmp_path)
    except OSError as error:
        pytest.skip(f"no control group for disks: {error}")
    with disk:
        yield disk


@pytest.mark.parametrize("kills", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_no_page_changes_after_a_kill_on_a_busy_disk_with_readers(
    tmp_path: Path, slow_disk: SlowDisk, kills: int
) -> None:
    agents = Kills(tmp_path, readers=4)
    outcomes = [agents.kill(slow_disk, BUSY) for _ in range(kills)]
    assert [outcome.changed for outcome in outcomes] == [0] * kills
    assert not any(outcome.withheld for outcome in outcomes)
    assert all(outcome.loaded == 0 for outcome in outcomes), "the kills came too late"


@pytest.mark.parametrize("readers", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_pages_of_a_hung_disk_stay_withheld_until_it_answers(
    tmp_path: Path, slow_disk: SlowDisk, readers: int
) -> None:
    outcome = Kills(tmp_path, readers=readers, limit=2.0).kill(slow_disk, HUNG)
    assert outcome.withheld
    assert outcome.seconds < 2.0 + END_LIMIT + 1.0
    assert outcome.changed == 0


@contextmanager
def agent_with_late_writes(socket: str) -> Iterator[int]:
    """Run an agent whose writes outlive it; yield the process that makes the writes.

    Like a request on a hung disk, that process keeps the agent's lock.
    """
    process = subprocess.Popen(
        [sys.executable, AGENT_WITH_LATE_WRITES, socket],
        env={**os.environ, **environment()},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    writer = int(process.stdout.readline())
    try:
        yield writer
    finally:
        end(writer)
        process.kill()
        process.wait()
        process.stdout.close()


def end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_writes_that_outlive_the_agent_withhold_the_pages(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    freed: list[bool] = []
    with (
        agent_with_late_writes(config.agent.socket) as writer,
        connected_client(config, limit=0.5) as client,
        HostPool(PAGES) as pool,
    ):
        number = client.register_pool(pool.descriptor, pool.length)
        eventually(lambda: any(pool.memory[:]))
        begin = time.monotonic()
        loads = client.load(CHAIN, pool.buffers(number, range(PAGES)))
        assert time.monotonic() - begin < 0.5 + END_LIMIT + 1.0
        assert [load.result for load in loads] == MISSES
        assert client.withholding
        client.when_free(lambda: freed.append(client.withholding))
        client.close()  # closing the client does not release the pages
        assert client.withholding and not freed
        end(writer)
        eventually(lambda: not client.withholding)
        assert freed == [True]  # the callback runs before `withholding` becomes false
        for page in range(PAGES):
            pool.write(page, OURS)
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            assert all(pool.read(page) == OURS for page in range(PAGES))
        client.when_free(lambda: freed.append(client.withholding))
        assert freed == [True, False]


def test_spill_withholds_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with (
        agent_with_late_writes(config.agent.socket),
        connected_client(config, limit=0.3) as client,
        HostPool(PAGES) as pool,
    ):
        number = client.register_pool(pool.descriptor, pool.length)
        results = client.spill(CHAIN, pool.buffers(number, range(PAGES)))
        assert results == [SpillResult.REFUSED] * PAGES
        assert not client.withholding


def test_interrupts_neither_shorten_nor_prolong_the_wait(tmp_path: Path) -> None:
    config = make_config(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with (
        agent_with_late_writes(config.agent.socket) as writer,
        connected_client(config, limit=0.5) as client,
        HostPool(PAGES) as pool,
    ):
        number = client.register_pool(pool.descriptor, pool.length)
        previous = signal.signal(signal.SIGALRM, interrupt)
        begin = time.monotonic()
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2, 0.3)
            with pytest.raises(KeyboardInterrupt):
                client.load(CHAIN, pool.buffers(number, range(PAGES)))
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert 0.5 + END_LIMIT <= time.monotonic() - begin < 0.5 + END_LIMIT + 1.0
        assert client.withholding
        end(writer)
        eventually(lambda: not client.withholding)


TRACER = """
import ctypes, os, signal, sys
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
SEIZE = 0x4206
for thread in os.listdir(f"/proc/{sys.argv[1]}/task"):
    if ptrace(SEIZE, int(thread), None, None):
        sys.exit(1)
print(flush=True)
signal.pause()
"""


def test_stopped_debugger_does_not_hold_the_load(tmp_path: Path) -> None:
    """The debugger reaps no thread of the agent, so the agent's pidfd does not become readable."""
    config = make_config(tmp_path)
    with (
        running_agent(config, "scribble") as agent,
        connected_client(config, limit=4.0) as client,
        HostPool(PAGES) as pool,
    ):
        number = client.register_pool(pool.descriptor, pool.length)
        buffers = pool.buffers(number, range(PAGES))
        client.spill(CHAIN, buffers)
        results: list[LoadResult] = []
        load = threading.Thread(
            target=lambda: results.extend(page.result for page in client.load(CHAIN, buffers))
        )
        load.start()
        eventually(lambda: any(pool.memory[:]))
        command = [sys.executable, "-c", TRACER, str(agent.pid)]
        tracer = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert tracer.stdout is not None
            if not tracer.stdout.readline():
                pytest.skip("this process may not trace its child")
            tracer.send_signal(signal.SIGSTOP)
            agent.process.kill()
            load.join(3)
            assert results == MISSES
            assert not client.withholding
        finally:
            tracer.kill()
            tracer.wait()
            load.join()


def test_agent_without_a_lifetime_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    command = [sys.executable, AGENT_WITH_LATE_WRITES, config.agent.socket, "unlocked"]
    process = subprocess.Popen(command, env={**os.environ, **environment()})
    client = AgentClient(config, start=False)
    try:
        eventually(lambda: "did not send its lifetime lock" in client.problem)
        assert not client.wait(0)
    finally:
        client.close()
        process.kill()
        process.wait()


def test_lifetime_ends_with_the_process_although_a_child_lives_on() -> None:
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            lifetime = Lifetime()
            child = os.fork()
            if child:
                os.write(write, b"%d %d" % (lifetime.descriptor, child))
            signal.pause()
        finally:
            os._exit(1)
    number, child = map(int, os.read(read, 100).split())
    descriptor = os.open(f"/proc/{holder}/fd/{number}", os.O_RDONLY)
    try:
        assert not has_ended(descriptor)
        os.kill(holder, signal.SIGKILL)
        eventually(lambda: has_ended(descriptor))
        assert Path(f"/proc/{child}").exists()
    finally:
        end(child)
        end(holder)
        os.waitpid(holder, 0)
        for one in (read, write, descriptor):
            os.close(one)


def test_children_of_the_agent_inherit_no_descriptor(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with running_agent(config) as agent, connected_client(config) as client:
        assert client.status() is not None
        inherited = []
        for descriptor in Path(f"/proc/{agent.pid}/fdinfo").iterdir():
            with suppress(FileNotFoundError):  # closed in the meantime
                text = descriptor.read_text()
                [flags] = re.findall(r"^flags:\s+(\d+)$", text, re.MULTILINE)
                if int(descriptor.name) > 2 and not int(flags, 8) & os.O_CLOEXEC:
                    inherited.append(text)
        assert inherited == []


def open_tier(directory: Path) -> NvmeTier:
    return NvmeTier(NvmeConfig(directory=str(directory), capacity=16 * MIB))


def store_all(directory: Path) -> None:
    tier = open_tier(directory)
    pages = [make_page(key, [PAGE_BYTES], filled=True) for key in CHAIN.keys()]
    assert tier.spill(pages, time.monotonic() + 10) == [SpillResult.STORED] * PAGES
    tier.close()


def load_all(directory: Path) -> list[LoadResult]:
    tier = open_tier(directory)
    pages = [make_page(key, [PAGE_BYTES], filled=False) for key in CHAIN.keys()]
    try:
        results = tier.load(pages, time.monotonic() + 10)
    finally:
        tier.close()
    assert all(map(holds_content, pages)) or LoadResult.LOADED not in results
    return results


@contextmanager
def request_in_flight(directory: Path) -> Iterator[Callable[[], None]]:
    """Lock each segment as a dead agent's request does; yield the function that ends it."""
    held = [os.open(path, os.O_RDWR) for path in (directory / "segments").glob("*.seg")]
    for descriptor in held:
        fcntl.flock(descriptor, fcntl.LOCK_EX)

    def land() -> None:
        while held:
            os.close(held.pop())

    try:
        yield land
    finally:
        land()


def test_agent_waits_for_requests_of_the_one_before(tmp_path: Path) -> None:
    store_all(tmp_path / "pages")
    with request_in_flight(tmp_path / "pages") as land:
        timer = threading.Timer(0.3, land)
        timer.start()
        begin = time.monotonic()
        assert load_all(tmp_path / "pages") == [LoadResult.LOADED] * PAGES
        assert time.monotonic() - begin >= 0.2
        timer.join()


def test_segment_with_requests_that_do_not_end_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(segments_module, "WRITES_LIMIT", 0.2)
    store_all(tmp_path / "pages")
    with request_in_flight(tmp_path / "pages"):
        assert load_all(tmp_path / "pages") == [LoadResult.MISSING] * PAGES
        fields = [getattr(record, "fields", {}) for record in caplog.records]
        assert any("I/O of an ended agent" in one.get("error", "") for one in fields)
    assert load_all(tmp_path / "pages") == [LoadResult.LOADED] * PAGES


def test_requests_in_flight_hold_the_segment_when_the_process_has_ended(
    tmp_path: Path, slow_disk: SlowDisk
) -> None:
    """The property of Linux that the two tests above rely on."""

    def free() -> list[bool]:
        looks = []
        for path in (tmp_path / "pages" / "segments").glob("*.seg"):
            descriptor = os.open(path, os.O_RDONLY)
            looks.append(has_ended(descriptor))
            os.close(descriptor)
        return looks

    kills, during = Kills(tmp_path, readers=4), list[bool]()
    kills.kill(slow_disk, BUSY, lambda: during.extend(free()))
    assert not all(during)
    assert all(free())

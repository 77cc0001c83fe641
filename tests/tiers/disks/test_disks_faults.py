"""A broken disk takes only its pages with it, is retried, and returns."""

import errno
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.flocks import is_ending
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import LENGTHS, load, soon, spill
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, PendingPage, SpillResult
from memkv_sglang.tiers.disks import StripedTier, disk
from memkv_sglang.tiers.memory import MemoryTier
from tests.tiers.disks.disks_support import Disks, open_disks
from tests.tiers.nvme.nvme_support import capacity_for

NAMESPACE = make_namespace()
CHAIN = make_chain(NAMESPACE, 60)
KEYS = CHAIN.keys()
MORE = make_chain(NAMESPACE, 60, "more").keys()
LIMIT = 30.0


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disks]:
    monkeypatch.setattr(disk, "RETRY_SECONDS", 0.02)
    with open_disks(tmp_path, 3, io_engine="threads") as opened:
        yield opened


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


class BrokenDisk:
    """Makes system calls on the files of one directory fail while `on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, *calls: str) -> None:
        self.on = True
        self.paths = [path]
        for name in calls:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))

    def _failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *args: Any) -> Any:
            file = Path(f"/proc/self/fd/{fd}").readlink()
            if self.on and any(file.is_relative_to(path) for path in self.paths):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, *args)

        return call


def results(tier: StripedTier, keys: Sequence[PageKey]) -> list[LoadResult]:
    """Load pages and check the content of those that are loaded."""
    pages = [make_page(key, LENGTHS, filled=False) for key in keys]
    found = tier.load(pages, soon())
    for page, result in zip(pages, found, strict=True):
        assert holds_content(page) == (result is LoadResult.LOADED)
    return found


def test_pages_of_a_call_are_spread_evenly(disks: Disks) -> None:
    spill(disks.tier, KEYS)
    assert [len(disks.held(number, KEYS)) for number in range(3)] == [20] * 3
    load(disks.tier, KEYS)


def test_unreadable_disk_is_left_out_and_returns(
    disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = disks.tier
    spill(tier, KEYS)
    lost = disks.held(1, KEYS)
    broken = BrokenDisk(monkeypatch, disks.paths[1], "preadv")
    expected = [LoadResult.FAILED if key in lost else LoadResult.LOADED for key in KEYS]
    assert results(tier, KEYS) == expected
    # The disk is out of use now: its pages are missing, so they are stored on the others.
    assert tier.lookup(CHAIN, soon()) == (KEYS.index(lost[0]), True)
    assert tier.problem().startswith("1 of 3 disks: ")
    assert str(disks.paths[1]) in tier.problem()
    stored = [SpillResult.STORED if key in lost else SpillResult.PRESENT for key in KEYS]
    assert spill(tier, KEYS) == stored
    load(tier, KEYS)
    assert tier.usage().pages == 60
    wait_for(lambda: "no segment" in tier.problem())  # a retry has failed
    broken.on = False
    wait_for(lambda: tier.problem() == "")
    assert tier.usage().pages == 60
    assert disks.held(1, KEYS) == []
    load(tier, KEYS)
    assert tier.check_integrity() == []


def test_one_bad_page_does_not_end_the_use_of_a_disk(
    disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill(disks.tier, KEYS[:1])
    broken = BrokenDisk(monkeypatch, disks.paths[0], "preadv")
    for _ in range(2 * disk.FAILED_PAGES):
        assert results(disks.tier, KEYS[:1]) == [LoadResult.FAILED]
    assert disks.tier.problem() == ""
    broken.on = False
    load(disks.tier, KEYS[:1])


def test_pages_that_a_disk_does_not_take_go_to_the_others(
    disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill(disks.tier, KEYS)
    BrokenDisk(monkeypatch, disks.paths[2], "pwritev")
    assert spill(disks.tier, MORE[:30]) == [SpillResult.STORED] * 30
    assert disks.tier.problem().startswith("1 of 3 disks: the disk accepts no pages")
    assert spill(disks.tier, MORE) == [SpillResult.PRESENT] * 30 + [SpillResult.STORED] * 30
    assert disks.held(2, MORE) == []
    load(disks.tier, KEYS + MORE)


def test_pages_go_to_other_disks_if_one_is_full_of_pending_pages(tmp_path: Path) -> None:
    with open_disks(tmp_path, 3, capacity=capacity_for(16)) as disks:
        spill(disks.tier, KEYS[:48])
        pending = disks.held(0, KEYS)
        disks.tier.mark_pending(pending)
        assert set(spill(disks.tier, MORE[:12])) == {SpillResult.STORED}
        assert disks.held(0, KEYS + MORE) == pending
        load(disks.tier, pending + MORE[:12])
        disks.tier.mark_pending([*KEYS, *MORE[:12]])
        for number in (1, 2):
            disks.on(number).mark_pending(disks.held(number, KEYS + MORE))
        assert set(spill(disks.tier, MORE[12:])) == {SpillResult.REFUSED}


def test_full_disk_keeps_its_pages_and_takes_no_more(disks: Disks) -> None:
    spill(disks.tier, KEYS)
    for number in (0, 1, 2):
        disks.on(number)._gate.close(OSError(errno.ENOSPC, "full"))
    assert set(spill(disks.tier, MORE)) == {SpillResult.REFUSED}
    assert set(spill(disks.tier, KEYS)) == {SpillResult.PRESENT}
    load(disks.tier, KEYS)


@pytest.fixture
def absent(disks: Disks) -> Disks:
    """Open without the second disk, whose journal cannot be read for now."""
    spill(disks.tier, KEYS)
    disks.tier.mark_pending(KEYS)
    disks.tier.close()
    journal = disks.paths[1] / "journal"
    journal.rename(journal.with_name("saved"))
    journal.mkdir()
    disks.open()
    return disks


def repair(disks: Disks) -> None:
    journal = disks.paths[1] / "journal"
    journal.rmdir()
    journal.with_name("saved").rename(journal)
    wait_for(lambda: disks.tier.problem() == "")


def test_disk_that_is_broken_at_the_start_is_retried(
    absent: Disks, caplog: pytest.LogCaptureFixture
) -> None:
    assert [status.problem == "" for status in absent.tier.disks()] == [True, False, True]
    assert absent.tier.usage().pages == 40
    assert absent.tier.usage().capacity == 2 * absent.config.capacity
    other = make_namespace(model="described meanwhile")
    absent.tier.describe(other)
    repair(absent)
    load(absent.tier, KEYS)
    assert other.digest in absent.on(1).namespaces()
    assert "disk works again" in caplog.messages


def test_namespace_cleared_meanwhile_does_not_return(absent: Disks) -> None:
    absent.tier.clear(NAMESPACE.digest)
    repair(absent)
    assert absent.tier.usage().pages == 0
    assert absent.held(1, KEYS) == []


def test_pending_pages_of_a_returned_disk_are_resumed(absent: Disks) -> None:
    resumed: list[PendingPage] = []
    absent.tier.on_return(resumed.extend)
    spill(absent.tier, KEYS[:30])  # the absent disk has ten of them
    repair(absent)
    wait_for(lambda: len(resumed) == 10)
    assert not {page.key for page in resumed} & set(KEYS[:30])
    assert {page.key for page in absent.tier.pending()} == set(KEYS)


def test_pending_pages_of_a_returned_disk_are_uploaded(absent: Disks) -> None:
    shared = MemoryTier()
    engine = Engine(absent.tier, shared, absent.tier, EngineConfig(), Metrics(CollectorRegistry()))
    assert engine.flush(LIMIT)
    assert sum(shared.present(KEYS, soon())) == 40
    repair(absent)
    wait_for(lambda: all(shared.present(KEYS, soon())))
    assert engine.flush(LIMIT)
    assert list(absent.tier.pending()) == []
    engine.close(drain=0)


def test_directory_that_disappeared_is_not_created_on_another_disk(
    disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill(disks.tier, KEYS)
    broken = BrokenDisk(monkeypatch, disks.paths[1], "preadv")
    moved = disks.paths[1].with_name("unmounted")
    disks.paths[1].rename(moved)
    disks.paths[1].mkdir()  # stands for the mount point without its disk
    broken.paths.append(moved)
    results(disks.tier, KEYS)
    wait_for(lambda: "has disappeared" in disks.tier.problem())
    assert list(disks.paths[1].iterdir()) == []


ENDED_AGENT = """
import ctypes, fcntl, os, sys, threading, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
threading.Thread(target=time.sleep, args=(600,)).start()  # stands for a request in flight
print(flush=True)
ctypes.CDLL(None).syscall(ctypes.c_long(60), 0)  # exit() of this thread alone
"""
"""A process that is exiting but still holds its lock, like one whose disk does not answer."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="uses a number of a system call")
def test_disk_that_hangs_under_an_ended_agent_does_not_hold_up_the_others(disks: Disks) -> None:
    spill(disks.tier, KEYS)
    disks.tier.close()
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED_AGENT, str(disks.paths[1])], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        wait_for(lambda: is_ending(process.pid))
        tier = disks.open()
        assert [status.problem == "" for status in tier.disks()] == [True, False, True]
        assert f"in use by an agent that has ended (pid {process.pid})" in tier.problem()
        assert set(spill(tier, KEYS)) == {SpillResult.STORED, SpillResult.PRESENT}
        load(tier, KEYS)
    finally:
        process.kill()
        process.communicate()
    wait_for(lambda: tier.problem() == "")
    load(tier, KEYS)


def test_wrong_directory_is_refused(disks: Disks, tmp_path: Path) -> None:
    disks.tier.close()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a directory"):
        disks.open([disks.paths[0], tmp_path / "file"])
    load_after = disks.open(disks.paths[:1])  # the failed attempt has unlocked the first directory
    assert load_after.check_integrity() == []


def test_every_page_is_right_while_disks_break_and_return(
    disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traffic on four threads; each disk breaks in turn. Afterwards every page can be loaded."""
    tier, errors, stop = disks.tier, [], threading.Event()
    chains = [make_chain(NAMESPACE, 24, f"chain {i}").keys() for i in range(100)]
    breakable = [BrokenDisk(monkeypatch, path, "preadv", "pwritev") for path in disks.paths]
    for one in breakable:
        one.on = False
    spill(tier, KEYS)
    monkeypatch.setattr("memkv_sglang.tiers.nvme.faults.PAUSE", 0.02)
    monkeypatch.setattr(disk, "FAILED_PAGES", 4)

    def converse(first: int) -> None:
        try:
            turn = first
            while not stop.is_set():
                keys = chains[turn % len(chains)]
                spill(tier, keys)
                results(tier, keys)
                tier.remove(keys[12:])  # lets spills write to every disk again
                turn += 1
        except BaseException as error:  # the main thread reports it
            errors.append(error)

    threads = [threading.Thread(target=converse, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        for one in breakable:
            one.on = True
            wait_for(lambda: any(status.problem for status in tier.disks()) or bool(errors))
            one.on = False
            wait_for(lambda: tier.problem() == "" or bool(errors))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    for keys in chains:
        assert set(spill(tier, keys)) <= {SpillResult.STORED, SpillResult.PRESENT}
        load(tier, keys)
    assert tier.check_integrity() == []


def test_damaged_directory_costs_only_its_pages(disks: Disks) -> None:
    """A power failure loses the journal of one disk, and half of its segments."""
    spill(disks.tier, KEYS + MORE)
    on_second = set(disks.held(1, KEYS + MORE))
    disks.tier.close()
    (disks.paths[1] / "journal").unlink()
    for segment in sorted((disks.paths[1] / "segments").iterdir())[::2]:
        segment.unlink()
    shutil.rmtree(disks.paths[1] / "namespaces")
    tier = disks.open()
    found = results(tier, KEYS + MORE)
    for key, result in zip(KEYS + MORE, found, strict=True):
        assert result is LoadResult.LOADED or (key in on_second and result is LoadResult.MISSING)
    spill(tier, KEYS + MORE)
    load(tier, KEYS + MORE)

"""Concurrent calls: on one key, on one slot, and during `close`."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memkv_sglang.page import Chain
from memkv_sglang.testing.conformance import load, soon, spill
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from tests.tiers.nvme.nvme_support import SLOT, Disk, capacity_for, disk, present

NAMESPACE = make_namespace()
SystemCall = Callable[[int, Sequence[memoryview], int], int]


def chain(name: str, count: int) -> Chain:
    return make_chain(NAMESPACE, count, name)


class HeldCall:
    """A system call that blocks until `go` is set; sets `entered` when it is called."""

    def __init__(self, real: SystemCall) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()
        self._real = real

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.entered.set()
        assert self.go.wait(20)
        return self._real(fd, buffers, offset)


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "nvme", capacity=capacity_for(32)) as opened:
        yield opened


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_concurrent_spills_of_a_page_take_one_slot(
    nvme: Disk, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain("chain", 4).keys()
    held = HeldCall(os.pwritev)
    monkeypatch.setattr(os, "pwritev", held)
    first = threads.submit(spill, nvme.tier, keys)
    second = threads.submit(spill, nvme.tier, keys[::-1])
    assert held.entered.wait(20)
    held.go.set()
    results = sorted([*first.result(), *second.result()])
    assert results == [SpillResult.STORED] * 4 + [SpillResult.PRESENT] * 4
    assert nvme.tier.usage()[:2] == (4, 4 * SLOT)
    load(nvme.tier, keys)
    assert nvme.tier.check_integrity() == []


@pytest.mark.parametrize("by", ["eviction", "removal"])
def test_slot_being_read_is_not_overwritten(
    nvme: Disk, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    old, new = chain("old", 32).keys(), chain("new", 32).keys()
    spill(nvme.tier, old)
    # Two pages in consecutive slots are read in one system call, which leaves threads for writes.
    pages = [make_page(key, (4096, 4096), filled=False) for key in old[:2]]
    held = HeldCall(os.preadv)
    monkeypatch.setattr(os, "preadv", held)
    loading = threads.submit(nvme.tier.load, pages, soon())
    assert held.entered.wait(20)
    if by == "removal":
        assert nvme.tier.remove(old[:2]) == 2
        assert not any(present(nvme.tier, old[:2]))
    results = spill(nvme.tier, new)
    assert results == [SpillResult.STORED] * 30 + [SpillResult.REFUSED] * 2
    held.go.set()
    assert loading.result() == [LoadResult.LOADED] * 2
    assert all(map(holds_content, pages))
    assert present(nvme.tier, old[:2]) == [by == "eviction"] * 2
    if by == "removal":  # the end of the load freed the slots
        assert spill(nvme.tier, new) == [SpillResult.PRESENT] * 30 + [SpillResult.STORED] * 2
    assert nvme.tier.check_integrity() == []


@pytest.mark.parametrize("call", ["load", "spill"])
def test_close_waits_for_calls_in_flight(
    nvme: Disk, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    keys = chain("chain", 4).keys()
    spill(nvme.tier, keys)
    held = HeldCall(os.preadv if call == "load" else os.pwritev)
    monkeypatch.setattr(os, "preadv" if call == "load" else "pwritev", held)
    more = chain("more", 4).keys()
    act = load if call == "load" else spill
    in_flight = threads.submit(act, nvme.tier, keys if call == "load" else more)
    assert held.entered.wait(20)
    closing = threads.submit(nvme.tier.close)
    time.sleep(0.05)
    assert not closing.done()
    held.go.set()
    closing.result()
    in_flight.result()
    load(nvme.open(), keys if call == "load" else more)


def test_closed_tier_transfers_nothing(nvme: Disk) -> None:
    keys = chain("chain", 2).keys()
    spill(nvme.tier, keys)
    nvme.tier.close()
    pages = [make_page(key, (4096, 4096), filled=True) for key in keys]
    assert nvme.tier.load(pages, soon()) == [LoadResult.FAILED] * 2
    assert nvme.tier.spill(pages, soon()) == [SpillResult.FAILED] * 2
    assert nvme.tier.remove(keys) == 0
    nvme.tier.mark_pending(keys)
    load(nvme.open(), keys)


def test_concurrent_calls_on_a_small_disk(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    """Chains and page sizes compete for space; every loaded page is correct."""
    sizes = [(4096, 4096), (1000,), (12288, 4096, 4096)]
    settings = {"capacity": capacity_for(48), "high_watermark": 0.9, "low_watermark": 0.7}
    with disk(tmp_path / "nvme", **settings) as nvme:

        def converse(seed: int) -> None:
            size = sizes[seed % 3]
            for turn in range(40):
                keys = chain(f"{seed % 4} {turn % 5} {size}", 6).keys()
                pages = [make_page(key, size, filled=True) for key in keys]
                nvme.tier.spill(pages, soon())
                nvme.tier.lookup(Chain(NAMESPACE.digest, [key.hash for key in keys]), soon())
                pages = [make_page(key, size, filled=False) for key in keys]
                results = nvme.tier.load(pages, soon())
                assert set(results) <= {LoadResult.LOADED, LoadResult.MISSING}
                for page, result in zip(pages, results, strict=True):
                    assert result is LoadResult.MISSING or holds_content(page)
                if turn % 7 == seed:
                    nvme.tier.remove(keys[3:])

        for talk in [threads.submit(converse, seed) for seed in range(6)]:
            talk.result()
        assert nvme.tier.check_integrity() == []
        assert nvme.tier.corrupt == 0
        nvme.reopen()
        assert nvme.tier.check_integrity() == []

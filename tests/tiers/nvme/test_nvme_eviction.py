"""Which pages are evicted, and in which order, when the disk is full."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from memkv_sglang.config.schema import MIB
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.conformance import load, soon, spill
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import SpillResult
from tests.tiers.nvme.nvme_support import SLOT, Disk, capacity_for, disk, present

NAMESPACE = make_namespace()
STORED, PRESENT, REFUSED = SpillResult.STORED, SpillResult.PRESENT, SpillResult.REFUSED
SMALL, LARGE = (4096, 4096), (16384, 16384)
"""Pages whose slots have 12 and 36 KiB; a segment of small slots cannot hold a large page."""


def chain(name: str, count: int) -> Chain:
    return make_chain(NAMESPACE, count, name)


def eventually(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Disk]:
    """A directory that holds exactly 32 pages of the default size."""
    with disk(tmp_path / "nvme", capacity=capacity_for(32)) as opened:
        yield opened


def test_leaves_of_a_used_chain_are_evicted_before_its_root(full: Disk) -> None:
    used, idle = chain("used", 16), chain("idle", 16)
    spill(full.tier, used.keys())
    spill(full.tier, idle.keys())
    full.tier.lookup(used, soon())
    spill(full.tier, chain("new", 20).keys())
    assert full.tier.lookup(idle, soon()) == (0, True)
    assert full.tier.lookup(used, soon()) == (12, True)
    assert full.tier.usage().evicted == 20


def test_leaves_of_an_unused_chain_are_evicted_first_too(full: Disk) -> None:
    old = chain("old", 32)
    spill(full.tier, old.keys())
    spill(full.tier, chain("new", 7).keys())
    assert present(full.tier, old.keys()) == [True] * 25 + [False] * 7


def test_evicted_pages_are_misses_and_the_others_are_intact(full: Disk) -> None:
    old, new = chain("old", 32).keys(), chain("new", 9).keys()
    spill(full.tier, old)
    assert spill(full.tier, new) == [STORED] * 9
    load(full.tier, new)
    load(full.tier, old[:23])
    assert full.tier.check_integrity() == []


def test_pending_pages_are_not_evicted(full: Disk) -> None:
    pending, others = chain("pending", 8), chain("others", 24)
    spill(full.tier, pending.keys())
    full.tier.mark_pending(pending.keys())
    spill(full.tier, others.keys())
    spill(full.tier, chain("new", 24).keys())
    assert full.tier.lookup(others, soon()) == (0, True)
    assert spill(full.tier, chain("all", 32).keys()) == [STORED] * 24 + [REFUSED] * 8
    assert full.tier.lookup(pending, soon()) == (8, True)
    assert [page.key for page in full.tier.pending()] == pending.keys()
    assert full.tier.check_integrity() == []


def test_page_marked_pending_after_it_was_chosen_as_a_victim_stays(full: Disk) -> None:
    chosen = chain("chosen", 4)
    spill(full.tier, chosen.keys())
    catalog = full.tier._catalog
    victims = [(catalog.order.rank(entry), entry) for entry in catalog.walk(chosen)]
    full.tier.mark_pending(chosen.keys()[1:3])
    assert catalog.evict(victims, catalog.order.rank) == 2
    assert present(full.tier, chosen.keys()) == [False, True, True, False]
    assert [page.key for page in full.tier.pending()] == chosen.keys()[1:3]
    load(full.reopen(), chosen.keys()[1:3])


def test_page_used_after_it_was_chosen_to_leave_stays(
    full: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain that grows between choosing and evicting would lose its middle."""
    grown = chain("grown", 6)
    start, end = grown.keys()[:4], grown.keys()[4:]
    spill(full.tier, start)
    spill(full.tier, chain("younger", 24).keys())
    catalog = full.tier._catalog
    remember = catalog.remember_evicted

    def grow(entries: Iterable[int]) -> None:
        remember(entries)
        monkeypatch.undo()
        # The engine does this before a spill.
        full.tier.touch(Chain(grown.namespace, grown.hashes[:4]))
        assert spill(full.tier, end) == [STORED] * 2

    monkeypatch.setattr(catalog, "remember_evicted", grow)
    assert full.tier._reclaimer._evict(None, 4) == 4
    assert present(full.tier, grown.keys()) == [True] * 6
    assert full.tier.check_integrity() == []


def test_page_stored_again_ranks_below_its_predecessors(
    full: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as used again, so the pages before it must count as well."""
    back = chain("back", 4)
    spill(full.tier, back.keys()[:2])
    order = full.tier._catalog.order
    monkeypatch.setattr(order._chooser._ghost_list, "pop", lambda _: 1)
    spill(full.tier, back.keys())
    order.flush()
    assert [order._uses[entry] for entry in full.tier._catalog.walk(back)] == [1] * 4


def test_disk_full_of_pending_pages_refuses_spills_until_one_is_uploaded(
    full: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    pending, new = chain("pending", 32).keys(), chain("new", 3).keys()
    spill(full.tier, pending)
    full.tier.mark_pending(pending)
    for key in new:
        assert spill(full.tier, [key]) == [REFUSED]
    assert [record.message for record in caplog.records] == [
        "disk is full of pages waiting for upload"
    ]
    load(full.tier, pending)
    assert full.tier.usage().evicted == 0
    assert segment_bytes(full) <= full.config.capacity
    full.tier.mark_uploaded(pending[-1:])
    assert spill(full.tier, new) == [STORED, REFUSED, REFUSED]
    load(full.reopen(), pending[:-1])
    assert [page.key for page in full.tier.pending()] == pending[:-1]


def test_disk_of_pending_and_exempt_pages_is_not_scanned_for_victims(full: Disk) -> None:
    pending, exempt, new = chain("pending", 29).keys(), chain("exempt", 3).keys(), chain("new", 1)
    elsewhere = chain("elsewhere", 2).keys()
    spill(full.tier, pending)
    spill(full.tier, exempt)
    full.tier.mark_pending([*pending, exempt[0]])
    full.tier.exempt(frozenset([*exempt, *elsewhere]))
    assert spill(full.tier, new.keys()) == [REFUSED]
    assert list(full.tier._reclaimer._entries(SLOT)) == []
    full.tier.exempt(frozenset([*exempt[:2], *elsewhere]))
    assert list(full.tier._reclaimer._entries(SLOT))
    assert spill(full.tier, new.keys()) == [STORED]
    load(full.tier, exempt[:2])
    assert present(full.tier, exempt[2:]) == [False]


def test_eviction_order_survives_a_restart(full: Disk) -> None:
    first, second = chain("first", 16), chain("second", 16)
    spill(full.tier, first.keys())
    spill(full.tier, second.keys())
    full.tier.lookup(first, soon())
    new = chain("new", 18)
    spill(full.reopen(), new.keys())
    assert present(full.tier, first.keys()) == [True] * 14 + [False] * 2
    assert present(full.tier, second.keys()) == [False] * 16
    spill(full.reopen(), chain("newer", 17).keys())
    assert present(full.tier, first.keys()) == [False] * 16
    assert present(full.tier, new.keys()) == [True] * 15 + [False] * 3


def test_spill_does_not_evict_the_start_of_its_own_chain(full: Disk) -> None:
    long = chain("long", 40)
    spill(full.tier, long.keys()[:10])
    results = spill(full.tier, long.keys())
    assert results == [PRESENT] * 10 + [STORED] * 22 + [REFUSED] * 8
    assert full.tier.lookup(long, soon()) == (32, True)


def test_background_eviction_ends_at_the_low_watermark(tmp_path: Path) -> None:
    settings = {"capacity": capacity_for(160), "high_watermark": 0.9, "low_watermark": 0.5}
    with disk(tmp_path / "nvme", **settings) as opened:
        spill(opened.tier, chain("below", 140).keys())
        assert opened.tier.usage() == (140, 140 * 12288, opened.config.capacity, 0)
        spill(opened.tier, chain("above", 10).keys())
        eventually(lambda: opened.tier.usage().pages <= 80)
        assert opened.tier.usage().pages == 80
        assert opened.tier.lookup(chain("above", 10), soon()) == (10, True)


def segment_bytes(opened: Disk) -> int:
    total = 0
    for path in opened.segments():
        with suppress(FileNotFoundError):  # removed in the meantime
            total += path.stat().st_size
    return total


def test_cold_pages_of_another_size_are_evicted(full: Disk) -> None:
    small, large = chain("small", 32), chain("large", 5)
    spill(full.tier, small.keys(), SMALL)
    for key in large.keys():
        assert spill(full.tier, [key], LARGE) == [STORED]
    load(full.tier, large.keys(), LARGE)
    left = sum(present(full.tier, small.keys()))
    assert 16 <= left < 32  # five segments of 40 KiB replaced some of the 16 segments of 28 KiB
    assert segment_bytes(full) <= full.config.capacity
    assert full.tier.check_integrity() == []


@pytest.mark.parametrize("why", ["used", "pending"])
def test_pages_of_another_size_stay_if_recent_or_pending(full: Disk, why: str) -> None:
    small, large = chain("small", 32), chain("large", 3).keys()
    spill(full.tier, small.keys(), SMALL)
    spill(full.tier, large[:1], LARGE)
    stored = [key for key in small.keys() if present(full.tier, [key])[0]]
    assert len(stored) == 28
    if why == "pending":
        full.tier.mark_pending(stored)
    for key in large[1:]:
        if why == "used":
            assert full.tier.lookup(small, soon()) == (28, True)
        assert spill(full.tier, [key], LARGE) == [STORED]
    assert present(full.tier, large) == [False, False, True]
    assert all(present(full.tier, stored))


def test_new_size_gets_a_segment_once_pages_are_uploaded(full: Disk) -> None:
    small = chain("small", 32).keys()
    spill(full.tier, small, SMALL)
    full.tier.mark_pending(small)
    key = chain("large", 1).keys()[0]
    assert spill(full.tier, [key], LARGE) == [REFUSED]
    load(full.tier, small, SMALL)
    full.tier.mark_uploaded(small[:8])
    assert spill(full.tier, [key], LARGE) == [STORED]
    load(full.tier, [key], LARGE)
    load(full.tier, small[8:], SMALL)


def test_page_longer_than_a_segment_is_refused(tmp_path: Path) -> None:
    keys = chain("long", 3).keys()
    with disk(tmp_path / "nvme", capacity=4 * MIB, segment_size=MIB) as opened:
        assert spill(opened.tier, keys[:1], (1 << 20,)) == [REFUSED]
        assert spill(opened.tier, keys[:1], ((1 << 20) - 8192,)) == [STORED]
    with disk(tmp_path / "tiny", capacity=MIB) as opened:
        assert spill(opened.tier, keys, (1 << 20,)) == [REFUSED] * 3
        assert opened.segments() == []


def test_lowered_capacity_keeps_the_most_recently_used_pages(full: Disk) -> None:
    old, new = chain("old", 16), chain("new", 16)
    spill(full.tier, old.keys())
    spill(full.tier, new.keys())
    capacity = capacity_for(16, segments=8)
    full.reopen(capacity=capacity)
    assert segment_bytes(full) <= capacity
    assert full.tier.lookup(new, soon()) == (16, True)
    assert full.tier.lookup(old, soon()) == (0, True)


def test_lowered_capacity_is_met_once_pages_are_uploaded(full: Disk) -> None:
    pending = chain("pending", 24).keys()
    spill(full.tier, pending)
    full.tier.mark_pending(pending)
    capacity = full.config.capacity // 2
    full.reopen(capacity=capacity)
    assert spill(full.tier, chain("new", 1).keys()) == [REFUSED]
    load(full.tier, pending)
    full.tier.mark_uploaded(pending)
    eventually(lambda: segment_bytes(full) <= capacity)
    assert full.tier.check_integrity() == []


def test_many_sizes_share_the_capacity(full: Disk) -> None:
    sizes = [(4096 * n,) for n in range(1, 6)]
    for turn in range(4):
        for size in sizes:
            keys: Sequence[PageKey] = chain(f"{turn} {size}", 4).keys()
            assert spill(full.tier, keys, size) == [STORED] * 4
            load(full.tier, keys, size)
            assert segment_bytes(full) <= full.config.capacity
    assert full.tier.check_integrity() == []

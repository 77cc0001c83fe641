"""Whatever shrinks the disk tier, it keeps a prefix of each chain."""

import os
import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memkv_sglang.config.schema import MIB
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.conformance import load, soon, spill
from memkv_sglang.testing.pages import make_hashes, make_namespace
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.nvme import NvmeTier, space_reclaimer
from memkv_sglang.tiers.nvme import tier as nvme_tier
from tests.agent.agent_harness import eventually
from tests.tiers.nvme.nvme_support import Disk, disk, present

CAPACITY = 6 * MIB
SIZES = {"one size": [8192], "two sizes": [8192, 40960], "three sizes": [4096, 12288, 65536]}
LONGEST = 16
"""Most pages of a chain. A chain that fills the tier alone would have to lose its own end."""


def file_bytes(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):  # removed in the meantime
            total += path.stat().st_size
    return total


class Sessions:
    """Chains that grow, share prefixes and are reused, and the order of their last uses.

    The order is an independent model: using a chain uses its last page, then the one before it, and
    so on to the first.
    """

    def __init__(self, opened: Disk, sizes: Sequence[int], seed: int) -> None:
        self.disk = opened
        self.chance = random.Random(seed)
        self.clock = 0
        self.last_use: dict[PageKey, int] = {}
        self.size: dict[PageKey, int] = {}
        self.chains: list[tuple[int, Chain]] = []
        for i in range(24):
            size = sizes[i % len(sizes)]
            namespace = make_namespace(size, model=f"model of {size}")
            start = make_hashes(3, f"start {i % 6} {size}")
            self.chains.append((size, Chain(namespace.digest, start)))

    @property
    def tier(self) -> NvmeTier:
        return self.disk.tier

    def run(self, turns: int) -> None:
        for _ in range(turns):
            self.turn()

    def turn(self) -> None:
        number = self.chance.randrange(len(self.chains))
        size, chain = self.chains[number]
        found = self.tier.lookup(chain, soon()).length
        self.use(chain.keys()[:found])
        more = make_hashes(self.chance.randrange(1, 8), str(self.chance.random()), chain.hashes[-1])
        chain = Chain(chain.namespace, [*chain.hashes, *more])
        while found < len(chain.hashes):
            step = self.chance.randrange(1, 6)
            part = chain.keys()[found : found + step]
            # The engine does this before it spills the rest of a chain.
            self.tier.touch(Chain(chain.namespace, chain.hashes[:found]))
            if max(spill(self.tier, part, (size,))) > 1:
                break
            found += len(part)
            stored = Chain(chain.namespace, chain.hashes[:found])
            self.tier.touch(stored)
            self.use(stored.keys())
        if found == len(chain.hashes) < LONGEST:
            self.chains[number] = size, chain
        for key in chain.keys():
            self.size[key] = size

    def use(self, keys: Sequence[PageKey]) -> None:
        for key in reversed(keys):
            self.clock += 1
            self.last_use[key] = self.clock

    def present(self) -> set[PageKey]:
        keys = list(self.size)
        return {key for key, here in zip(keys, present(self.tier, keys), strict=True) if here}

    def holes(self, allowed: frozenset[PageKey] = frozenset()) -> list[str]:
        """Return the chains that have a page after a missing one and may not."""
        found = []
        for _, chain in self.chains:
            here = present(self.tier, chain.keys())
            length = here.index(False) if False in here else len(here)
            behind = {k for k, p in zip(chain.keys()[length:], here[length:], strict=True) if p}
            if behind - allowed:
                found.append(f"{len(behind)} pages behind the first {length} of {len(here)}")
        return found

    def intact(self) -> bool:
        """Load every stored page."""
        here = self.present()
        for size in set(self.size.values()):
            load(self.tier, [key for key in here if self.size[key] == size], (size,))
        return self.tier.check_integrity() == [] and self.tier.corrupt == 0

    def file_bytes(self) -> int:
        return file_bytes(self.disk.segments())

    def page_bytes(self) -> int:
        return self.tier.usage().bytes


@pytest.fixture(
    params=["one size", pytest.param("two sizes", marks=pytest.mark.slow), "three sizes"]
)
def sessions(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with disk(tmp_path / "nvme", capacity=CAPACITY) as opened:
        running = Sessions(opened, SIZES[request.param], seed=13)
        running.run(160)
        assert running.tier.usage().evicted > 0
        yield running


def test_a_busy_tier_keeps_only_prefixes(sessions: Sessions) -> None:
    assert sessions.holes() == []
    assert sessions.intact()


@pytest.mark.parametrize("part", [3, *(pytest.param(i, marks=pytest.mark.slow) for i in (2, 8))])
def test_lowered_capacity_leaves_prefixes_and_is_used(sessions: Sessions, part: int) -> None:
    before = sessions.present()
    sessions.disk.reopen(capacity=CAPACITY // part)
    assert sessions.file_bytes() <= CAPACITY // part
    assert sessions.holes() == []
    assert 0 < len(sessions.present()) < len(before)
    largest = max(path.stat().st_size for path in sessions.disk.segments())
    sizes = len(set(sessions.size.values()))
    assert sessions.page_bytes() > CAPACITY // part - (sizes + 1) * largest
    assert sessions.intact()
    sessions.run(100)
    assert sessions.holes() == []


def test_most_recently_used_pages_stay(tmp_path: Path) -> None:
    for seed in range(4):
        with disk(tmp_path / str(seed), capacity=CAPACITY) as opened:
            sessions = Sessions(opened, [8192], seed)
            sessions.run(150)
            before = sorted(sessions.present(), key=sessions.last_use.__getitem__)
            opened.reopen(capacity=CAPACITY // 2)
            after = sessions.present()
            assert after == set(before[len(before) - len(after) :])


def test_capacity_may_shrink_and_grow_again(sessions: Sessions) -> None:
    for _ in range(4):
        capacity = sessions.chance.randrange(CAPACITY // 8, CAPACITY)
        sessions.disk.reopen(capacity=capacity)
        assert sessions.file_bytes() <= capacity
        assert sessions.holes() == []
        sessions.run(60)
        assert sessions.file_bytes() <= capacity
        assert sessions.holes() == []
    assert sessions.intact()


def test_shrinking_when_other_programs_need_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When other programs fill the file system, pages are evicted in the same order."""
    others, root = [0], tmp_path / "nvme"

    def statvfs(_: object) -> SimpleNamespace:
        own = file_bytes(root.rglob("*.seg"))
        free = max(2 * CAPACITY - own - others[0], 0)
        return SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1 << 40, f_flag=0)

    monkeypatch.setattr(os, "fstatvfs", statvfs)
    monkeypatch.setattr(nvme_tier, "_CHECK_INTERVAL", 0.05)
    with disk(root, capacity=CAPACITY, keep_free=MIB) as opened:
        sessions = Sessions(opened, [8192, 40960], seed=1)
        sessions.run(120)
        for taken in (CAPACITY, CAPACITY + 2 * MIB):
            others[0] = taken
            eventually(lambda: statvfs(root).f_bavail >= MIB)
            assert sessions.holes() == []
            sessions.run(20)
            assert sessions.holes() == []
        assert sessions.intact()


def test_watermarks_leave_prefixes(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme", capacity=CAPACITY) as opened:
        sessions = Sessions(opened, [8192, 40960], seed=2)
        for _ in range(4):
            sessions.run(60)
            before = len(sessions.present())
            # No session runs while these values apply.
            opened.reopen(high_watermark=0.5, low_watermark=0.3)
            eventually(lambda: not opened.tier._reclaimer.has_work())
            assert sessions.holes() == []
            opened.reopen(high_watermark=1.0, low_watermark=1.0)
            assert len(sessions.present()) < before
            assert sessions.holes() == []
        assert sessions.intact()


def test_exempt_pages_move_and_stay(sessions: Sessions) -> None:
    """Pinned chains are evicted last, and also from their ends."""
    kept = frozenset(chain.keys()[i] for _, chain in sessions.chains[:4] for i in range(3))
    kept &= sessions.present()
    sessions.tier.exempt(kept)
    capacity = CAPACITY // 2
    # Pins are unknown at the start, so shrink the way a running tier does.
    sessions.tier._segments._capacity = capacity
    sessions.tier._reclaimer.shrink()
    assert sessions.file_bytes() <= capacity
    assert kept <= sessions.present()
    assert sessions.holes(kept) == []
    assert sessions.intact()
    sessions.tier.exempt(frozenset(sessions.size))
    sessions.tier._segments._capacity = capacity // 2
    sessions.tier._reclaimer.shrink()
    assert sessions.file_bytes() <= capacity // 2
    assert sessions.holes() == []


def test_pages_waiting_for_upload_stay_and_others_leave_in_order(sessions: Sessions) -> None:
    """Only pages waiting for upload may follow a hole; the shared tier has the missing pages."""
    waiting = frozenset(k for k in sessions.present() if sessions.chance.random() < 0.02)
    sessions.tier.mark_pending(list(waiting))
    waiting = frozenset(page.key for page in sessions.tier.pending())
    sessions.disk.reopen(capacity=CAPACITY // 2)
    assert waiting <= sessions.present()
    assert sessions.holes(waiting) == []
    sessions.tier.mark_uploaded(list(waiting))
    eventually(lambda: sessions.file_bytes() <= CAPACITY // 2)
    assert sessions.intact()


def test_page_that_is_read_while_it_moves_is_intact(sessions: Sessions) -> None:
    key = next(iter(sessions.present()))
    pinned = sessions.tier._catalog.pin(sessions.present())
    place = sessions.tier._catalog.place(pinned[0])  # type: ignore[arg-type]
    capacity = CAPACITY // 2
    sessions.tier._segments._capacity = capacity
    sessions.tier._reclaimer.shrink()
    assert place.segment.slots.is_taken(place.slot), "a reader is at it"
    sessions.tier._catalog.unpin(pinned)
    sessions.tier._housekeeper.wake()
    eventually(lambda: sessions.file_bytes() <= capacity)
    assert sessions.holes() == []
    assert sessions.intact()
    assert key is not None


def test_another_page_size_gets_space_although_no_call_waits_for_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space_reclaimer, "_MAX_MOVED_PER_CALL", 0)
    with disk(tmp_path / "nvme", capacity=CAPACITY) as opened:
        sessions = Sessions(opened, [8192], seed=3)
        sessions.run(120)
        key = Chain(make_namespace(40960).digest, make_hashes(1, "large")).keys()[0]
        eventually(lambda: spill(opened.tier, [key], (40960,)) == [SpillResult.STORED])
        assert sessions.holes() == []
        assert sessions.intact()


def test_kill_while_pages_move_loses_no_page(sessions: Sessions) -> None:
    """The journal has each page at its old or its new slot, and both slots hold the page."""
    tier = sessions.tier
    segment = min(tier._segments, key=lambda s: s.taken_bytes)
    tier._reclaimer._evict(segment.slot_size, len(segment.slots))
    before = sessions.present()
    tier._reclaimer._move(segment, range(len(segment.slots)))
    sessions.disk.kill()
    sessions.disk.open()
    assert sessions.present() == before
    assert sessions.holes() == []
    assert sessions.intact()

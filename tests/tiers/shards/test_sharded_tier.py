"""What a conversation keeps when a shard fails, returns, is added or removed."""

import operator
from collections import Counter

import pytest

from memkv_sglang.page import Chain
from memkv_sglang.testing.conformance import LENGTHS, load, soon, spill
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.shards import Placement, ShardedTier
from tests.tiers.shards.sharded import MemoryShard, make_shards, open_tier

NAMESPACE = make_namespace(page_bytes=sum(LENGTHS))
CHAIN = make_chain(NAMESPACE, 60)
KEYS = CHAIN.keys()


def results(tier: ShardedTier, chain: Chain = CHAIN) -> list[LoadResult]:
    pages = [make_page(key, LENGTHS, filled=False) for key in chain.keys()]
    outcomes = tier.load(pages, soon())
    for page, outcome in zip(pages, outcomes, strict=True):
        assert outcome is not LoadResult.LOADED or holds_content(page)
    return outcomes


def owner(position: int, count: int) -> int:
    """Return the number of the page's first shard."""
    return Placement([f"s{n}" for n in range(count)]).order(KEYS[position])[0]


def first_of(shard: int, count: int) -> int:
    return next(i for i in range(len(KEYS)) if owner(i, count) == shard)


def calls(shards: list[MemoryShard], operation: str) -> int:
    return sum(shard.counting.calls[operation] for shard in shards)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_equal_and_a_new_shard_takes_only_its_own(count: int) -> None:
    keys = make_chain(NAMESPACE, 6000).keys()
    names = [f"s{number}" for number in range(count + 1)]
    before, after = Placement(names[:-1]), Placement(names)
    for rank in range(2):
        shares = Counter(before.order(one)[rank] for one in keys)
        assert all(abs(share - 6000 / count) < 0.03 * 6000 for share in shares.values())
    moved = 0
    for one in keys:
        old, new = before.order(one), after.order(one)
        assert [number for number in new if number != count] == list(old)
        moved += new[0] == count
    assert abs(moved - 6000 / (count + 1)) < 0.03 * 6000
    assert [Placement(names[::-1]).order(one)[0] for one in keys[:50]] == [
        count - after.order(one)[0] for one in keys[:50]
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_that_load_the_same_tokens_use_all_shards(count: int) -> None:
    """Each rank has its own namespace, and the ranks' pages have the same hashes."""
    hashes = make_chain(NAMESPACE, 6000).hashes
    ranks = [
        make_namespace(page_bytes=sum(LENGTHS), layout=f"rank {rank}").digest for rank in range(8)
    ]
    placement = Placement([f"s{number}" for number in range(count)])
    first, *others = (
        [placement.first(key) for key in Chain(rank, hashes).keys()] for rank in ranks
    )
    for other in others:
        same = sum(map(operator.eq, first, other))
        assert abs(same - 6000 / count) < 0.03 * 6000, "two ranks have the same busiest shard"


@pytest.mark.parametrize("noticed", [False, True])
def test_pages_of_a_dead_shard_are_recomputed_once_and_found_again(noticed: bool) -> None:
    shards = make_shards(3)
    tier = open_tier(shards, cache=1000)
    spill(tier, KEYS)
    shards[1].kill(noticed=noticed)
    first = first_of(1, 3)
    assert results(tier).index(LoadResult.LOADED) == 0
    assert [one is LoadResult.LOADED for one in results(tier)].index(False) == first
    assert tier.lookup(CHAIN, soon()) == (first, noticed)
    recomputed = spill(tier, KEYS)
    assert set(recomputed) == {SpillResult.PRESENT, SpillResult.STORED}
    assert all(
        (result is SpillResult.STORED) == (owner(i, 3) == 1) for i, result in enumerate(recomputed)
    )
    load(tier, KEYS)
    assert tier.lookup(CHAIN, soon()).length == len(KEYS)
    assert set(spill(tier, KEYS)) == {SpillResult.PRESENT}

    shards[1].restore()
    for again in (tier, open_tier(shards)):
        load(again, KEYS)
        assert again.lookup(CHAIN, soon()) == (len(KEYS), True)


def test_pages_stored_during_an_outage_are_found_after_it() -> None:
    shards = make_shards(3)
    shards[1].kill()
    spill(open_tier(shards), KEYS)
    shards[1].restore()
    tier = open_tier(shards)
    assert tier.lookup(CHAIN, soon()) == (len(KEYS), True)
    load(tier, KEYS)
    before = calls(shards, "load")
    load(tier, KEYS)  # the tier knows by now where the pages are
    assert calls(shards, "load") - before == 2


def test_lookup_is_exact_when_only_a_part_was_recomputed() -> None:
    """A shared prompt was recomputed and stored, the rest of this conversation was not."""
    shards = make_shards(3)
    tier = open_tier(shards, cache=1000)
    spill(tier, KEYS)
    shards[1].kill()
    for part in range(0, 60, 7):
        spill(tier, KEYS[:part])
        lost = (i for i in range(part, 60) if owner(i, 3) == 1)
        assert tier.lookup(CHAIN, soon()) == (next(lost, 60), True)


def test_two_replicas_lose_nothing_with_one_shard() -> None:
    for dead in range(3):
        shards = make_shards(3)
        tier = open_tier(shards, replicas=2, cache=1000)
        spill(tier, KEYS)
        assert sum(len(shard.pages) for shard in shards) == 2 * len(KEYS)
        shards[dead].kill(noticed=False)
        load(tier, KEYS)
        assert open_tier(shards, replicas=2).lookup(CHAIN, soon()).length == len(KEYS)
        shards[dead].kill(noticed=True)
        load(tier, KEYS)
        assert open_tier(shards, replicas=2).lookup(CHAIN, soon()) == (len(KEYS), True)


def test_an_added_shard_loses_nothing() -> None:
    shards = make_shards(3)
    spill(open_tier(shards[:2]), KEYS)
    tier = open_tier(shards)
    assert tier.lookup(CHAIN, soon()) == (len(KEYS), True)
    load(tier, KEYS)
    longer = make_chain(NAMESPACE, 120)
    spill(tier, longer.keys())
    assert len(shards[2].pages) > 0
    load(tier, longer.keys())


def test_a_removed_shard_takes_only_its_share() -> None:
    shards = make_shards(3)
    spill(open_tier(shards), KEYS)
    left = open_tier(shards[:2])
    assert len(left.present(KEYS, soon())) == len(KEYS)
    assert left.present(KEYS, soon()) == [owner(i, 3) != 2 for i in range(len(KEYS))]
    spill(left, KEYS)
    load(left, KEYS)


def test_a_full_shard_passes_its_pages_on() -> None:
    shards = make_shards(2)
    shards[0].memory._capacity = 4 * sum(LENGTHS)
    tier = open_tier(shards)
    assert set(spill(tier, KEYS[:4])) == {SpillResult.STORED}
    shards[0].memory.mark_pending(list(shards[0].pages))
    shards[0].memory._capacity = 0
    assert SpillResult.FAILED not in spill(tier, KEYS[:20])
    load(tier, KEYS[:20])


def test_requests_of_a_lookup_are_bounded_and_reported() -> None:
    shards = make_shards(4)
    asked: list[int] = []
    tier = ShardedTier("memory", [shard.shard() for shard in shards], report=asked.append)
    long = make_chain(NAMESPACE, 2000)
    assert tier.lookup(long, soon()).length == 0
    spill(tier, long.keys()[:1500], (8,))
    assert tier.lookup(long, soon()) == (1500, True)
    assert asked[0] <= 10
    assert asked[1] <= 60


def test_no_shard_works() -> None:
    shards = make_shards(2)
    tier = open_tier(shards, cache=1000)
    spill(tier, KEYS)
    for noticed in (False, True):
        for shard in shards:
            shard.kill(noticed=noticed)
        assert LoadResult.LOADED not in results(tier)
        assert set(spill(tier, KEYS[:3])) == {SpillResult.FAILED}
        with pytest.raises(TierError, match="no shard"):
            tier.present(KEYS, soon())
        with pytest.raises(TierError, match="no shard"):
            open_tier(shards).lookup(CHAIN, soon())
    for shard in shards:
        shard.restore()
    load(tier, KEYS)


def test_clear_reaches_the_other_shards_when_one_is_down() -> None:
    shards = make_shards(2)
    tier = open_tier(shards, cache=1000)
    spill(tier, KEYS)

    def fail(namespace: bytes) -> int:
        raise TierError("unreachable")

    shards[0].counting.clear = fail  # type: ignore[method-assign]
    with pytest.raises(TierError, match="shard s0: unreachable"):
        tier.clear(NAMESPACE.digest)
    assert not shards[1].pages


class Uses:
    """Records what `record_access` is told."""

    def __init__(self) -> None:
        self.positions: dict[bytes, int] = {}
        self.flushes = True

    def record_access(self, chain: Chain, positions: list[int] | None = None) -> None:
        assert positions is not None
        self.positions.update(zip(chain.hashes, positions, strict=True))

    def flush_accesses(self, timeout: float) -> bool:
        return self.flushes


def test_uses_are_recorded_where_the_pages_are() -> None:
    shards, uses = make_shards(3), [Uses() for _ in range(3)]
    tier = ShardedTier(
        "memory",
        [
            shard.shard()._replace(uses=use)  # type: ignore[arg-type]
            for shard, use in zip(shards, uses, strict=True)
        ],
    )
    shards[2].kill()
    spill(tier, KEYS[:30])
    shards[2].restore()
    spill(tier, KEYS[30:])
    tier.record_access(CHAIN, range(len(KEYS)))
    for shard, use in zip(shards, uses, strict=True):
        assert {CHAIN.hashes[i] for i in use.positions.values()} == use.positions.keys()
        assert use.positions.keys() == {key.hash for key in shard.pages}
    assert tier.flush_accesses(1.0)
    uses[1].flushes = False
    assert not tier.flush_accesses(1.0)

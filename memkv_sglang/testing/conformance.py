"""What every tier must pass: subclass `TierConformance` and give it the tier."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import pytest

from memkv_sglang.page import Chain, Page, PageKey, page_checksum
from memkv_sglang.testing.pages import (
    holds_content,
    make_chain,
    make_hashes,
    make_namespace,
    make_page,
)
from memkv_sglang.tiers.base import LoadResult, SpillResult, Tier

LENGTHS = (4096, 4096)
"""Buffers of the usual test page: aligned, as SGLang's pools are."""


def soon() -> float:
    """Return a deadline that no working tier misses."""
    return time.monotonic() + 60


def spill(tier: Tier, keys: Sequence[PageKey], lengths: Sequence[int] = LENGTHS) -> list[int]:
    """Spill pages with their right content."""
    return [*tier.spill([make_page(key, lengths, filled=True) for key in keys], soon())]


def load(tier: Tier, keys: Sequence[PageKey], lengths: Sequence[int] = LENGTHS) -> list[Page]:
    """Load pages, assert that each is there and holds what it must."""
    pages = [make_page(key, lengths, filled=False) for key in keys]
    assert tier.load(pages, soon()) == [LoadResult.LOADED] * len(keys)
    assert all(map(holds_content, pages))
    return pages


class TierConformance(ABC):
    """The contract of `memkv_sglang.tiers.base`, as tests.

    A subclass gives a fixture `tier` with room for 16 MiB, and the two abilities below.
    """

    namespace = make_namespace()

    @abstractmethod
    def reopen(self, tier: Tier) -> Tier:
        """Close the tier and open it again over the same medium; the test's fixture closes both."""

    @abstractmethod
    def corrupt(self, tier: Tier, key: PageKey) -> None:
        """Change a byte of the stored copy behind the tier's back."""

    @pytest.mark.parametrize(
        "lengths",
        [(4096,), (4096, 4096), (1, 2, 3), (6000, 100), (4096, 512, 7), (1 << 20, 1 << 20)],
        ids=str,
    )
    def test_page_comes_back_bit_for_bit(self, tier: Tier, lengths: tuple[int, ...]) -> None:
        keys = make_chain(make_namespace(page_bytes=sum(lengths)), 5).keys()
        assert spill(tier, keys, lengths) == [SpillResult.STORED] * 5
        load(tier, keys, lengths)
        load(tier, keys[::-1], lengths)
        load(tier, keys[1::2], lengths)

    def test_what_was_never_spilled_is_missing(self, tier: Tier) -> None:
        chain = make_chain(self.namespace, 3)
        pages = [make_page(key, LENGTHS, filled=False) for key in chain.keys()]
        results = tier.load(pages, soon())
        assert results[0] == LoadResult.MISSING
        assert set(results[1:]) <= {LoadResult.MISSING, LoadResult.SKIPPED}
        assert tier.lookup(chain, soon()) == (0, True)
        assert tier.present(chain.keys(), soon()) == [False] * 3

    def test_empty_calls_are_answered(self, tier: Tier) -> None:
        assert tier.load([], soon()) == []
        assert tier.spill([], soon()) == []
        assert tier.present([], soon()) == []
        assert tier.remove([]) == 0
        assert tier.lookup(Chain(self.namespace.digest, []), soon()) == (0, True)

    def test_second_spill_is_present(self, tier: Tier) -> None:
        keys = make_chain(self.namespace, 4).keys()
        spill(tier, keys[:2])
        assert spill(tier, keys) == [SpillResult.PRESENT] * 2 + [SpillResult.STORED] * 2
        load(tier, keys)

    def test_page_twice_in_one_spill(self, tier: Tier) -> None:
        key = make_chain(self.namespace, 1).keys()[0]
        results = spill(tier, [key, key, key])
        assert set(results) <= {SpillResult.STORED, SpillResult.PRESENT}
        load(tier, [key, key])
        assert tier.check_integrity() == []

    def test_lookup_is_page_exact_wherever_chains_diverge(self, tier: Tier) -> None:
        stored = make_chain(self.namespace, 33)
        spill(tier, stored.keys())
        for shared in range(34):
            diverging = make_hashes(20, "other", parent=stored.hashes[shared - 1])
            chain = Chain(stored.namespace, [*stored.hashes[:shared], *diverging])
            assert tier.lookup(chain, soon()) == (shared, True)

    def test_lookup_may_begin_within_a_chain(self, tier: Tier) -> None:
        stored = make_chain(self.namespace, 10)
        spill(tier, stored.keys()[:7])
        assert tier.lookup(Chain(stored.namespace, stored.hashes[3:]), soon()) == (4, True)

    def test_present_answers_page_by_page(self, tier: Tier) -> None:
        keys = make_chain(self.namespace, 9).keys()
        spill(tier, keys[2:5])
        assert tier.present(keys, soon()) == [2 <= i < 5 for i in range(9)]
        tier.invalidate(keys)
        assert tier.present(keys, soon()) == [2 <= i < 5 for i in range(9)]

    def test_namespaces_do_not_meet(self, tier: Tier) -> None:
        mine, theirs = self.namespace, make_namespace(model="another-model")
        hashes = make_hashes(3)
        spill(tier, Chain(mine.digest, hashes).keys())
        foreign = Chain(theirs.digest, hashes)
        assert tier.lookup(foreign, soon()).length == 0
        page = make_page(foreign.keys()[0], LENGTHS, filled=False)
        assert tier.load([page], soon()) == [LoadResult.MISSING]

    @pytest.mark.parametrize("lengths", [(4096,), (4096, 4095), (4096, 4097), (8192, 4096)])
    def test_page_of_another_length_is_not_delivered_and_stays(
        self, tier: Tier, lengths: tuple[int, ...]
    ) -> None:
        key = make_chain(self.namespace, 1).keys()[0]
        spill(tier, [key])
        page = make_page(key, lengths, filled=False)
        assert tier.load([page], soon()) == [LoadResult.MISSING]
        load(tier, [key])

    def test_corrupt_copy_is_set_aside_and_can_be_replaced(self, tier: Tier) -> None:
        keys = make_chain(self.namespace, 3).keys()
        spill(tier, keys)
        self.corrupt(tier, keys[1])
        pages = [make_page(key, LENGTHS, filled=False) for key in keys]
        results = tier.load(pages, soon())
        assert results[:2] == [LoadResult.LOADED, LoadResult.CORRUPT]
        assert tier.load(pages[1:2], soon()) == [LoadResult.MISSING]
        assert spill(tier, keys)[1] == SpillResult.STORED
        load(tier, keys)

    def test_loaded_pages_come_with_their_checksum(self, tier: Tier) -> None:
        keys = make_chain(self.namespace, 3).keys()
        spill(tier, keys[:2])
        pages = [make_page(key, LENGTHS, filled=False) for key in keys]
        outcomes = tier.fetch(pages, soon())
        for page, fetched in zip(pages[:2], outcomes, strict=False):
            assert fetched == (LoadResult.LOADED, page_checksum(page.key, page.buffers))
        assert outcomes[2].checksum is None

    def test_corrupt_page_comes_without_checksum(self, tier: Tier) -> None:
        key = make_chain(self.namespace, 1).keys()[0]
        spill(tier, [key])
        self.corrupt(tier, key)
        page = make_page(key, LENGTHS, filled=False)
        assert tier.fetch([page], soon()) == [(LoadResult.CORRUPT, None)]

    @pytest.mark.parametrize("lengths", [(4096, 4096), (6000, 100)], ids=str)
    def test_page_is_stored_with_the_checksum_it_has(
        self, tier: Tier, lengths: tuple[int, ...]
    ) -> None:
        key = make_chain(make_namespace(page_bytes=sum(lengths)), 1).keys()[0]
        page = make_page(key, lengths, filled=True)
        checksum = page_checksum(key, page.buffers)
        assert tier.spill([page._replace(checksum=checksum)], soon()) == [SpillResult.STORED]
        copy = make_page(key, lengths, filled=False)
        assert tier.fetch([copy], soon()) == [(LoadResult.LOADED, checksum)]

    @pytest.mark.parametrize("lengths", [(4096, 4096), (6000, 100)], ids=str)
    def test_page_that_changed_after_its_checksum_is_not_stored(
        self, tier: Tier, lengths: tuple[int, ...]
    ) -> None:
        key = make_chain(make_namespace(page_bytes=sum(lengths)), 1).keys()[0]
        page = make_page(key, lengths, filled=True)
        read = page._replace(checksum=page_checksum(key, page.buffers))
        page.buffers[-1][-1] ^= 1
        assert tier.spill([read], soon()) == [SpillResult.FAILED]
        tier.invalidate([key])
        assert tier.present([key], soon()) == [False]
        assert spill(tier, [key], lengths) == [SpillResult.STORED]
        load(tier, [key], lengths)
        assert tier.check_integrity() == []

    def test_removed_pages_are_missing(self, tier: Tier) -> None:
        chain = make_chain(self.namespace, 6)
        spill(tier, chain.keys())
        assert tier.remove(chain.keys()[4:]) == 2
        assert tier.remove(chain.keys()[4:]) == 0
        assert tier.lookup(chain, soon()) == (4, True)
        assert spill(tier, chain.keys()[4:]) == [SpillResult.STORED] * 2
        assert tier.lookup(chain, soon()) == (6, True)

    def test_clear_takes_one_namespace_only(self, tier: Tier) -> None:
        other = make_namespace(model="stays")
        hashes = make_hashes(5)
        for namespace in (self.namespace, other):
            tier.describe(namespace)
            spill(tier, Chain(namespace.digest, hashes).keys())
        assert tier.clear(self.namespace.digest) == 5
        assert tier.clear(self.namespace.digest) == 0
        assert tier.lookup(Chain(self.namespace.digest, hashes), soon()).length == 0
        load(tier, Chain(other.digest, hashes).keys())

    def test_descriptions_are_kept(self, tier: Tier) -> None:
        other = make_namespace(model="another", details={"quantisation": "fp8"})
        for namespace in (self.namespace, other, self.namespace):
            tier.describe(namespace)
            spill(tier, make_chain(namespace, 1).keys())
        reopened = self.reopen(tier)
        assert reopened.namespaces() == {n.digest: n for n in (self.namespace, other)}

    def test_pages_survive_reopening(self, tier: Tier) -> None:
        chain = make_chain(self.namespace, 12)
        spill(tier, chain.keys())
        reopened = self.reopen(tier)
        assert reopened.lookup(chain, soon()) == (12, True)
        load(reopened, chain.keys())
        assert spill(reopened, chain.keys()) == [SpillResult.PRESENT] * 12
        assert reopened.check_integrity() == []

    def test_nothing_happens_after_the_deadline(self, tier: Tier) -> None:
        chain = make_chain(self.namespace, 4)
        spill(tier, chain.keys()[:2])
        past = time.monotonic() - 1
        pages = [make_page(key, LENGTHS, filled=False) for key in chain.keys()]
        before = [b"".join(page.buffers) for page in pages]
        assert LoadResult.LOADED not in tier.load(pages, past)
        assert [b"".join(page.buffers) for page in pages] == before
        fresh = make_page(chain.keys()[3], LENGTHS, filled=True)
        assert tier.spill([fresh], past) == [SpillResult.FAILED]
        assert tier.present(chain.keys()[3:], soon()) == [False]
        late = tier.lookup(chain, past)
        assert late.length == 2 or not late.complete

    def test_calls_from_many_threads(self, tier: Tier) -> None:
        shared = make_chain(self.namespace, 12).keys()
        errors: list[BaseException] = []

        def converse(seed: int) -> None:
            try:
                own = make_chain(self.namespace, 8, seed=f"thread {seed}").keys()
                for keys in (shared, own, shared[::-1], own):
                    results = spill(tier, keys)
                    assert set(results) <= {SpillResult.STORED, SpillResult.PRESENT}
                    load(tier, keys)
            except BaseException as error:  # handed to the main thread
                errors.append(error)

        threads = [threading.Thread(target=converse, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert tier.check_integrity() == []

    def test_usage_and_integrity_hold_their_form(self, tier: Tier) -> None:
        spill(tier, make_chain(self.namespace, 3).keys())
        usage = tier.usage()
        assert usage.pages >= 0
        assert usage.bytes >= 0
        assert usage.capacity is None or usage.bytes <= usage.capacity
        assert tier.check_integrity() == []

    def test_close_twice(self, tier: Tier) -> None:
        tier.close()
        tier.close()

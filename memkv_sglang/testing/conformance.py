"""Tests that every tier must pass: subclass `TierConformance` and implement its hooks."""

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
    page_content,
)
from memkv_sglang.tiers.base import LoadResult, SpillResult, Tier, TierUsage

LENGTHS = (4096, 4096)
"""Buffer lengths of the default test page. They are aligned, like SGLang's pools."""


def soon() -> float:
    """Return a deadline that every working tier meets easily."""
    return time.monotonic() + 60


def spill(tier: Tier, keys: Sequence[PageKey], lengths: Sequence[int] = LENGTHS) -> list[int]:
    """Spill pages with their correct content."""
    return [*tier.spill([make_page(key, lengths, filled=True) for key in keys], soon())]


def load(tier: Tier, keys: Sequence[PageKey], lengths: Sequence[int] = LENGTHS) -> list[Page]:
    """Load pages; assert that each is loaded with its correct content."""
    pages = [make_page(key, lengths, filled=False) for key in keys]
    assert tier.load(pages, soon()) == [LoadResult.LOADED] * len(keys)
    assert all(map(holds_content, pages))
    return pages


class TierConformance(ABC):
    """Tests of the contract in `memkv_sglang.tiers.base`.

    A subclass provides a fixture `tier` with a capacity of at least 16 MiB, and implements the
    hooks below. The hooks for the medium (files, objects, ...) must bypass the tier.
    """

    namespace = make_namespace()

    page_overhead = 0
    """Maximum bytes that `usage` counts per page beyond its content."""

    @abstractmethod
    def reopen(self, tier: Tier) -> Tier:
        """Close the tier and open it again on the same medium. The fixture closes both."""

    @abstractmethod
    def stored_keys(self, tier: Tier) -> set[PageKey]:
        """Return the keys of all pages on the medium."""

    @abstractmethod
    def read_stored(self, tier: Tier, key: PageKey) -> bytes:
        """Return the content of a page on the medium."""

    def decode(self, key: PageKey, stored: bytes) -> bytes:
        """Return the page's bytes; override it if the tier stores them in another form."""
        return stored

    @abstractmethod
    def write_stored(self, tier: Tier, key: PageKey, content: bytes) -> None:
        """Overwrite the content of a page on the medium, but not its metadata or checksum."""

    def usage(self, tier: Tier) -> TierUsage:
        """Return the current usage; override it if `Tier.usage` lags behind."""
        return tier.usage()

    def corrupt(self, tier: Tier, key: PageKey) -> None:
        """Flip a bit of the page on the medium."""
        content = bytearray(self.read_stored(tier, key))
        content[len(content) // 2] ^= 1
        self.write_stored(tier, key, content=bytes(content))

    def assert_usage_matches_medium(self, tier: Tier) -> None:
        """Compare the tier's usage with the pages on the medium."""
        keys, usage = self.stored_keys(tier), self.usage(tier)
        stored = sum(len(self.read_stored(tier, key)) for key in keys)
        assert usage.pages == len(keys)
        assert stored <= usage.bytes <= stored + len(keys) * self.page_overhead

    @pytest.mark.parametrize("lengths", [(4096, 4096), (6000, 100)], ids=str)
    def test_medium_holds_exactly_the_spilled_pages(
        self, tier: Tier, lengths: tuple[int, ...]
    ) -> None:
        keys = make_chain(make_namespace(page_bytes=sum(lengths)), 5).keys()
        spill(tier, keys, lengths)
        assert self.stored_keys(tier) == set(keys)
        for key in keys:
            stored = self.read_stored(tier, key)
            assert self.decode(key, stored) == page_content(key, sum(lengths))

    def test_load_returns_the_content_on_the_medium_at_that_time(self, tier: Tier) -> None:
        key = make_chain(self.namespace, 1).keys()[0]
        spill(tier, [key])
        content = self.read_stored(tier, key)
        self.write_stored(tier, key, bytes(len(content)))
        assert self.read_stored(tier, key) == bytes(len(content))
        self.write_stored(tier, key, content)
        load(tier, [key])

    def test_content_of_another_page_is_corrupt(self, tier: Tier) -> None:
        keys = make_chain(self.namespace, 2).keys()
        spill(tier, keys)
        self.write_stored(tier, keys[1], self.read_stored(tier, keys[0]))
        page = make_page(keys[1], LENGTHS, filled=False)
        assert tier.load([page], soon()) == [LoadResult.CORRUPT]
        assert self.stored_keys(tier) == {keys[0]}
        load(tier, keys[:1])

    def test_usage_matches_the_medium(self, tier: Tier) -> None:
        small = make_namespace(model="small")
        tier.describe(self.namespace)
        tier.describe(small)
        chain = make_chain(self.namespace, 9)
        spill(tier, chain.keys())
        spill(tier, make_chain(small, 4).keys(), (1000,))
        self.assert_usage_matches_medium(tier)
        tier.remove(chain.keys()[6:])
        assert len(self.stored_keys(tier)) == 10
        self.assert_usage_matches_medium(tier)
        tier.clear(small.digest)
        assert self.stored_keys(tier) == set(chain.keys()[:6])
        self.assert_usage_matches_medium(tier)
        reopened = self.reopen(tier)
        assert self.stored_keys(reopened) == set(chain.keys()[:6])
        self.assert_usage_matches_medium(reopened)

    @pytest.mark.parametrize(
        "lengths",
        [(4096,), (4096, 4096), (1, 2, 3), (6000, 100), (4096, 512, 7), (1 << 20, 1 << 20)],
        ids=str,
    )
    def test_loaded_pages_equal_the_spilled_ones(
        self, tier: Tier, lengths: tuple[int, ...]
    ) -> None:
        keys = make_chain(make_namespace(page_bytes=sum(lengths)), 5).keys()
        assert spill(tier, keys, lengths) == [SpillResult.STORED] * 5
        load(tier, keys, lengths)
        load(tier, keys[::-1], lengths)
        load(tier, keys[1::2], lengths)

    def test_page_never_spilled_is_missing(self, tier: Tier) -> None:
        chain = make_chain(self.namespace, 3)
        pages = [make_page(key, LENGTHS, filled=False) for key in chain.keys()]
        results = tier.load(pages, soon())
        assert results[0] == LoadResult.MISSING
        assert set(results[1:]) <= {LoadResult.MISSING, LoadResult.SKIPPED}
        assert tier.lookup(chain, soon()) == (0, True)
        assert tier.present(chain.keys(), soon()) == [False] * 3

    def test_empty_arguments_are_valid(self, tier: Tier) -> None:
        assert tier.load([], soon()) == []
        assert tier.spill([], soon()) == []
        assert tier.present([], soon()) == []
        assert tier.remove([]) == 0
        assert tier.lookup(Chain(self.namespace.digest, []), soon()) == (0, True)

    def test_page_spilled_before_is_present(self, tier: Tier) -> None:
        keys = make_chain(self.namespace, 4).keys()
        spill(tier, keys[:2])
        assert spill(tier, keys) == [SpillResult.PRESENT] * 2 + [SpillResult.STORED] * 2
        load(tier, keys)

    def test_spill_may_contain_a_page_twice(self, tier: Tier) -> None:
        key = make_chain(self.namespace, 1).keys()[0]
        results = spill(tier, [key, key, key])
        assert set(results) <= {SpillResult.STORED, SpillResult.PRESENT}
        load(tier, [key, key])
        assert tier.check_integrity() == []

    def test_lookup_finds_the_exact_page_where_chains_diverge(self, tier: Tier) -> None:
        stored = make_chain(self.namespace, 33)
        spill(tier, stored.keys())
        for shared in range(34):
            diverging = make_hashes(20, "other", parent=stored.hashes[shared - 1])
            chain = Chain(stored.namespace, [*stored.hashes[:shared], *diverging])
            assert tier.lookup(chain, soon()) == (shared, True)

    def test_lookup_may_start_within_a_chain(self, tier: Tier) -> None:
        stored = make_chain(self.namespace, 10)
        spill(tier, stored.keys()[:7])
        assert tier.lookup(Chain(stored.namespace, stored.hashes[3:]), soon()) == (4, True)

    def test_present_answers_page_by_page(self, tier: Tier) -> None:
        keys = make_chain(self.namespace, 9).keys()
        spill(tier, keys[2:5])
        assert tier.present(keys, soon()) == [2 <= i < 5 for i in range(9)]
        tier.invalidate(keys)
        assert tier.present(keys, soon()) == [2 <= i < 5 for i in range(9)]

    def test_namespaces_are_separate(self, tier: Tier) -> None:
        mine, theirs = self.namespace, make_namespace(model="another-model")
        hashes = make_hashes(3)
        spill(tier, Chain(mine.digest, hashes).keys())
        foreign = Chain(theirs.digest, hashes)
        assert tier.lookup(foreign, soon()).length == 0
        page = make_page(foreign.keys()[0], LENGTHS, filled=False)
        assert tier.load([page], soon()) == [LoadResult.MISSING]

    @pytest.mark.parametrize("lengths", [(4096,), (4096, 4095), (4096, 4097), (8192, 4096)])
    def test_load_with_another_length_is_a_miss_and_keeps_the_page(
        self, tier: Tier, lengths: tuple[int, ...]
    ) -> None:
        key = make_chain(self.namespace, 1).keys()[0]
        spill(tier, [key])
        page = make_page(key, lengths, filled=False)
        assert tier.load([page], soon()) == [LoadResult.MISSING]
        load(tier, [key])

    def test_corrupt_page_is_removed_and_can_be_replaced(self, tier: Tier) -> None:
        keys = make_chain(self.namespace, 3).keys()
        spill(tier, keys)
        self.corrupt(tier, keys[1])
        pages = [make_page(key, LENGTHS, filled=False) for key in keys]
        results = tier.load(pages, soon())
        assert results[:2] == [LoadResult.LOADED, LoadResult.CORRUPT]
        assert tier.load(pages[1:2], soon()) == [LoadResult.MISSING]
        assert spill(tier, keys)[1] == SpillResult.STORED
        load(tier, keys)

    def test_fetch_returns_the_checksums_of_loaded_pages(self, tier: Tier) -> None:
        keys = make_chain(self.namespace, 3).keys()
        spill(tier, keys[:2])
        pages = [make_page(key, LENGTHS, filled=False) for key in keys]
        outcomes = tier.fetch(pages, soon())
        for page, fetched in zip(pages[:2], outcomes, strict=False):
            assert fetched == (LoadResult.LOADED, page_checksum(page.key, page.buffers))
        assert outcomes[2].checksum is None

    def test_fetch_returns_no_checksum_for_a_corrupt_page(self, tier: Tier) -> None:
        key = make_chain(self.namespace, 1).keys()[0]
        spill(tier, [key])
        self.corrupt(tier, key)
        page = make_page(key, LENGTHS, filled=False)
        assert tier.fetch([page], soon()) == [(LoadResult.CORRUPT, None)]

    @pytest.mark.parametrize("lengths", [(4096, 4096), (6000, 100)], ids=str)
    def test_page_is_stored_with_its_own_checksum(
        self, tier: Tier, lengths: tuple[int, ...]
    ) -> None:
        key = make_chain(make_namespace(page_bytes=sum(lengths)), 1).keys()[0]
        page = make_page(key, lengths, filled=True)
        checksum = page_checksum(key, page.buffers)
        assert tier.spill([page._replace(checksum=checksum)], soon()) == [SpillResult.STORED]
        copy = make_page(key, lengths, filled=False)
        assert tier.fetch([copy], soon()) == [(LoadResult.LOADED, checksum)]

    @pytest.mark.parametrize("lengths", [(4096, 4096), (6000, 100)], ids=str)
    def test_page_changed_since_its_checksum_is_not_stored(
        self, tier: Tier, lengths: tuple[int, ...]
    ) -> None:
        key = make_chain(make_namespace(page_bytes=sum(lengths)), 1).keys()[0]
        page = make_page(key, lengths, filled=True)
        read = page._replace(checksum=page_checksum(key, page.buffers))
        page.buffers[-1][-1] ^= 1
        assert tier.spill([read], soon()) == [SpillResult.FAILED]
        tier.invalidate([key])
        assert tier.present([key], soon()) == [False]
        assert self.stored_keys(tier) == set()
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

    def test_clear_removes_only_one_namespace(self, tier: Tier) -> None:
        other = make_namespace(model="other")
        hashes = make_hashes(5)
        for namespace in (self.namespace, other):
            tier.describe(namespace)
            spill(tier, Chain(namespace.digest, hashes).keys())
        assert tier.clear(self.namespace.digest) == 5
        assert tier.clear(self.namespace.digest) == 0
        assert tier.lookup(Chain(self.namespace.digest, hashes), soon()).length == 0
        load(tier, Chain(other.digest, hashes).keys())

    def test_descriptions_survive_reopening(self, tier: Tier) -> None:
        other = make_namespace(model="another", details={"quantization": "fp8"})
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
        assert self.stored_keys(tier) == set(chain.keys()[:2])
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
            except BaseException as error:  # The main thread reports it.
                errors.append(error)

        threads = [threading.Thread(target=converse, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert tier.check_integrity() == []
        self.assert_usage_matches_medium(tier)

    def test_usage_is_within_capacity_and_structures_agree(self, tier: Tier) -> None:
        spill(tier, make_chain(self.namespace, 3).keys())
        usage = tier.usage()
        assert usage.pages >= 0
        assert usage.bytes >= 0
        assert usage.capacity is None or usage.bytes <= usage.capacity
        assert tier.check_integrity() == []

    def test_close_twice(self, tier: Tier) -> None:
        tier.close()
        tier.close()

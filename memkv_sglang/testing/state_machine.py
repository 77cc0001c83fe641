"""Compare random histories of a tier with a model. To use it, subclass `TierMachine`."""

import time
from abc import abstractmethod
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.pages import holds_content, make_hashes, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, PendingUploads, SpillResult, Tier

TREE_DEPTH = 12


def _soon() -> float:
    return time.monotonic() + 60


def _tree() -> list[list[bytes]]:
    """Return chains that share prefixes of different lengths, as conversations do."""
    trunk = make_hashes(TREE_DEPTH, "trunk")
    chains = [trunk]
    for depth in range(0, TREE_DEPTH, 3):
        branch = make_hashes(TREE_DEPTH - depth, f"branch {depth}", trunk[depth - 1])
        chains.append([*trunk[:depth], *branch])
    return chains


CHAINS = _tree()
SHAPES = ((4096, 4096), (1000, 24), (3 * 4096,))
"""Lengths of a page's buffers. Each shape has its own namespace."""


class Prefix(NamedTuple):
    """The first `length` pages of a chain, in one of the shapes."""

    shape: int
    chain: int
    length: int


PREFIXES = st.builds(
    Prefix,
    shape=st.integers(0, len(SHAPES) - 1),
    chain=st.integers(0, len(CHAINS) - 1),
    length=st.integers(0, TREE_DEPTH),
)


class TierMachine(RuleBasedStateMachine):
    """Spills, loads, looks up and removes pages and restarts the tier.

    Without eviction (`evicts = False`), presence must equal the model exactly. With eviction, pages
    may be missing, but every page loaded must be correct and have been spilled.
    """

    evicts = False
    pending_uploads: PendingUploads | None = None
    """The tier, if it supports pending uploads. Pending pages must stay, even with eviction."""

    @abstractmethod
    def open(self) -> Tier:
        """Open a tier over an empty medium."""

    @abstractmethod
    def reopen(self, tier: Tier, *, cleanly: bool) -> Tier:
        """Close the tier, or end it as a kill would, and open it again on the same medium."""

    @initialize()
    def begin(self) -> None:
        self.tier = self.open()
        self.stored: set[PageKey] = set()
        self.pending: set[PageKey] = set()
        self.namespaces = [
            make_namespace(page_bytes=sum(shape), model=f"shape {shape}") for shape in SHAPES
        ]

    def _chain(self, where: Prefix) -> Chain:
        return Chain(self.namespaces[where.shape].digest, CHAINS[where.chain][: where.length])

    @rule(where=PREFIXES, is_pending=st.booleans())
    def spill(self, where: Prefix, is_pending: bool) -> None:
        keys = self._chain(where).keys()
        pages = [make_page(key, SHAPES[where.shape], filled=True) for key in keys]
        results = self.tier.spill(pages, _soon())
        if not self.evicts:
            expected = [
                SpillResult.PRESENT if k in self.stored else SpillResult.STORED for k in keys
            ]
            assert results == expected
        for key, result in zip(keys, results, strict=True):
            if result <= SpillResult.PRESENT:
                self.stored.add(key)
        if self.pending_uploads is not None and is_pending:
            self.mark(where, pending=True)

    @rule(where=PREFIXES)
    def load(self, where: Prefix) -> None:
        keys = self._chain(where).keys()
        pages = [make_page(key, SHAPES[where.shape], filled=False) for key in keys]
        results = self.tier.load(pages, _soon())
        assert len(results) == len(pages)
        for key, page, result in zip(keys, pages, results, strict=True):
            if result == LoadResult.LOADED:
                assert holds_content(page)
                assert key in self.stored
            elif result == LoadResult.MISSING:
                assert self.evicts or key not in self.stored
            else:
                assert result == LoadResult.SKIPPED

    @rule(where=PREFIXES)
    def lookup(self, where: Prefix) -> None:
        keys = self._chain(where).keys()
        found = self.tier.lookup(self._chain(where), _soon())
        assert found.complete
        present = next((i for i, k in enumerate(keys) if k not in self.stored), len(keys))
        assert found.length <= present if self.evicts else found.length == present

    @rule(where=PREFIXES)
    def remove_leaf(self, where: Prefix) -> None:
        """Remove a page and its descendants in all chains, so that no chain has a gap."""
        keys = self._chain(where).keys()
        if not keys:
            return
        keys_to_remove = {
            PageKey(keys[0].namespace, page_hash)
            for hashes in CHAINS
            if keys[-1].hash in hashes
            for page_hash in hashes[hashes.index(keys[-1].hash) :]
        }
        removed = self.tier.remove(sorted(keys_to_remove))
        held = len(keys_to_remove & self.stored)
        assert removed <= held if self.evicts else removed == held
        self.stored -= keys_to_remove
        self.pending -= keys_to_remove

    @precondition(lambda self: self.pending_uploads is not None)
    @rule(where=PREFIXES, pending=st.booleans())
    def mark(self, where: Prefix, pending: bool) -> None:
        """Set or clear the pages' pending marks."""
        assert self.pending_uploads is not None
        keys = self._chain(where).keys()
        if pending:
            present = self.tier.present(keys, _soon())
            marked = present.index(False) if False in present else len(keys)
            assert self.pending_uploads.mark_pending(keys) == marked
            self.pending.update(keys[:marked])
        else:
            self.pending_uploads.mark_uploaded(keys)
            self.pending.difference_update(keys)

    @rule(cleanly=st.booleans())
    def restart(self, cleanly: bool) -> None:
        self.tier = self.reopen(self.tier, cleanly=cleanly)

    @precondition(lambda self: hasattr(self, "tier"))
    @invariant()
    def structures_agree(self) -> None:
        assert self.tier.check_integrity() == []

    @precondition(lambda self: self.pending_uploads is not None)
    @invariant()
    def pending_pages_are_present(self) -> None:
        assert self.pending_uploads is not None
        assert {page.key for page in self.pending_uploads.pending()} == self.pending
        assert all(self.tier.present(list(self.pending), _soon()))

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()

"""Placements that the benchmark compares: by page, by run of consecutive pages, by chain."""

from collections.abc import Iterable, Sequence

from typing_extensions import override

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.pages import make_hashes
from memkv_sglang.tiers.shards import Placement

PLACEMENTS = {"page": 1, "run of 16": 16, "run of 32": 32, "run of 64": 64, "chain": 1 << 30}
"""Number of consecutive pages that stay together, counted from the start of the chain."""


class RunPlacement(Placement):
    """Ranks the shards by the hash of the first page of a page's run.

    The product cannot place pages by runs or chains, because it does not always know a page's
    position. SGLang names the pages that precede a call's only if it is told to. Uploads after a
    restart do not know these pages, and neither do pools with only some pages of a chain.
    """

    def __init__(self, names: Sequence[str], chains: Iterable[Chain], length: int) -> None:
        """Place these chains, and no others, in runs of `length` pages."""
        super().__init__(names)
        self._firsts = {
            page_hash: chain.hashes[i - i % length]
            for chain in chains
            for i, page_hash in enumerate(chain.hashes)
        }

    @override
    def first(self, key: PageKey) -> int:
        return super().first(self._first_of_run(key))

    @override
    def order(self, key: PageKey) -> Sequence[int]:
        return super().order(self._first_of_run(key))

    def _first_of_run(self, key: PageKey) -> PageKey:
        return key._replace(hash=self._firsts[key.hash])


def conversations(
    namespace: bytes, count: int, pages: int, prompt: int, seed: str = ""
) -> list[Chain]:
    """Return `count` chains of `pages` pages that share their first `prompt` pages."""
    shared = make_hashes(prompt, f"{seed} prompt")
    parent = shared[-1] if shared else b""
    return [
        Chain(namespace, [*shared, *make_hashes(pages - prompt, f"{seed} {number}", parent)])
        for number in range(count)
    ]

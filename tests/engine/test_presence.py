"""Checking pages one by one across tiers that may be slow or down."""

import time
from collections.abc import Sequence

from memkv_sglang.engine.presence import BATCH, present
from memkv_sglang.page import PageKey
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import Tier, TierError
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import WrapperTier

NAMESPACE = make_namespace(64)
KEYS = make_chain(NAMESPACE, 3 * BATCH).keys()
SOON = 20.0


def holding(pages: Sequence[int]) -> MemoryTier:
    tier = MemoryTier()
    for page in pages:
        tier.spill([make_page(KEYS[page], [64], filled=True)], time.monotonic() + SOON)
    return tier


class AskedTier(WrapperTier):
    """Records its calls and answers slowly."""

    def __init__(self, inner: Tier, seconds: float = 0.0) -> None:
        super().__init__(inner)
        self.seconds = seconds
        self.asked: list[list[PageKey]] = []

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        self.asked.append(list(keys))
        time.sleep(self.seconds)
        return super().present(keys, deadline)


class DownTier(WrapperTier):
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        raise TierError("down")


def found(tiers: Sequence[Tier], seconds: float = SOON) -> list[int]:
    there = present(tiers, KEYS, time.monotonic() + seconds)
    assert len(there) == len(KEYS)
    return [page for page, is_there in enumerate(there) if is_there]


def test_pages_with_gaps_are_found_in_both_tiers() -> None:
    near, far = [1, 2, 200, 383], [0, 2, 3, 250]
    shared = AskedTier(holding(far))
    assert found([holding(near), shared]) == sorted({*near, *far})
    # Pages on the near tier are not looked up again.
    asked = [key for keys in shared.asked for key in keys]
    assert not {KEYS[page] for page in near} & set(asked)
    assert len(asked) == len(KEYS) - len(near)


def test_failing_tier_does_not_hide_the_other() -> None:
    assert found([holding([5]), DownTier(holding([6]))]) == [5]
    assert found([DownTier(holding([6])), holding([5])]) == [5]


def test_end_of_the_chain_is_checked_first() -> None:
    slow = AskedTier(holding([0, 383]), 0.2)
    begin = time.monotonic()
    assert found([slow], 0.3) == [383]
    assert time.monotonic() - begin < 0.35
    assert len(slow.asked) == 1  # there is no time for a second request

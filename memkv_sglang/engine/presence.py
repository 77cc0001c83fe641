"""Which pages are there, one by one: for pools that hold only some pages of a chain."""

import logging
import time
from collections.abc import Sequence

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import Tier, TierError

log = logging.getLogger(__name__)

BATCH = 128
"""Pages of one question to a tier that may have to send a request for each."""


def present(tiers: Sequence[Tier], keys: Sequence[PageKey], deadline: float) -> list[bool]:
    """Tell for each page whether one of the tiers holds it; nearest tier first. Never raises.

    Asks from the last page to the first, since the end of a chain decides how much of it is of
    use. What could not be asked for by the deadline counts as absent.
    """
    found = [False] * len(keys)
    for tier in tiers:
        missing = [i for i, there in enumerate(found) if not there]
        _ask(tier, keys, missing, found, deadline)
    return found


def _ask(
    tier: Tier, keys: Sequence[PageKey], which: list[int], found: list[bool], deadline: float
) -> None:
    last = 0.0
    for end in range(len(which), 0, -BATCH):
        begin = time.monotonic()
        # A question that runs out of time is wasted, and looks like a fault of the tier.
        if begin + last > deadline:
            return
        batch = which[max(0, end - BATCH) : end]
        try:
            answers = tier.present([keys[i] for i in batch], deadline)
        except TierError as error:
            fields = {"tier": tier.name, "error": str(error)}
            log.debug("presence unknown", extra={"fields": fields})
            return
        for index, there in zip(batch, answers, strict=True):
            found[index] = there
        last = time.monotonic() - begin

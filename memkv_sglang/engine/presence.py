"""Check each page by itself, for pools that hold only some pages of a chain."""

import logging
import time
from collections.abc import Sequence

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import Tier, TierError

log = logging.getLogger(__name__)

BATCH = 128
"""Pages per call to a tier, which may need one request per page."""


def present(tiers: Sequence[Tier], keys: Sequence[PageKey], deadline: float) -> list[bool]:
    """Return for each page whether one of the tiers holds it. Never raises.

    Checks the nearest tier first, and in each tier the last page first, because the end of a chain
    decides how much of it is usable. Pages that are not checked by the deadline count as absent.
    """
    found = [False] * len(keys)
    for tier in tiers:
        missing = [i for i, is_present in enumerate(found) if not is_present]
        _check(tier, keys, missing, found, deadline)
    return found


def _check(
    tier: Tier, keys: Sequence[PageKey], which: list[int], found: list[bool], deadline: float
) -> None:
    last = 0.0
    for end in range(len(which), 0, -BATCH):
        begin = time.monotonic()
        # A call that timed out would be wasted, and would look like a fault of the tier.
        if begin + last > deadline:
            return
        batch = which[max(0, end - BATCH) : end]
        try:
            batch_present = tier.present([keys[i] for i in batch], deadline)
        except TierError as error:
            fields = {"tier": tier.name, "error": str(error)}
            log.debug("presence unknown", extra={"fields": fields})
            return
        for index, is_present in zip(batch, batch_present, strict=True):
            found[index] = is_present
        last = time.monotonic() - begin

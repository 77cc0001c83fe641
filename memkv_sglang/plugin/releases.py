"""Host pages that an ended agent may still write to stay out of SGLang's pools until it cannot.

SGLang releases the pages of a failed load through queues, from which all ranks take equally many
pages at a time. A rank whose release comes late therefore stays in step with the others.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from memkv_sglang.client.withheld import withheld

log = logging.getLogger(__name__)

RESET_LIMIT = 60.0
"""Seconds that a reset of the pools waits for a disk; SGLang's watchdog waits 300."""


def release(original: Callable[..., Any], controller: Any, *args: Any, **kwargs: Any) -> None:
    """Stand around `append_host_mem_release`: postpone it while pages are withheld.

    Postpones every release, not only those of withheld pages: that takes no bookkeeping, and the
    pools are a little smaller for the moment.
    """
    withheld.when_free(partial(original, controller, *args, **kwargs))


def wait_before_reset() -> None:
    """Wait until no pages are withheld, since a reset frees every page of the pools.

    Raises `RuntimeError` after `RESET_LIMIT`, which ends the server: whatever the pages held next
    could be overwritten.
    """
    if withheld.pending:
        log.warning("memkv: the cache is reset once the disk has ended a killed agent's requests")
    if not withheld.wait(RESET_LIMIT):
        raise RuntimeError(
            f"memkv: the disk has not ended a killed agent's requests within {RESET_LIMIT:.0f} s, "
            "so the cache cannot be reset; check the disk under nvme.directory"
        )

"""Warn about host pools that are too small, and relax SGLang's limit on loads in flight."""

import logging
from collections.abc import Callable
from typing import Any

from memkv_sglang.log_limit import LogLimit
from memkv_sglang.plugin import state

log = logging.getLogger(__name__)

LOG_SECONDS = 300.0

_limit = LogLimit(LOG_SECONDS)


def check_host_pool(host_pool: Any, write_policy: str) -> None:
    """Log one line if a host pool is smaller than the device pool that writes through to it."""
    # Pools without memory of their own lack the attribute.
    host, device = int(host_pool.size), int(getattr(host_pool, "device_capacity_tokens", 0))
    if host < device and write_policy.startswith("write_through"):
        log.warning(
            "memkv: the host pool holds %d tokens, fewer than the device pool with %d; with "
            "--hicache-write-policy %s the device's pages fill it, so that loads are cut short and "
            "pages are not stored: raise --hicache-ratio above 1 or --hicache-size",
            host,
            device,
            write_policy,
        )


def rate_limited(original: Callable[..., Any], controller: Any) -> Any:
    """Wrap `prefetch_rate_limited`, to charge a load for the memory that it holds.

    SGLang charges a load for the whole prompt, even if it found few pages. All ranks make the same
    decision, because they start and end loads in the same order.
    """
    if not original(controller):
        return False
    tree = state.tree() if state.tree is not None else None
    if tree is None or state.storage is None or not _can_recount(controller):
        return True
    held, limit = _tokens_held(tree), int(controller.prefetch_capacity_limit)
    if held < limit:
        return False
    if _limit.admit("prefetch") is not None:
        log.warning(
            "memkv: loads in flight hold %d of %d tokens, half of the host pool, so further "
            "requests are computed: raise --hicache-size or --hicache-ratio",
            held,
            limit,
        )
    return True


def _can_recount(controller: Any) -> bool:
    """Return whether the radix tree lists all loads in flight, as without pipeline parallelism."""
    return bool(controller.host_memory_mode == "cache" and controller.storage_config.pp_size == 1)


def _tokens_held(tree: Any) -> int:
    """Return the tokens of all loads in flight. A load whose lookup is running counts in full."""
    return sum(
        len(load.prefetch_key if load.host_indices is None else load.host_indices)
        for load in tree.ongoing_prefetch.values()
    )

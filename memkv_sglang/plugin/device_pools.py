"""Record the device pool of each host pool. SGLang does not pass it to the storage."""

from collections.abc import Callable
from typing import Any

from memkv_sglang.plugin import state
from memkv_sglang.plugin.namespaces import KV_POOL


def attach(original: Callable[..., Any], controller: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `attach_storage_backend`, which creates the storage, and record the storage's pools.

    A controller of SGLang's decode offload has one pool and no list of entries.
    """
    entries = getattr(controller.mem_pool_host, "entries", None)
    if entries is None:
        state.device_pools[KV_POOL] = (controller.mem_pool_device,)
    for entry in entries or ():
        _note(entry)
    return original(controller, *args, **kwargs)


def register(original: Callable[..., Any], controller: Any, entry: Any) -> Any:
    """Wrap `register_host_pool_entry`, which adds a pool to a storage, and record the pool."""
    _note(entry)
    return original(controller, entry)


def _note(entry: Any) -> None:
    drafts = tuple(getattr(entry, "packed_draft_device_pools", ()))
    state.device_pools[str(entry.name)] = (entry.device_pool, *drafts)

"""Hooks that the tier works without: it says so once where one is missing."""

import logging
from collections.abc import Callable
from typing import Any

from memkv_sglang.plugin import releases
from memkv_sglang.plugin import state as running

log = logging.getLogger(__name__)

CONTROLLER = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"


def transfer(original: Callable[..., Any], controller: Any, operation: Any) -> Any:
    """Stand around the load of a request's pages."""
    storage = running.storage
    if storage is None:
        return original(controller, operation)
    with storage.traffic.of_request(operation.request_id, controller.page_size):
        return original(controller, operation)


def back_up(original: Callable[..., Any], controller: Any, operation: Any) -> Any:
    """Stand around the backup of a tree node's pages."""
    result = original(controller, operation)
    storage = running.storage
    if storage is not None:
        storage.backed_up(operation, controller.page_size)
    return result


def should_back_up(original: Callable[..., Any], controller: Any, transfer: Any) -> Any:
    """Stand around the choice of side pools that a rank backs up.

    Where the ranks' KV is equal SGLang lets one rank write; pools whose content differs from rank
    to rank must be written by each.
    """
    storage = running.storage
    differs = storage is not None and storage.differs_by_rank(transfer.name)
    return differs or original(controller, transfer)


def take_events(original: Callable[..., Any], tree: Any) -> Any:
    """Stand around the hand-over of the tree's events."""
    events = original(tree)
    storage = running.storage
    if storage is not None and storage.announcer is not None:
        return [*events, *storage.announcer.take()]
    return events


def process_result(original: Callable[..., Any], scheduler: Any, batch: Any, result: Any) -> Any:
    """Stand around what the scheduler does with a batch's results, for which it waits first."""
    done = original(scheduler, batch, result)
    if running.storage is not None:
        running.storage.computed(batch)
    return done


RELEASE = f"{CONTROLLER}.append_host_mem_release"

OBSERVERS: tuple[tuple[str, Callable[..., Any]], ...] = (
    (f"{CONTROLLER}._page_transfer", transfer),
    (f"{CONTROLLER}._page_backup", back_up),
    (f"{CONTROLLER}.should_backup", should_back_up),
    (f"{TREE}.take_events", take_events),
    (f"{SCHEDULER}.process_batch_result", process_result),
    (RELEASE, releases.release),
)


def install() -> None:
    """Put the observers in place in this process; idempotent, never raises.

    Called where the storage is made and not with the other hooks, so that a server observes
    equally whether it has the plugin, a patched SGLang, or an attachment at run time.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, around in OBSERVERS:
        if target not in HookRegistry._patched:
            HookRegistry.register(target, around, HookType.AROUND)
    HookRegistry.apply_hooks()
    missing = [target for target, around in OBSERVERS if not _is_in_place(target, around)]
    if missing:
        log.warning("memkv: not observed, as another hook or SGLang is in the way: %s", missing)


def can_withhold() -> bool:
    """Tell whether pages that SGLang releases can be kept from its pools for a while."""
    return _is_in_place(RELEASE, releases.release)


def _is_in_place(target: str, around: Callable[..., Any]) -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = HookRegistry._hooks.get(target, [])
    return target in HookRegistry._patched and any(hook is around for _, hook, _ in hooks)

"""Optional hooks on SGLang's cache controller, radix tree and scheduler."""

from collections.abc import Callable
from functools import partial
from typing import Any

from memkv_sglang.client.withheld import withheld
from memkv_sglang.plugin import state


def look_up(original: Callable[..., Any], controller: Any, operation: Any) -> Any:
    """Wrap the lookup of a request's pages, to tell the agent which request needs them."""
    storage = state.storage
    if storage is None:
        return original(controller, operation)
    with storage.traffic.lookup_of(operation.request_id):
        return original(controller, operation)


def load(original: Callable[..., Any], controller: Any, operation: Any) -> Any:
    """Wrap the load of a request's pages, to count the tokens from each tier."""
    storage = state.storage
    if storage is None:
        return original(controller, operation)
    with storage.traffic.load_of(operation.request_id, controller.page_size):
        return original(controller, operation)


def back_up(original: Callable[..., Any], controller: Any, operation: Any) -> Any:
    """Wrap the backup of a tree node's pages, to announce them in SGLang's KV events."""
    result = original(controller, operation)
    storage = state.storage
    if storage is not None:
        storage.record_backup(operation, controller.page_size)
    return result


def should_back_up(original: Callable[..., Any], controller: Any, transfer: Any) -> Any:
    """Wrap the choice of the side pools that this rank backs up.

    If the ranks' KV is equal, SGLang lets one rank write. But if the content of a side pool differs
    from rank to rank, each rank must write it.
    """
    storage = state.storage
    differs = storage is not None and storage.differs_by_rank(transfer.name)
    return differs or original(controller, transfer)


def take_events(original: Callable[..., Any], tree: Any) -> Any:
    """Wrap `take_events` of the radix tree, to append the events of the tiers."""
    events = original(tree)
    storage = state.storage
    added = storage.take_events() if storage is not None else []
    return [*events, *added] if added else events


def process_result(original: Callable[..., Any], scheduler: Any, batch: Any, result: Any) -> Any:
    """Wrap the processing of a batch's results, which waits for them first, to time the batch."""
    done = original(scheduler, batch, result)
    if state.storage is not None:
        state.storage.record_batch(batch)
    return done


def release(original: Callable[..., Any], controller: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `append_host_mem_release`, to postpone the release of pages while pages are withheld.

    A killed agent's disk requests may still write to the pages of a failed load. SGLang releases
    pages through queues. All ranks take the same number of pages from these in each iteration, so a
    rank that releases pages late stays in step with the others. Every release is postponed, not
    only that of withheld pages, because this needs no bookkeeping and the pools are only a little
    smaller meanwhile.
    """
    withheld.when_free(partial(original, controller, *args, **kwargs))


def match_on_decode(
    original: Callable[..., Any], queue: Any, req: Any, result: Any, **more: Any
) -> Any:
    """Wrap `_build_decode_prefix_match`, to promise only the prefix that is locked on the device.

    The prefill server does not transfer the promised prefix. SGLang would include pages of the host
    pool and of the storage, which it loads after the transfer. If one of them is gone by then, it
    fails the request with HTTP 500. It would also wait for the lookup in the scheduler. The prefill
    server finds the same pages in storage, and transfers them.
    """
    if not state.enabled:
        return original(queue, req, result, **more)
    from sglang.srt.disaggregation.decode_hicache_mixin import DecodePrefixMatch

    return DecodePrefixMatch(
        prefix_indices=queue.tree_cache.prefix_device_indices(req),
        l2_host_hit_length=0,
        l3_storage_hit_length=0,
        last_device_node=result.last_device_node,
    )

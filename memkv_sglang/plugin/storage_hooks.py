"""Optional hooks on SGLang's cache controller, radix tree and scheduler, for the storage."""

from collections.abc import Callable
from functools import partial
from typing import Any

from memkv_sglang.client.withheld import withheld
from memkv_sglang.plugin import state


def load(original: Callable[..., Any], controller: Any, operation: Any) -> Any:
    """Wrap the load of a request's pages: count the tokens that each tier served."""
    storage = state.storage
    if storage is None:
        return original(controller, operation)
    with storage.traffic.of_request(operation.request_id, controller.page_size):
        return original(controller, operation)


def back_up(original: Callable[..., Any], controller: Any, operation: Any) -> Any:
    """Wrap the backup of a tree node's pages: announce them in SGLang's KV events."""
    result = original(controller, operation)
    storage = state.storage
    if storage is not None:
        storage.record_backup(operation, controller.page_size)
    return result


def should_back_up(original: Callable[..., Any], controller: Any, transfer: Any) -> Any:
    """Wrap the choice of side pools that this rank backs up.

    If the ranks' KV is equal, SGLang lets one rank write. Side pools whose content differs from
    rank to rank must be written by each rank.
    """
    storage = state.storage
    differs = storage is not None and storage.differs_by_rank(transfer.name)
    return differs or original(controller, transfer)


def take_events(original: Callable[..., Any], tree: Any) -> Any:
    """Wrap `take_events` of the radix tree: append the events of the tiers."""
    events = original(tree)
    storage = state.storage
    added = storage.take_events() if storage is not None else []
    return [*events, *added] if added else events


def process_result(original: Callable[..., Any], scheduler: Any, batch: Any, result: Any) -> Any:
    """Wrap the processing of a batch's results, which begins by waiting for them: time it."""
    done = original(scheduler, batch, result)
    if state.storage is not None:
        state.storage.record_batch(batch)
    return done


def release(original: Callable[..., Any], controller: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `append_host_mem_release`: postpone it while pages are withheld.

    A killed agent's disk requests may still write to the pages of a failed load. SGLang releases
    those through queues, from which all ranks take equally many pages per iteration, so a rank
    that releases late stays in step with the others. Every release is postponed, not only those of
    withheld pages: that needs no bookkeeping, and the pools are only a little smaller meanwhile.
    """
    withheld.when_free(partial(original, controller, *args, **kwargs))

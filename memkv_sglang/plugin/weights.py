"""Handle weight updates at run time: never serve or store pages of old weights under new ones.

An update seals the storage when it begins: lookups and loads miss, and spills are dropped. The
storage stays sealed until SGLang has reset its radix tree after the last change of a weight. Then
it continues in a new namespace. SGLang resets the tree after most updates, but not while a backup
is in flight. It would then serve old KV with new weights, so an update first waits for backups.
"""

import logging
import time
import uuid
import weakref
from collections.abc import Callable
from typing import Any

from memkv_sglang.client.withheld import withheld
from memkv_sglang.plugin import state
from memkv_sglang.plugin.fingerprint import NoFingerprintError, tensor_names
from memkv_sglang.plugin.namespaces import ModelIdentity, find_weights, identify_weights
from memkv_sglang.plugin.state import Weights

log = logging.getLogger(__name__)

BACKUP_POLLS = 2000
POLL_SECONDS = 0.005
"""Their product is how long an update waits for backups, which is longer than any storage call
takes. The count is fixed, because each poll runs collectives, so every rank must make the same
number."""

RESET_LIMIT = 60.0
"""Seconds that a reset of the pools waits for a disk. SGLang's watchdog waits 300 s."""


def identify_loaded(started_with: ModelIdentity) -> ModelIdentity:
    """Return the identity of the loaded model. `started_with` is that at the server's start.

    Raises `NoFingerprintError` if updates make the identity uncertain.
    """
    weights = state.weight_updates.settled
    if weights is None:
        raise NoFingerprintError(
            "weights were updated before the storage was attached, or are being updated now; "
            "start the server with --enable-memkv, or attach after POST /flush_cache"
        )
    return weights.name(started_with)


def update_weights_from_disk(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Wrap an update from files. The content of the files identifies the new weights."""
    if not state.weight_updates.started_with:  # the update changes SGLang's model_path
        state.weight_updates.started_with = manager.scheduler.server_args.model_path
    return _update(original, manager, request, lambda: _fingerprint(request.model_path))


def update_weights_from_ipc(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Wrap an update whose weights do not come from files."""
    return _update(original, manager, request, _no_fingerprint)


def update_weights_from_tensor(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Wrap an update inside a session. Outside of one, SGLang refuses it."""
    if manager._session is None:
        return original(manager, request)
    return _update(original, manager, request, _no_fingerprint)


update_weights_from_distributed = update_weights_from_tensor


def begin_weight_update(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Wrap the start of an update session, to seal the storage until the session ends."""
    if manager._session is not None:
        return original(manager, request)
    state.weight_updates.begin()
    if state.enabled:
        _wait_for_backups(manager)
    return original(manager, request)


def end_weight_update(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Wrap the end of an update session, to reset the radix tree, which SGLang does not do here."""
    if manager._session is None:
        return original(manager, request)
    result = _update(original, manager, request, _no_fingerprint)
    state.weight_updates.end(state.weight_updates.loaded)
    if state.enabled:
        _wait_for_backups(manager)
        if not manager.flush_cache():
            log.warning("memkv: sealed until the cache is flushed (POST /flush_cache)")
    return result


def release_memory_occupation(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Wrap the release of device memory, to seal the storage until all of it is resumed.

    The content of the memory is lost, unless SGLang keeps a copy of the weights. After weights were
    lost, the storage stays sealed until an update has replaced them.
    """
    from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS

    updates = state.weight_updates
    updates.suspend()
    if state.enabled:
        _wait_for_backups(manager)
    tags = request.tags or (GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS)
    if manager.memory_saver_adapter.enabled:
        if GPU_MEMORY_TYPE_KV_CACHE in tags:
            updates.lose_kv()  # the KV is lost until SGLang has reset its tree
        if GPU_MEMORY_TYPE_WEIGHTS in tags and not _keeps_weights(manager):
            updates.lose_weights()
            log.info("memkv: released the weights; sealed until they are updated")
    return original(manager, request)


def resume_memory_occupation(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Wrap the return of device memory."""
    try:
        return original(manager, request)
    finally:
        if not manager.offload_tags:
            state.weight_updates.resume()


def _keeps_weights(manager: Any) -> bool:
    return bool(manager.scheduler.server_args.enable_weights_cpu_backup)


def reset_tree(original: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap the reset of the radix tree. Raises `RuntimeError` if pages stay withheld."""
    state.tree = weakref.ref(tree)
    if state.enabled:
        _wait_for_withheld_pages()
    result = original(tree, *args, **kwargs)
    # SGLang remembers which pages are stored, but maybe in the namespace of other weights.
    stored_pages = getattr(tree, "storage_existence_cache", None)
    if state.enabled and stored_pages is not None:
        stored_pages.clear()
    state.weight_updates.tree_was_reset()
    return result


def _wait_for_withheld_pages() -> None:
    """Wait until no pages are withheld, because a reset frees all pages of the pools.

    Raises `RuntimeError` after `RESET_LIMIT`, which ends the server. Otherwise, a late disk request
    could overwrite what the pages hold next.
    """
    if withheld.pending:
        log.warning("memkv: cache reset waits for disk requests of a killed agent")
    if not withheld.wait(RESET_LIMIT):
        raise RuntimeError(
            f"memkv: the disk has not finished a killed agent's requests within {RESET_LIMIT:.0f} "
            "s, so the cache cannot be reset; check the disk under nvme.directory"
        )


def _update(
    original: Callable[..., Any], manager: Any, request: Any, identify: Callable[[], str]
) -> Any:
    """Run an update. `identify` returns the fingerprint of the new weights, empty for none."""
    state.weight_updates.begin()
    if state.enabled:
        _wait_for_backups(manager)
    result = original(manager, request)
    # An update that fails may have changed some of the weights.
    fingerprint = identify() if result.success and state.enabled else ""
    state.weight_updates.end(_agree(manager, fingerprint) if state.enabled else None)
    return result


def _wait_for_backups(manager: Any) -> None:
    """Wait for backups in flight, so that SGLang can reset its tree after the update."""
    tree = manager.scheduler.tree_cache
    for _ in range(BACKUP_POLLS):
        if not (tree.ongoing_backup or tree.ongoing_write_through or tree.ongoing_load_back):
            return
        tree.check_hicache_events()
        time.sleep(POLL_SECONDS)
    log.warning("memkv: backups still in flight; sealed until the cache is flushed")


def _fingerprint(model_path: str) -> str:
    try:
        _require_all_tensors(model_path)
        return identify_weights(model_path)
    except (NoFingerprintError, OSError, ValueError) as error:
        log.warning("memkv: new weights have no fingerprint; nodes do not share them: %s", error)
        return ""


def _require_all_tensors(model_path: str) -> None:
    """Raise `NoFingerprintError` if the files contain only some of the model's tensors.

    SGLang would load these and keep its other weights, so the files do not identify the result.
    """
    needed = tensor_names(find_weights(state.weight_updates.started_with))
    lacking = needed - tensor_names(find_weights(model_path))
    if lacking:
        raise NoFingerprintError(f"{len(lacking)} tensors are not in {model_path}")


def _no_fingerprint() -> str:
    return ""


def _agree(manager: Any, fingerprint: str) -> Weights:
    """Agree with all ranks on a name of the weights: a common fingerprint or a unique name.

    This is a collective. Every rank calls it once per update, even if its update failed.
    """
    import torch.distributed as dist

    group = manager.tp_cpu_group
    mine = Weights(fingerprint, uuid.uuid4().hex)
    of_ranks = [mine] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, mine, group=group)
    if fingerprint and all(weights.fingerprint == fingerprint for weights in of_ranks):
        return Weights(fingerprint)
    return Weights(revision=of_ranks[0].revision)

"""Weight updates at run time: no page of the old weights is served or stored under the new.

From an update's begin the storage is sealed: lookups and loads miss, spills are dropped. It stays
so until the radix tree has been reset after the last change of a weight, and goes on in a new
namespace. SGLang resets the tree itself after most updates, but not while a backup is in flight,
and would then serve old KV under new weights: so an update waits for backups first.
"""

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from memkv_sglang.plugin import running
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.namespaces import ModelIdentity, identify_weights

log = logging.getLogger(__name__)

BACKUP_POLLS = 2000
POLL_SECONDS = 0.005
"""Together: how long an update waits for backups. Polls are counted, not timed: each one holds
collectives, so every rank must make as many."""


class WeightUpdates:
    """What is under way in this scheduler process. Used by its main thread alone."""

    def __init__(self) -> None:
        """No update is under way."""
        self._inside = 0
        """Calls and sessions of updates that have begun and not ended."""
        self._loaded: ModelIdentity | None = None
        """Whose pages the storage is to name once the tree has been reset; None: not sealed."""
        self._was_reset = False

    def begin(self) -> None:
        """Seal the storage; weights may change from now on."""
        self._inside += 1
        self._was_reset = False
        if running.storage is not None:
            running.storage.seal()

    def end(self, loaded: ModelIdentity | None) -> None:
        """Take note of what is loaded now. A reset within the call came after the change."""
        self._inside -= 1
        self._loaded = loaded
        if self._was_reset:
            self._unseal()

    def tree_was_reset(self) -> None:
        """Take note that what the tree gets from now on was computed with the current weights."""
        self._was_reset = True
        self._unseal()

    def _unseal(self) -> None:
        if self._inside == 0 and self._loaded is not None and running.storage is not None:
            running.storage.unseal(self._loaded)
            self._loaded = None


_updates = WeightUpdates()


def update_weights_from_disk(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Stand around the update from files, whose content names the new weights."""
    return _update(original, manager, request, lambda: _of_files(manager, request.model_path))


def update_weights_from_ipc(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Stand around an update whose weights have no name."""
    return _update(original, manager, request, lambda: _of_nobody(manager))


update_weights_from_tensor = update_weights_from_distributed = update_weights_from_ipc


def begin_weight_update(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Stand around the begin of a session of updates; sealed until it has ended."""
    if not running.enabled:
        return original(manager, request)
    _updates.begin()
    _wait_for_backups(manager)
    result = original(manager, request)
    if not result.success:
        _updates.end(_current())
    return result


def end_weight_update(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Stand around the end of a session. SGLang does not reset its tree here; this does."""
    result = original(manager, request)
    if running.enabled and result.success:
        _updates.end(_of_nobody(manager))
        if not manager.flush_cache():
            log.warning("memkv: sealed until the cache is flushed (POST /flush_cache)")
    return result


def reset_tree(original: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand around the reset of the radix tree."""
    result = original(tree, *args, **kwargs)
    if running.enabled:
        # What SGLang believes to be stored is stored under the name of other weights, perhaps.
        beliefs = getattr(tree, "storage_existence_cache", None)
        if beliefs is not None:
            beliefs.clear()
        _updates.tree_was_reset()
    return result


def _update(
    original: Callable[..., Any],
    manager: Any,
    request: Any,
    identify: Callable[[], ModelIdentity | None],
) -> Any:
    if not running.enabled:
        return original(manager, request)
    _updates.begin()
    loaded = None
    try:
        _wait_for_backups(manager)
        result = original(manager, request)
        # A failed update may have changed a part of the weights.
        loaded = identify() if result.success else _of_nobody(manager)
        return result
    finally:
        _updates.end(loaded)


def _wait_for_backups(manager: Any) -> None:
    """Let backups in flight end, so that SGLang can reset its tree after the update."""
    tree = manager.scheduler.tree_cache
    for _ in range(BACKUP_POLLS):
        if not (tree.ongoing_backup or tree.ongoing_write_through):
            return
        tree.check_hicache_events()
        time.sleep(POLL_SECONDS)
    log.warning("memkv: backups still in flight; sealed until the cache is flushed")


def _of_files(manager: Any, model_path: str) -> ModelIdentity | None:
    try:
        return _named(identify_weights(model_path), revision="")
    except (NoFingerprintError, OSError) as error:
        log.warning("memkv: new weights without a fingerprint (%s); nodes do not share", error)
        return _of_nobody(manager)


def _of_nobody(manager: Any) -> ModelIdentity | None:
    """Return an identity that this server's ranks agree on and nobody else has."""
    import torch.distributed as dist

    agreed = [uuid.uuid4().hex]
    group = manager.tp_cpu_group
    dist.broadcast_object_list(agreed, src=dist.get_global_rank(group, 0), group=group)
    return _named(None, revision=agreed[0])


def _named(fingerprint: str | None, revision: str) -> ModelIdentity | None:
    current = _current()
    if current is None:
        return None
    return current._replace(fingerprint=fingerprint or current.fingerprint, revision=revision)


def _current() -> ModelIdentity | None:
    return running.storage.model if running.storage is not None else None

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
from typing import Any, NamedTuple

from memkv_sglang.plugin import releases
from memkv_sglang.plugin import state as running
from memkv_sglang.plugin.fingerprint import NoFingerprintError, tensor_names
from memkv_sglang.plugin.namespaces import ModelIdentity, find_weights, identify_weights

log = logging.getLogger(__name__)

BACKUP_POLLS = 2000
POLL_SECONDS = 0.005
"""Together: how long an update waits for backups, longer than a call of the storage lasts. Polls
are counted, not timed: each one holds collectives, so every rank must make as many."""


class Weights(NamedTuple):
    """Which weights these are, beside what else names a model."""

    fingerprint: str = ""
    """Of the files they come from; empty: those that the server was started with."""
    revision: str = ""
    """A name that nobody else has, for weights that are not those of any file."""

    def name(self, model: ModelIdentity) -> ModelIdentity:
        """Return the model's identity with these weights."""
        fingerprint = self.fingerprint or model.fingerprint
        return model._replace(fingerprint=fingerprint, revision=self.revision)


class WeightUpdates:
    """What is loaded in this scheduler process. Used by its main thread alone."""

    def __init__(self) -> None:
        """Begin with what the server was started with."""
        self._open = 0
        """Calls and sessions of updates that have begun and not ended."""
        self.loaded: Weights | None = Weights()
        """None: not known."""
        self._tree_is_clean = True
        """Whether all of the tree was computed with what is loaded now."""
        self.started_with = ""
        """Path of the model that the server was started with, once there has been an update."""

    @property
    def settled(self) -> Weights | None:
        """What all of the tree was computed with; None while that is not certain."""
        return self.loaded if self._tree_is_clean and not self._open else None

    def begin(self) -> None:
        """Seal the storage; weights may change from now on."""
        self._open += 1
        self.loaded = None
        self._tree_is_clean = False
        if running.storage is not None:
            running.storage.seal()

    def end(self, weights: Weights | None) -> None:
        """Take note of what is loaded now. A reset since `begin` came after the change."""
        self._open -= 1
        self.loaded = weights
        self._unseal()

    def tree_was_reset(self) -> None:
        """Take note that what the tree gets from now on is computed with what is loaded now."""
        was_clean, self._tree_is_clean = self._tree_is_clean, True
        if not was_clean:
            self._unseal()

    def _unseal(self) -> None:
        storage, weights = running.storage, self.settled
        if storage is not None and storage.model is not None and weights is not None:
            storage.unseal(weights.name(storage.model))


_updates = WeightUpdates()


def identify_loaded(started_with: ModelIdentity) -> ModelIdentity:
    """Return who the model is now. Raises `NoFingerprintError` if updates make that uncertain."""
    weights = _updates.settled
    if weights is None:
        raise NoFingerprintError(
            "weights were updated before the storage was attached, or are being updated now; "
            "start the server with --enable-memkv, or attach after POST /flush_cache"
        )
    return weights.name(started_with)


def update_weights_from_disk(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Stand around the update from files, whose content names the new weights."""
    if not _updates.started_with:  # SGLang is about to change it
        _updates.started_with = manager.scheduler.server_args.model_path
    return _update(original, manager, request, lambda: _of_files(request.model_path))


def update_weights_from_ipc(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Stand around an update whose weights have no name."""
    return _update(original, manager, request, _nameless)


def update_weights_from_tensor(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Stand around an update inside a session, which SGLang refuses outside of one."""
    if manager._session is None:
        return original(manager, request)
    return _update(original, manager, request, _nameless)


update_weights_from_distributed = update_weights_from_tensor


def begin_weight_update(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Stand around the begin of a session of updates; sealed until it has ended."""
    if manager._session is not None:
        return original(manager, request)
    _updates.begin()
    if running.enabled:
        _wait_for_backups(manager)
    return original(manager, request)


def end_weight_update(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Stand around the end of a session. SGLang does not reset its tree here; this does."""
    if manager._session is None:
        return original(manager, request)
    result = _update(original, manager, request, _nameless)
    _updates.end(_updates.loaded)
    if running.enabled:
        _wait_for_backups(manager)
        if not manager.flush_cache():
            log.warning("memkv: sealed until the cache is flushed (POST /flush_cache)")
    return result


def reset_tree(original: Callable[..., Any], tree: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand around the reset of the radix tree. Raises `RuntimeError` where pages stay withheld."""
    if running.enabled:
        releases.wait_before_reset()
    result = original(tree, *args, **kwargs)
    # What SGLang believes to be stored is stored under the name of other weights, perhaps.
    beliefs = getattr(tree, "storage_existence_cache", None)
    if running.enabled and beliefs is not None:
        beliefs.clear()
    _updates.tree_was_reset()
    return result


def _update(
    original: Callable[..., Any], manager: Any, request: Any, identify: Callable[[], str]
) -> Any:
    """Call the original; `identify` returns the fingerprint of what it loads, empty for none."""
    _updates.begin()
    if running.enabled:
        _wait_for_backups(manager)
    result = original(manager, request)
    # A failed update may have changed a part of the weights.
    _updates.end(_agree(manager, identify() if result.success else "") if running.enabled else None)
    return result


def _wait_for_backups(manager: Any) -> None:
    """Let copies in flight end, so that SGLang can reset its tree after the update."""
    tree = manager.scheduler.tree_cache
    for _ in range(BACKUP_POLLS):
        if not (tree.ongoing_backup or tree.ongoing_write_through or tree.ongoing_load_back):
            return
        tree.check_hicache_events()
        time.sleep(POLL_SECONDS)
    log.warning("memkv: backups still in flight; sealed until the cache is flushed")


def _of_files(model_path: str) -> str:
    try:
        _demand_all_tensors(model_path)
        return identify_weights(model_path)
    except (NoFingerprintError, OSError, ValueError) as error:
        log.warning("memkv: new weights without a fingerprint (%s); nodes do not share", error)
        return ""


def _demand_all_tensors(model_path: str) -> None:
    """Raise `NoFingerprintError` if the files leave some of the weights as they were.

    SGLang loads what there is. The files alone do not say then what is computed with.
    """
    needed = tensor_names(find_weights(_updates.started_with))
    lacking = needed - tensor_names(find_weights(model_path))
    if lacking:
        raise NoFingerprintError(f"{len(lacking)} tensors are not in {model_path}")


def _nameless() -> str:
    return ""


def _agree(manager: Any, fingerprint: str) -> Weights:
    """Return what the server's ranks agree on: the fingerprint all have, or a name of their own.

    A collective call: every rank comes here once an update, also where it failed.
    """
    import torch.distributed as dist

    group = manager.tp_cpu_group
    mine = Weights(fingerprint, uuid.uuid4().hex)
    of_ranks = [mine] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, mine, group=group)
    if fingerprint and all(weights.fingerprint == fingerprint for weights in of_ranks):
        return Weights(fingerprint)
    return Weights(revision=of_ranks[0].revision)

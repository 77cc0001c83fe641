"""The state of this plugin in one scheduler process. All its module globals are here.

Hooks find the storage here, because SGLang passes them no reference to it, and may wrap it.
"""

import weakref
from typing import Any, NamedTuple, Protocol

from memkv_sglang.plugin.launch import uses_memkv
from memkv_sglang.plugin.namespaces import ModelIdentity
from memkv_sglang.plugin.traffic import Traffic


class AttachedStorage(Protocol):
    """The parts of `MemKVStorage` that hooks use."""

    traffic: Traffic

    @property
    def model(self) -> ModelIdentity | None:
        """Identity of the model whose pages the storage moves; None while the tier is off."""

    def seal(self) -> None:
        """Miss every lookup and drop every spill until `unseal`."""

    def unseal(self, model: ModelIdentity) -> None:
        """Continue in the namespaces of this model."""

    def differs_by_rank(self, pool: Any) -> bool:
        """Return whether every rank has to store this pool."""

    def record_backup(self, operation: Any, page_size: int) -> None:
        """Announce the pages of a backup in SGLang's KV events."""

    def record_batch(self, batch: Any) -> None:
        """Learn this server's prefill speed from a finished batch."""

    def take_events(self) -> list[Any]:
        """Return the KV events of the tiers since the last call."""

    def disable_after_fork(self) -> None:
        """Turn the tier off in a forked child."""


class Weights(NamedTuple):
    """The weights that are loaded now."""

    fingerprint: str = ""
    """Fingerprint of the files that the weights came from; empty for the files at the server's
    start."""
    revision: str = ""
    """Unique name of weights that did not come from files."""

    def name(self, model: ModelIdentity) -> ModelIdentity:
        """Return the identity of the model with these weights."""
        fingerprint = self.fingerprint or model.fingerprint
        return model._replace(fingerprint=fingerprint, revision=self.revision)


class WeightUpdates:
    """Tracks the weights of this process. Not thread-safe: only the scheduler's thread uses it."""

    def __init__(self) -> None:
        """Start with the weights that the server was started with."""
        self._in_progress = 0
        """Number of updates and update sessions that have begun but not ended."""
        self._is_suspended = False
        """Whether SGLang has released device memory, and not resumed all of it yet."""
        self.loaded: Weights | None = Weights()
        """The weights that are loaded; None if they are not known."""
        self._tree_is_clean = True
        """Whether all KV in the radix tree was computed with the loaded weights."""
        self.started_with = ""
        """Path of the model at the server's start; empty before the first update."""

    @property
    def settled(self) -> Weights | None:
        """The weights that all KV in the radix tree was computed with; None if uncertain."""
        changing = self._in_progress or self._is_suspended
        return self.loaded if self._tree_is_clean and not changing else None

    def begin(self) -> None:
        """Seal the storage, because the weights may change from now on."""
        self._in_progress += 1
        self.loaded = None
        self._tree_is_clean = False
        if storage is not None:
            storage.seal()

    def end(self, weights: Weights | None) -> None:
        """Record the weights that are loaded now.

        If the tree was reset since `begin`, that was after they were loaded.
        """
        self._in_progress -= 1
        self.loaded = weights
        self._unseal()

    def suspend(self) -> None:
        """Seal the storage, because SGLang is about to release device memory."""
        self._is_suspended = True
        if storage is not None:
            storage.seal()

    def lose_kv(self) -> None:
        """Record that the KV in the radix tree is lost, until the tree is reset."""
        self._tree_is_clean = False

    def lose_weights(self) -> None:
        """Record that the loaded weights are lost, until all of them are updated."""
        self.loaded = None

    def resume(self) -> None:
        """Record that SGLang has resumed all device memory."""
        self._is_suspended = False
        self._unseal()

    def tree_was_reset(self) -> None:
        """Record that the tree is empty. From now on, it only gets KV of the loaded weights."""
        was_clean, self._tree_is_clean = self._tree_is_clean, True
        if not was_clean:
            self._unseal()

    def _unseal(self) -> None:
        weights = self.settled
        if storage is not None and storage.model is not None and weights is not None:
            storage.unseal(weights.name(storage.model))


enabled = False
"""Whether the server was started with the tier. This is equal on all ranks, even where the tier is
off."""

storage: AttachedStorage | None = None
"""The storage; None while the tier is off in this process."""

all_storages: "weakref.WeakSet[AttachedStorage]" = weakref.WeakSet()
"""All storages of this process, for the fork handler."""

weight_updates = WeightUpdates()

device_pools: dict[str, tuple[Any, ...]] = {}
"""Device pool and the draft pools packed into its pages, by the name of the host pool."""

tree: "weakref.ref[Any] | None" = None
"""SGLang's radix tree."""

adapter_digests: dict[str, str] = {}
"""Digests of the LoRA adapters' content, by adapter id."""

unfinished_clears: set[bytes] = set()
"""Namespaces that were not cleared yet when the storage was detached. The next attachment resumes.
"""


def server_seed() -> int:
    """Return a number that all ranks of this server share, and by default no other server.

    It is SGLang's random seed, which is random unless the server was started with one.
    """
    from sglang.srt.arg_groups.overrides import resolution_result
    from sglang.srt.runtime_context import get_server_args

    return int(resolution_result(get_server_args(), "random_seed") or 0)


def write_policy() -> str:
    """Return when SGLang copies pages from the device to the host pool."""
    from sglang.srt.runtime_context import get_memory

    return str(get_memory().hicache_write_policy)


def wanted() -> bool:
    """Return whether this server should have the tier. Works before there is a storage."""
    from sglang.srt.runtime_context import get_memory

    return uses_memkv(get_memory())

"""State of this plugin in one scheduler process: every module global is here.

Hooks find the storage here because SGLang passes them no reference to it, and may wrap it.
"""

import weakref
from typing import Any, NamedTuple, Protocol

from memkv_sglang.plugin.launch import uses_memkv
from memkv_sglang.plugin.namespaces import ModelIdentity
from memkv_sglang.plugin.traffic import Traffic


class AttachedStorage(Protocol):
    """The parts of `MemKVStorage` that the hooks use."""

    traffic: Traffic

    @property
    def model(self) -> ModelIdentity | None:
        """Identity of the model whose pages these are; None while the tier is off."""

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
    """Fingerprint of the files they came from; empty for the files that the server was started
    with.
    """
    revision: str = ""
    """A unique name for weights that did not come from files."""

    def name(self, model: ModelIdentity) -> ModelIdentity:
        """Return the model's identity when it runs with these weights."""
        fingerprint = self.fingerprint or model.fingerprint
        return model._replace(fingerprint=fingerprint, revision=self.revision)


class WeightUpdates:
    """Tracks the weights of this process. Not thread-safe: for the scheduler's thread only."""

    def __init__(self) -> None:
        """Start with the weights that the server was started with."""
        self._in_progress = 0
        """Updates and update sessions that have begun and not ended."""
        self._is_suspended = False
        """Whether SGLang has released device memory and not yet resumed all of it."""
        self.loaded: Weights | None = Weights()
        """None: not known."""
        self._tree_is_clean = True
        """Whether all KV in the radix tree was computed with the loaded weights."""
        self.started_with = ""
        """Model path that the server was started with; empty before the first update."""

    @property
    def settled(self) -> Weights | None:
        """The weights that all KV in the radix tree was computed with; None if uncertain."""
        changing = self._in_progress or self._is_suspended
        return self.loaded if self._tree_is_clean and not changing else None

    def begin(self) -> None:
        """Seal the storage: the weights may change from now on."""
        self._in_progress += 1
        self.loaded = None
        self._tree_is_clean = False
        if storage is not None:
            storage.seal()

    def end(self, weights: Weights | None) -> None:
        """Record the weights that are loaded now.

        Any reset of the tree since `begin` happened after they were loaded.
        """
        self._in_progress -= 1
        self.loaded = weights
        self._unseal()

    def suspend(self) -> None:
        """Seal the storage: SGLang is about to release device memory."""
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
        """Record that the tree is empty; it only gets KV of the loaded weights from now on."""
        was_clean, self._tree_is_clean = self._tree_is_clean, True
        if not was_clean:
            self._unseal()

    def _unseal(self) -> None:
        weights = self.settled
        if storage is not None and storage.model is not None and weights is not None:
            storage.unseal(weights.name(storage.model))


enabled = False
"""Whether the server was started with the tier: the same on all ranks, even where it is off."""

storage: AttachedStorage | None = None
"""None while the tier is off in this process."""

all_storages: "weakref.WeakSet[AttachedStorage]" = weakref.WeakSet()
"""Every storage of this process, for the fork handler."""

weight_updates = WeightUpdates()

device_pools: dict[str, tuple[Any, ...]] = {}
"""By the host pool's name: its device pool, and the draft pools packed into its pages."""

tree: "weakref.ref[Any] | None" = None
"""SGLang's radix tree."""

adapter_digests: dict[str, str] = {}
"""Content digest of each LoRA adapter by its id."""

unfinished_clears: set[bytes] = set()
"""Namespaces whose removal a detach interrupted; the next attach resumes it."""


def server_seed() -> int:
    """Return a number that all ranks of this server share and other servers do not, by default.

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
    """Return whether this server should have the tier. Works before the storage exists."""
    from sglang.srt.runtime_context import get_memory

    return uses_memkv(get_memory())

"""The storage class that SGLang's HiCache calls; everything else happens in the agent."""

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.load import load_config
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.plugin import running
from memkv_sglang.plugin.hooks import missing_hooks
from memkv_sglang.plugin.namespaces import KV_POOL, ModelIdentity, describe_pool, identify_model
from memkv_sglang.plugin.pools import SharedPool
from memkv_sglang.tiers.base import LoadResult, SpillResult

log = logging.getLogger(__name__)

AGENT_SECONDS = 30.0
"""How long the constructor waits for an agent; a server without one starts all the same."""

LOOKUP_SECONDS = 1.0
"""Budget of a lookup: it runs in SGLang's query thread, which serves one request at a time."""


class MemKVStorage(HiCacheStorage):
    """Names pages to the agent. Calls block, at most 8 s, and never raise.

    A load or spill returns when nobody touches the host pool's pages any more; see
    `AgentClient.load`. What does not work is a miss: lookups find 0 pages, loads and spills fail.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        """Connect to the agent, starting it if there is none. Never raises: other ranks wait."""
        running.enabled = True
        self._config = storage_config
        self._client: AgentClient | None = None
        self._model: ModelIdentity | None = None
        self._pools: dict[str, SharedPool] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._sealed = threading.Event()
        try:
            self._open(dict(storage_config.extra_config or {}).get("memkv") or {})
        except Exception as error:
            self._turn_off(error)
        running.storage = self

    def _open(self, settings: dict[str, Any]) -> None:
        missing = missing_hooks()
        if missing:
            raise RuntimeError(f"this SGLang lacks {', '.join(missing)}; see docs/sglang.md")
        from sglang.srt.runtime_context import get_server_args

        file = settings.get("file")
        config = load_config(
            Path(file) if file else None, os.environ, settings.get("settings") or {}
        )
        self._model = identify_model(get_server_args())
        self._client = AgentClient(config, start=True)
        if not self._client.wait(AGENT_SECONDS):
            log.warning("memkv: no agent yet (%s); trying on", self._client.problem)

    def _turn_off(self, reason: Exception) -> None:
        log.error("memkv: off, the server runs without the tier: %s", reason)
        self.close()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the anchor pool."""
        super().register_mem_pool_host(mem_pool_host)
        self._add_pool(KV_POOL, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take a side pool, or the anchor again."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._add_pool(str(host_pool_name), host_pool)

    def _add_pool(self, name: str, host_pool: Any) -> None:
        if self._client is None or self._model is None or name in self._pools:
            return
        try:
            self._pools[name] = SharedPool(host_pool, self._client)
            self._name_pool(name, self._model)
        except Exception as error:
            self._turn_off(error)

    def _name_pool(self, name: str, model: ModelIdentity) -> None:
        assert self._client is not None
        host_pool = self._pools[name].host_pool
        namespace = describe_pool(name, host_pool, self._config, model)
        self._client.describe(namespace)
        self._namespaces[name] = namespace
        log.info("memkv: pool %s in namespace %s", name, namespace.digest.hex())

    def seal(self) -> None:
        """Answer misses and store nothing from now on: what the weights are is not certain."""
        self._sealed.set()

    def unseal(self, model: ModelIdentity) -> None:
        """Go on under the name of these weights."""
        self._model = model
        try:
            for name in self._pools:
                self._name_pool(name, model)
        except Exception as error:
            self._turn_off(error)
        self._sealed.clear()

    @property
    def model(self) -> ModelIdentity | None:
        """Whose pages these are; None if that is not known, and the tier off."""
        return self._model

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Return how many of the keys, from the first, can be loaded."""
        client, namespace = self._client, self._namespaces.get(KV_POOL)
        if client is None or namespace is None or self._sealed.is_set():
            return 0
        return client.lookup(_chain(namespace, keys), LOOKUP_SECONDS).length

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Fill the pages at `host_indices`, one for each key."""
        client, namespace = self._client, self._namespaces.get(KV_POOL)
        buffers = self._buffers(KV_POOL, keys, host_indices)
        if client is None or namespace is None or not buffers:
            return [False] * len(keys)
        loads = client.load(_chain(namespace, keys), buffers)
        return [load.result is LoadResult.LOADED for load in loads]

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Store the pages at `host_indices`, one for each key."""
        client, namespace = self._client, self._namespaces.get(KV_POOL)
        buffers = self._buffers(KV_POOL, keys, host_indices)
        if client is None or namespace is None or not buffers:
            return [False] * len(keys)
        before = getattr(extra_info, "prefix_keys", None) or []
        parent = bytes.fromhex(before[-1]) if before else b""
        results = client.spill(_chain(namespace, keys), buffers, parent)
        return [result <= SpillResult.PRESENT for result in results]

    def _buffers(self, pool: str, keys: Sequence[str], indices: Any) -> list[list[Buffer]]:
        """Return where the pages lie; nothing while the storage is sealed or off."""
        shared = self._pools.get(pool)
        if shared is None or not keys or self._sealed.is_set():
            return []
        try:
            return shared.buffers(indices, len(keys))
        except Exception as error:
            self._turn_off(error)
            return []

    def clear(self) -> None:
        """Remove what this server's namespaces hold, on this node and in the shared tier."""
        client = self._client
        for namespace in list(self._namespaces.values()):
            if client is not None:
                client.clear(namespace.digest)

    def close(self) -> None:
        """Let go of the agent, which stays; idempotent."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        if running.storage is self:
            running.storage = None

    def exists(self, key: str) -> bool:
        """Tell whether a page can be loaded."""
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        """Miss: the copying interface is not served, see `batch_get_v1`."""
        return

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Refuse likewise."""
        return False

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[None]:
        """Miss likewise."""
        return [None] * len(keys)

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Refuse likewise."""
        return False


def _chain(namespace: Namespace, keys: Sequence[str]) -> Chain:
    return Chain(namespace.digest, [bytes.fromhex(key) for key in keys])

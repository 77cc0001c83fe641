"""A server's host pools, with the namespaces of their pages."""

import logging
from typing import Any, NamedTuple

from memkv_sglang.client.client import AgentClient
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain
from memkv_sglang.plugin import state
from memkv_sglang.plugin.namespaces import (
    KV_POOL,
    ModelIdentity,
    describe_pool,
    differs_by_rank,
)
from memkv_sglang.plugin.pools import (
    Pool,
    SharedPool,
    UnsuitablePoolError,
    is_logical,
    is_shared,
)
from memkv_sglang.plugin.staging import StagedPool, Staging

log = logging.getLogger(__name__)


class RegisteredPool(NamedTuple):
    """A pool and the namespace of its pages."""

    pool: Pool | None
    """The pool; None if it has no memory of its own, see `pools.is_logical`."""
    digest: bytes
    """Digest of the namespace."""

    def chain(self, hashes: list[bytes]) -> Chain:
        """Return the chain of these pages in the pool's namespace."""
        return Chain(self.digest, hashes)


class RegisteredPools:
    """The pools by name. The thread that attaches the storage adds them; others only read."""

    def __init__(self, client: AgentClient, config: Any) -> None:
        """Start without pools. `config` is SGLang's `HiCacheStorageConfig`."""
        self._client = client
        self._config = config
        self._staging: Staging | None = None
        self._host_pools: dict[str, Any] = {}
        self._pools: dict[str, RegisteredPool] = {}

    def get(self, name: str) -> RegisteredPool | None:
        """Return a pool; None if SGLang has not registered it."""
        return self._pools.get(name)

    def digests(self) -> list[bytes]:
        """Return the namespaces of all pools."""
        return [registered.digest for registered in list(self._pools.values())]

    def add(self, name: str, host_pool: Any, model: ModelIdentity) -> None:
        """Let the agent map a pool, unless it already has. Raises `UnsuitablePoolError`."""
        if name in self._pools:
            return
        try:
            pool = None if is_logical(host_pool) else self._map(host_pool)
            self._host_pools[name] = host_pool
            self._pools[name] = RegisteredPool(pool, self._describe(name, pool, model))
        except UnsuitablePoolError as error:
            raise UnsuitablePoolError(f"pool {name}: {error}") from error

    def rename(self, model: ModelIdentity) -> None:
        """Continue in the namespaces of this model."""
        for name, registered in list(self._pools.items()):
            digest = self._describe(name, registered.pool, model)
            self._pools[name] = registered._replace(digest=digest)

    def forget(self) -> None:
        """Forget all pools. The staging memory is freed once no call uses it."""
        self._pools.clear()
        self._host_pools.clear()
        self._staging = None

    def differs_by_rank(self, name: str) -> bool:
        """Return whether every rank has to store this pool. See `namespaces.differs_by_rank`."""
        host_pool = self._host_pools.get(name)
        return host_pool is not None and differs_by_rank(name, host_pool, self._config)

    def _device_pools(self, name: str) -> tuple[Any, ...]:
        """Return the pool's device pools and the model's main one. Raises `UnsuitablePoolError`."""
        pools = state.device_pools.get(name)
        if pools is None:
            raise UnsuitablePoolError("its device pool, and so the format of its KV, is not known")
        return pools if name == KV_POOL else (*pools, *state.device_pools.get(KV_POOL, ())[:1])

    def _map(self, host_pool: Any) -> Pool:
        if is_shared(host_pool):
            return SharedPool(host_pool, self._client)
        if self._staging is None:
            self._staging = Staging(self._client)
            log.warning(
                "memkv: the host pool is not in shared memory, which costs one more copy per page; "
                "start the server with --enable-memkv to avoid it"
            )
        return StagedPool(host_pool, self._client, self._staging)

    def _describe(self, name: str, pool: Pool | None, model: ModelIdentity) -> bytes:
        page_bytes = pool.page_bytes if pool is not None else 0
        namespace: Namespace = describe_pool(
            name,
            self._host_pools[name],
            self._device_pools(name),
            page_bytes,
            self._config,
            model,
        )
        if pool is not None:
            self._client.describe(namespace)
            log.info("memkv: pool %s in namespace %s", name, namespace.digest.hex())
        return namespace.digest

"""The storage backend that SGLang's HiCache calls. The agent does all I/O."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from memkv_sglang.agent.log import log_as_json
from memkv_sglang.client.client import AgentClient
from memkv_sglang.client.withheld import withheld
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.engine.served import ServedRequest
from memkv_sglang.plugin import events, hooks, state
from memkv_sglang.plugin.attachment import (
    UnsuitableServerError,
    check_server,
    check_version,
    read_config,
    wait_for_agent,
)
from memkv_sglang.plugin.clearing import Clearing
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.hash_extension import load_page_hash
from memkv_sglang.plugin.hits import intersect, whole_prefix
from memkv_sglang.plugin.namespaces import KV_POOL, ModelIdentity, identify_model
from memkv_sglang.plugin.pools import Pool, UnsuitablePoolError, start_deadline
from memkv_sglang.plugin.prefill import PrefillSpeed
from memkv_sglang.plugin.registered import RegisteredPool, RegisteredPools
from memkv_sglang.plugin.side_pools import ALL_PAGES, Search
from memkv_sglang.plugin.sizing import check_host_pool
from memkv_sglang.plugin.traffic import Traffic
from memkv_sglang.plugin.weights import identify_loaded
from memkv_sglang.tiers.base import LoadResult, SpillResult

log = logging.getLogger(__name__)

LOOKUP_SECONDS = 1.0
"""Seconds for a lookup, unless `engine.lookup_budget` is longer. SGLang's query thread serves one
request at a time, in the background."""

EXPECTED = (ConfigError, NoFingerprintError, UnsuitablePoolError, UnsuitableServerError)
"""Errors whose message says what to do, so that no traceback is logged."""

T = TypeVar("T")


class MemKVStorage(HiCacheStorage):
    """Looks up, loads and spills pages through the agent. Calls block at most 10 s; none raises.

    Every failure is a miss: lookups find 0 pages, loads and spills fail. A model needs all its
    pools, so a pool that cannot be mapped turns the storage off. If a killed agent may still write
    to the pages of a failed load, SGLang gets them back later (`storage_hooks.release`).

    The storage belongs to the process that created it. It is off in a forked child and cannot be
    pickled.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        """Connect to the agent; start one if necessary. Never raises, because other ranks wait."""
        state.enabled = True
        self._counts_savings = storage_config.tp_rank == storage_config.pp_rank == 0
        """Whether this rank counts what loads save. Only one does: all load the same tokens."""
        self.traffic = Traffic(
            metrics=storage_config.enable_storage_metrics, count_requests=self._counts_savings
        )
        self._prefill = PrefillSpeed()
        self._announcer: events.Announcer | None = None
        """Announces KV events; None if SGLang does not publish them."""
        self._config = storage_config
        self._client: AgentClient | None = None
        self._lookup_seconds = LOOKUP_SECONDS
        self._model: ModelIdentity | None = None
        self._off = False
        self._sealed = threading.Event()
        self._spill_lock = threading.Lock()
        state.all_storages.add(self)
        try:
            self._open(dict(storage_config.extra_config or {}))
        except Exception as error:
            self._turn_off(error)

    def _open(self, extra: dict[str, Any]) -> None:
        from sglang.srt.runtime_context import get_server_args

        server_args = get_server_args()
        check_server(extra, server_args)
        config = read_config(extra)
        if config.agent.log_format == "json":
            log_as_json()
        self.traffic.log_requests = config.agent.log_requests
        self._lookup_seconds = max(LOOKUP_SECONDS, config.engine.lookup_budget)
        self._prefill = PrefillSpeed(config.engine.prefill_speed)
        # The agent can start while this thread reads the model.
        self._client = AgentClient(config, start=True)
        self._pools = RegisteredPools(self._client, self._config)
        self._clearing = Clearing(self._client, self._spill_lock)
        self._model = identify_loaded(identify_model(server_args, config.engine.namespace_salt))
        if events.are_published():
            self._announcer = events.Announcer(self._client, events.tiers_of(config))
        hooks.install_optional_hooks()
        load_page_hash()
        check_version(self._config)
        wait_for_agent(self._client)
        state.storage = self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a MemKVStorage cannot be pickled or copied: it owns connections and memory; make one "
            "in each process"
        )

    def disable_after_fork(self) -> None:
        """Turn the storage off in a forked child. Other threads may have held the locks."""
        self._client = self._announcer = None
        self._spill_lock, self._sealed = threading.Lock(), threading.Event()
        self.traffic = Traffic(metrics=False, count_requests=False)
        if state.storage is self:
            state.storage = None

    def _turn_off(self, reason: Exception) -> None:
        if not self._off:
            self._off = True
            unexpected = not isinstance(reason, EXPECTED)
            log.error(
                "memkv: off, the server runs without the tier: %s", reason, exc_info=unexpected
            )
        self.close()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Let the agent map the anchor pool."""
        super().register_mem_pool_host(mem_pool_host)
        if self._client is not None:
            check_host_pool(mem_pool_host, state.write_policy())
        self._add_pool(KV_POOL, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Let the agent map a side pool. SGLang also passes the anchor pool again."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._add_pool(str(host_pool_name), host_pool)

    def _add_pool(self, name: str, host_pool: Any) -> None:
        model = self._model
        if self._client is not None and model is not None:
            self._safely(lambda: self._pools.add(name, host_pool, model), None)

    def seal(self) -> None:
        """Miss every lookup and drop every spill until `unseal`, as the weights may be changing."""
        self._sealed.set()

    def unseal(self, model: ModelIdentity) -> None:
        """Continue in the namespaces of this model."""
        self._model = model
        if self._client is not None:
            self._safely(lambda: self._pools.rename(model), None)
        self._sealed.clear()

    @property
    def model(self) -> ModelIdentity | None:
        """Identity of the model whose pages these are; None while the tier is off."""
        return self._model

    def differs_by_rank(self, pool: Any) -> bool:
        """Return whether every rank has to store this pool, although the ranks' KV is equal."""
        return self._client is not None and self._pools.differs_by_rank(str(pool))

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Return how many leading keys can be loaded faster than SGLang recomputes them."""
        return self._safely(lambda: self._find(keys, extra_info), 0)

    def _find(self, keys: list[str], extra_info: Any) -> int:
        client, kv = self._client, self._usable(KV_POOL)
        if client is None or kv is None or kv.pool is None:
            return 0  # Without side pools, an anchor pool without memory has nothing to load.
        recompute = self._recompute(kv.pool, len(keys), extra_info)
        chain, request = kv.chain(_hashes(keys)), self.traffic.request_id
        return client.lookup(chain, self._lookup_seconds, recompute, request).length

    def _recompute(self, pool: Pool, pages: int, extra_info: Any) -> Recompute:
        """Return the cost of recomputing one of the `pages` pages that SGLang lacks."""
        return Recompute(self._page_seconds(pool, pages, extra_info), pool.page_bytes)

    def _page_seconds(self, pool: Pool, pages: int, extra_info: Any) -> float:
        """Return the mean time to compute one of `pages` pages, in seconds; 0 if unknown."""
        begin = len(_prefix(extra_info)) * pool.page_tokens
        return self._prefill.seconds(begin, begin + pages * pool.page_tokens) / max(1, pages)

    def _served(self, name: str, pool: Pool, pages: int, extra_info: Any) -> ServedRequest:
        """Return the request that this thread loads for, and what each page of the pool saves."""
        request = self.traffic.request_id
        if name != KV_POOL or not self._counts_savings:
            return ServedRequest(request)
        seconds = self._page_seconds(pool, pages, extra_info)
        return ServedRequest(request, pool.page_tokens, seconds)

    def exists(self, key: str) -> bool:
        """Return whether a page can be loaded."""
        return self.batch_exists([key]) == 1

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> Any:
        """Return each pool's hit, the prefixes that all pools can serve, and their longest."""
        transfers = list(pool_transfers or ())
        find = partial(self._find_v2, keys, transfers, extra_info)
        return self._safely(find, PoolTransferResult.empty())

    def _find_v2(self, keys: list[str], transfers: Sequence[Any], extra_info: Any) -> Any:
        client, kv = self._client, self._usable(KV_POOL)
        sides = [self._usable(transfer.name) for transfer in transfers]
        if client is None or kv is None or None in sides:
            return PoolTransferResult.empty()
        search = Search(client, _hashes(keys), self._lookup_seconds, self.traffic.request_id)
        recompute = self._recompute(kv.pool, len(keys), extra_info) if kv.pool else UNKNOWN
        pages = search.prefix(kv, len(keys), recompute)
        hits, gates = {KV_POOL: pages}, [whole_prefix(pages)]
        asked = [(side, transfer) for side, transfer in zip(sides, transfers, strict=True) if side]
        for side, transfer in asked:
            hit = search.hit(side, transfer, pages)
            if hit is not None:
                hits[transfer.name] = hit.pages
                gates.append(hit)
        restorable = intersect(gates)
        longest = restorable[-1] if restorable else 0
        for side, transfer in asked:
            search.use_window(side, transfer, longest)
        return PoolTransferResult(longest, hits, restorable)

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Fill the pages at `host_indices`, one per key; return whether each was loaded."""
        load = partial(self._load, KV_POOL, keys, host_indices, extra_info, start_deadline())
        return self._safely(load, [False] * len(keys))

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Fill pages of side pools; return for each pool whether each page was loaded."""
        until, results = start_deadline(), {}
        for transfer in transfers:
            keys, indices = transfer.keys or [], transfer.host_indices
            load = partial(self._load, transfer.name, keys, indices, extra_info, until)
            results[transfer.name] = self._safely(load, [False] * len(keys))
        return results

    def _load(
        self, name: str, keys: list[str], indices: Any, extra_info: Any, until: float
    ) -> list[bool]:
        registered = self._usable(name)
        if registered is None or not keys or indices is None:
            return [False] * len(keys)
        pool, chain = registered.pool, registered.chain(_hashes(keys))
        if pool is None:
            return [True] * len(keys)
        served = self._served(name, pool, len(keys), extra_info)
        with self.traffic.load() as moved:
            loads = pool.load(chain, indices, until, served)
            if withheld.pending and not self._can_withhold():
                withheld.wait()
            loaded = [load.result is LoadResult.LOADED for load in loads]
            moved[pool.page_bytes] += sum(loaded)
        if name == KV_POOL:
            self.traffic.record_tiers(loads)
        return loaded

    def _can_withhold(self) -> bool:
        """Return whether the release of a failed load's pages can be delayed.

        With pipeline parallelism, SGLang frees some pages directly instead of through its queues.
        """
        return hooks.can_withhold() and self._config.pp_size == 1

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Store the pages at `host_indices`, one per key; return whether each is stored."""
        spill = partial(self._spill, KV_POOL, keys, host_indices, extra_info, start_deadline())
        return self._safely(spill, [False] * len(keys))

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Store pages of side pools; return for each pool whether each page is stored."""
        until, results = start_deadline(), {}
        for transfer in transfers:
            keys, indices = transfer.keys or [], transfer.host_indices
            # A pool with another policy does not hold the prefix.
            prefix = extra_info if transfer.hit_policy == ALL_PAGES else None
            spill = partial(self._spill, transfer.name, keys, indices, prefix, until)
            results[transfer.name] = self._safely(spill, [False] * len(keys))
        return results

    def _spill(
        self, name: str, keys: list[str], indices: Any, extra_info: Any, until: float
    ) -> list[bool]:
        with self._spill_lock:
            registered = self._usable(name)
            if registered is None or not keys or indices is None:
                return [False] * len(keys)
            pool, chain = registered.pool, registered.chain(_hashes(keys))
            if pool is None:
                return [True] * len(keys)
            prefix = _hashes(_prefix(extra_info))
            with self.traffic.spill() as moved:
                results = pool.spill(chain, indices, prefix, until)
                moved[pool.page_bytes] += results.count(SpillResult.STORED)
        return [result <= SpillResult.PRESENT for result in results]

    def _usable(self, name: str) -> RegisteredPool | None:
        """Return a pool; None if unknown, or if the storage is sealed or its pages are cleared."""
        if self._client is None or self._sealed.is_set():
            return None
        registered = self._pools.get(str(name))
        if registered is None or registered.digest in self._clearing:
            return None
        return registered

    def _safely(self, call: Callable[[], T], fallback: T) -> T:
        try:
            return call()
        except Exception as error:
            self._turn_off(error)
            return fallback

    def record_backup(self, operation: Any, page_size: int) -> None:
        """Announce the pages of a backup in SGLang's KV events."""
        announcer, kv = self._announcer, self._usable(KV_POOL)
        if announcer is not None and kv is not None and kv.pool is not None:
            blocks = partial(events.blocks_of, operation, page_size)
            announcer.stored(kv.digest, self._safely(blocks, []))

    def record_batch(self, batch: Any) -> None:
        """Learn this server's prefill speed from a finished batch."""
        self._safely(lambda: self._prefill.observe(batch), None)

    def take_events(self) -> list[Any]:
        """Return the KV events of the tiers since the last call."""
        announcer = self._announcer
        return announcer.take() if announcer is not None else []

    def get_stats(self) -> Any:
        """Return SGLang's `StorageMetrics` of the transfers since the last call. Does no I/O."""
        return self.traffic.take()

    def clear(self) -> None:
        """Treat everything stored so far as missing on this node; other nodes keep their pages.

        Returns at once. Lookups miss and spills fail until the agent has removed the server's pages
        from the disk and recorded that those in the shared tier are hidden. Then the server
        continues in the same namespaces, and finds what any node stores from then on.
        """
        if self._client is None:
            return
        self._clearing.begin(self._pools.digests())
        if self._announcer is not None:
            self._announcer.cleared()

    def close(self) -> None:
        """Disconnect from the agent, which keeps running and unmaps the pools. Idempotent."""
        client, self._client = self._client, None
        if state.storage is self:
            state.storage = None
        if client is None:
            return
        if self._announcer is not None:
            self._announcer.close()
        self._clearing.close()
        client.close()
        self._pools.forget()

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        """Return a miss. Only the zero-copy interface is supported; see `batch_get_v1`."""
        return

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Refuse the page. Only the zero-copy interface is supported; see `batch_set_v1`."""
        return False

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[None]:
        """Return misses. Only the zero-copy interface is supported; see `batch_get_v1`."""
        return [None] * len(keys)

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Refuse the pages. Only the zero-copy interface is supported; see `batch_set_v1`."""
        return False


def _disable_after_fork() -> None:
    for storage in list(state.all_storages):
        storage.disable_after_fork()


os.register_at_fork(after_in_child=_disable_after_fork)


def _prefix(extra_info: Any) -> Sequence[str]:
    """Return the hashes of the pages that precede those of a call."""
    return getattr(extra_info, "prefix_keys", None) or []


def _hashes(keys: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(key) for key in keys]

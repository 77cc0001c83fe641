"""The storage class that SGLang's HiCache calls; everything else happens in the agent."""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from memkv_sglang.client.client import AgentClient
from memkv_sglang.client.withheld import withheld
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.plugin import events, observers
from memkv_sglang.plugin import state as running
from memkv_sglang.plugin.attachment import (
    UnsuitableServerError,
    check_server,
    load_page_hash,
    read_config,
    wait_for_agent,
)
from memkv_sglang.plugin.clearing import Clearing
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.hits import intersect, whole_prefix
from memkv_sglang.plugin.namespaces import KV_POOL, ModelIdentity, identify_model
from memkv_sglang.plugin.pools import Pool, UnsuitablePoolError, begin_until
from memkv_sglang.plugin.prefill import PrefillSpeed
from memkv_sglang.plugin.registered import RegisteredPool, RegisteredPools
from memkv_sglang.plugin.side_pools import ALL_PAGES, Search
from memkv_sglang.plugin.traffic import Traffic
from memkv_sglang.plugin.weights import identify_loaded
from memkv_sglang.tiers.base import LoadResult, SpillResult

log = logging.getLogger(__name__)

LOOKUP_SECONDS = 1.0
"""Budget of a lookup: it runs in SGLang's query thread, which serves one request at a time."""

EXPECTED = (ConfigError, NoFingerprintError, UnsuitablePoolError, UnsuitableServerError)
"""Reasons to be off that say what to do."""

T = TypeVar("T")


class MemKVStorage(HiCacheStorage):
    """Names pages to the agent. Calls block, at most 10 s, and never raise.

    What does not work is a miss: lookups find 0 pages, loads and spills fail. A model needs all of
    its pools: one that cannot be reached turns the storage off. If a killed agent may still write
    to pages of a failed load (`AgentClient.load`), SGLang gets these back later (`releases`).

    Belongs to the process that made it: in a forked child it is off, and it cannot be pickled.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        """Connect to the agent, starting it if there is none. Never raises: other ranks wait."""
        running.enabled = True
        self.traffic = Traffic(
            metrics=storage_config.enable_storage_metrics,
            count_requests=storage_config.tp_rank == storage_config.pp_rank == 0,
        )
        self._prefill = PrefillSpeed()
        self.announcer: events.Announcer | None = None
        """None where SGLang publishes no events."""
        self._config = storage_config
        self._client: AgentClient | None = None
        self._model: ModelIdentity | None = None
        self._off = False
        self._sealed = threading.Event()
        self._spilling = threading.Lock()
        _storages.add(self)
        try:
            self._open(dict(storage_config.extra_config or {}))
        except Exception as error:
            self._turn_off(error)

    def _open(self, extra: dict[str, Any]) -> None:
        from sglang.srt.runtime_context import get_server_args

        server_args = get_server_args()
        check_server(extra, server_args)
        config = read_config(extra)
        self._prefill = PrefillSpeed(config.engine.prefill_speed)
        # The agent starts while the model is read.
        self._client = AgentClient(config, start=True)
        self._pools = RegisteredPools(self._client, self._config)
        self._clearing = Clearing(self._client, self._spilling)
        self._model = identify_loaded(identify_model(server_args))
        if events.are_wanted():
            self.announcer = events.Announcer(self._client, events.tiers_of(config))
        observers.install()
        load_page_hash()
        wait_for_agent(self._client)
        running.storage = self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a MemKVStorage cannot be pickled or copied: it owns connections and memory; make one "
            "in each process"
        )

    def leave_to_parent(self) -> None:
        """Be off in a forked child, where other threads may have held any of the locks."""
        self._client = self.announcer = None
        self._spilling, self._sealed = threading.Lock(), threading.Event()
        self.traffic = Traffic(metrics=False, count_requests=False)
        if running.storage is self:
            running.storage = None

    def _turn_off(self, reason: Exception) -> None:
        if not self._off:
            self._off = True
            defect = not isinstance(reason, EXPECTED)
            log.error("memkv: off, the server runs without the tier: %s", reason, exc_info=defect)
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
        model = self._model
        if self._client is not None and model is not None:
            self._safely(lambda: self._pools.add(name, host_pool, model), None)

    def seal(self) -> None:
        """Answer misses and store nothing from now on: what the weights are is not certain."""
        self._sealed.set()

    def unseal(self, model: ModelIdentity) -> None:
        """Go on under the name of these weights."""
        self._model = model
        if self._client is not None:
            self._safely(lambda: self._pools.rename(model), None)
        self._sealed.clear()

    @property
    def model(self) -> ModelIdentity | None:
        """Whose pages these are; None if that is not known, and the tier off."""
        return self._model

    def differs_by_rank(self, pool: Any) -> bool:
        """Tell whether each rank has to store this pool, although their KV is equal."""
        return self._client is not None and self._pools.differs_by_rank(str(pool))

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Return how many of the keys, from the first, can be loaded, and pay to be."""
        return self._safely(lambda: self._find(keys, extra_info), 0)

    def _find(self, keys: list[str], extra_info: Any) -> int:
        client, kv = self._client, self._usable(KV_POOL)
        if client is None or kv is None or kv.pool is None:
            return 0  # an anchor without memory stands for nothing if no side pool is asked
        recompute = self._recompute(kv.pool, len(keys), extra_info)
        return client.lookup(kv.chain(_hashes(keys)), LOOKUP_SECONDS, recompute).length

    def _recompute(self, pool: Pool, pages: int, extra_info: Any) -> Recompute:
        """Return what a page costs to compute, of so many that SGLang does not have."""
        begin = len(_before(extra_info)) * pool.page_tokens
        seconds = self._prefill.seconds(begin, begin + pages * pool.page_tokens)
        return Recompute(seconds / max(1, pages), pool.page_bytes)

    def exists(self, key: str) -> bool:
        """Tell whether a page can be loaded."""
        return self.batch_exists([key]) == 1

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> Any:
        """Return how many pages every pool can serve, and which shorter prefixes."""
        transfers = list(pool_transfers or ())
        find = partial(self._find_v2, keys, transfers, extra_info)
        return self._safely(find, PoolTransferResult.empty())

    def _find_v2(self, keys: list[str], transfers: Sequence[Any], extra_info: Any) -> Any:
        client, kv = self._client, self._usable(KV_POOL)
        sides = [self._usable(transfer.name) for transfer in transfers]
        if client is None or kv is None or None in sides:
            return PoolTransferResult.empty()
        search = Search(client, _hashes(keys), LOOKUP_SECONDS)
        recompute = self._recompute(kv.pool, len(keys), extra_info) if kv.pool else UNKNOWN
        pages = search.prefix(kv, len(keys), recompute)
        hits, gates = {KV_POOL: pages}, [whole_prefix(pages)]
        asked = [(side, transfer) for side, transfer in zip(sides, transfers, strict=True) if side]
        for side, transfer in asked:
            hit = search.ask(side, transfer, pages)
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
        """Fill the pages at `host_indices`, one for each key."""
        load = partial(self._load, KV_POOL, keys, host_indices, begin_until())
        return self._safely(load, [False] * len(keys))

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Fill pages of side pools, likewise."""
        until, results = begin_until(), {}
        for transfer in transfers:
            keys, indices = transfer.keys or [], transfer.host_indices
            load = partial(self._load, transfer.name, keys, indices, until)
            results[transfer.name] = self._safely(load, [False] * len(keys))
        return results

    def _load(self, name: str, keys: list[str], indices: Any, until: float) -> list[bool]:
        registered = self._usable(name)
        if registered is None or not keys or indices is None:
            return [False] * len(keys)
        if registered.pool is None:
            return [True] * len(keys)
        with self.traffic.load() as moved:
            loads = registered.pool.load(registered.chain(_hashes(keys)), indices, until)
            if withheld.pending and not self._can_withhold():
                withheld.wait()
            loaded = [load.result is LoadResult.LOADED for load in loads]
            moved[registered.pool.page_bytes] += sum(loaded)
        if name == KV_POOL:
            self.traffic.came_from(loads)
        return loaded

    def _can_withhold(self) -> bool:
        """Tell whether SGLang can do without the pages of a failed load for a while.

        With pipeline parallelism it frees some at once, not through its queues.
        """
        return observers.can_withhold() and self._config.pp_size == 1

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Store the pages at `host_indices`, one for each key."""
        spill = partial(self._spill, KV_POOL, keys, host_indices, extra_info, begin_until())
        return self._safely(spill, [False] * len(keys))

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Store pages of side pools, likewise."""
        until, results = begin_until(), {}
        for transfer in transfers:
            keys, indices = transfer.keys or [], transfer.host_indices
            # Other pools do not hold what comes before.
            before = extra_info if transfer.hit_policy == ALL_PAGES else None
            spill = partial(self._spill, transfer.name, keys, indices, before, until)
            results[transfer.name] = self._safely(spill, [False] * len(keys))
        return results

    def _spill(
        self, name: str, keys: list[str], indices: Any, extra_info: Any, until: float
    ) -> list[bool]:
        with self._spilling:
            registered = self._usable(name)
            if registered is None or not keys or indices is None:
                return [False] * len(keys)
            pool, chain = registered.pool, registered.chain(_hashes(keys))
            if pool is None:
                return [True] * len(keys)
            before = _hashes(_before(extra_info))
            with self.traffic.spill() as moved:
                results = pool.spill(chain, indices, before, until)
                moved[pool.page_bytes] += results.count(SpillResult.STORED)
        return [result <= SpillResult.PRESENT for result in results]

    def _usable(self, name: str) -> RegisteredPool | None:
        """Return a pool; None while it is not certain what its pages are, or none may be found."""
        if self._client is None or self._sealed.is_set():
            return None
        registered = self._pools.get(str(name))
        if registered is None or registered.digest in self._clearing:
            return None
        return registered

    def _safely(self, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except Exception as error:
            self._turn_off(error)
            return otherwise

    def backed_up(self, operation: Any, page_size: int) -> None:
        """Take note of a node of SGLang's tree that has been stored, for its events."""
        announcer, kv = self.announcer, self._usable(KV_POOL)
        if announcer is not None and kv is not None and kv.pool is not None:
            blocks = partial(events.blocks_of, operation, page_size)
            announcer.stored(kv.digest, self._safely(blocks, []))

    def computed(self, batch: Any) -> None:
        """Take note of a batch that SGLang has run, for what loads have to compete with."""
        self._safely(lambda: self._prefill.observe(batch), None)

    def get_stats(self) -> Any:
        """Return what has been moved since the last call; no I/O."""
        return self.traffic.take()

    def clear(self) -> None:
        """Find none of this server's pages any more, from the return on; they are removed behind.

        Removes what the server's namespaces hold on this node and in the shared tier. Until that
        is done lookups miss and spills fail; then the server goes on in the same namespaces, so
        that it shares with other servers what these store from then on.
        """
        if self._client is None:
            return
        self._clearing.begin(self._pools.digests())
        if self.announcer is not None:
            self.announcer.cleared()

    def close(self) -> None:
        """Let go of the agent, which stays, and forgets the pools; idempotent."""
        client, self._client = self._client, None
        if running.storage is self:
            running.storage = None
        if client is None:
            return
        if self.announcer is not None:
            self.announcer.close()
        self._clearing.close()
        client.close()
        self._pools.forget()

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


_storages: "weakref.WeakSet[MemKVStorage]" = weakref.WeakSet()


def _leave_to_parent() -> None:
    for storage in list(_storages):
        storage.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)


def _before(extra_info: Any) -> Sequence[str]:
    """Return the hashes of what comes before the pages in question."""
    return getattr(extra_info, "prefix_keys", None) or []


def _hashes(keys: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(key) for key in keys]

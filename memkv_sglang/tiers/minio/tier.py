"""The MinIO tier: transfers, search and knowledge put together under the tier contract."""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec

from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.metrics import Metrics
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    LoadResult,
    Lookup,
    SpillResult,
    Tier,
    TierError,
    TierUsage,
)
from memkv_sglang.tiers.minio.batch import Guard, Movers
from memkv_sglang.tiers.minio.bucket import Bucket
from memkv_sglang.tiers.minio.bulk.reader import BulkReader
from memkv_sglang.tiers.minio.client import ObjectClient
from memkv_sglang.tiers.minio.collector import Collector, Lease
from memkv_sglang.tiers.minio.collector.worker import CollectorWorker
from memkv_sglang.tiers.minio.credentials_file import read_credentials
from memkv_sglang.tiers.minio.endpoints import parse_endpoints
from memkv_sglang.tiers.minio.errors import OutOfTimeError, StatusError, TransferError
from memkv_sglang.tiers.minio.forms import page_form
from memkv_sglang.tiers.minio.knowledge import Knowledge
from memkv_sglang.tiers.minio.noted import NotedPages
from memkv_sglang.tiers.minio.objects import ObjectNames, server_side_encryption
from memkv_sglang.tiers.minio.opening import Opening
from memkv_sglang.tiers.minio.pins import PinStore
from memkv_sglang.tiers.minio.pool import ConnectionPool
from memkv_sglang.tiers.minio.records import Records
from memkv_sglang.tiers.minio.search import best_width, longest_prefix
from memkv_sglang.tiers.minio.signing import Signer, credential_provider
from memkv_sglang.tiers.minio.telemetry import (
    LOAD_FAILED,
    LOOKUP_FAILED,
    SPILL_FAILED,
    Telemetry,
)
from memkv_sglang.tiers.minio.tls import tls_context
from memkv_sglang.tiers.minio.touch import DELAY, Toucher
from memkv_sglang.tiers.minio.transfers import PageTransfers

OPENING_TIME = 8.0
"""Seconds that calls of the control path, which have no deadline of their own, wait at first."""

CONTROL_TIME = 60.0
"""Seconds for asking which of the pages to be removed are there."""

Result = TypeVar("Result")


class ControlPath(NamedTuple):
    """What lists, collects and pins need. The tier closes it."""

    bucket: Bucket
    records: Records
    names: ObjectNames


class _Opened(NamedTuple):
    bucket: Bucket
    client: ObjectClient
    transfers: PageTransfers


class MinioTier(Tier):
    """Pages as objects of a bucket that any number of nodes share.

    What this node knows of the bucket may be out of date; `load` finds out. Lookups move nothing in
    the order in which pages leave: `note_use` does, and nothing leaves but by `keep_limits`.
    """

    name = "minio"

    def __init__(self, config: MinioConfig) -> None:
        """Begin to open the bucket in the background; raises `ConfigError` for bad settings."""
        endpoints = parse_endpoints(config)
        self._config = config
        self._read_only = config.role == "reader"
        self._context = tls_context(config)
        self._form = page_form(config.encryption_key_file)
        if config.credentials_file:
            read_credentials(config.credentials_file)  # to say now what is wrong with it
        self._names = ObjectNames(config.prefix)
        self._knowledge = Knowledge(config.known_pages, config.missing_ttl)
        self.telemetry = Telemetry()
        self._movers = Movers(config.connections)
        self._pool = ConnectionPool(
            endpoints,
            context=self._context,
            connect_timeout=config.connect_timeout,
            stall_timeout=config.stall_timeout,
            keep=2 * config.connections,
        )
        self._bulk = BulkReader(self._pool, connections=config.connections)
        self._limit: int | None = None
        self._noted: NotedPages | None = None
        self._toucher: Toucher | None = None
        self._collector: CollectorWorker | None = None
        self._opening = Opening(self._open, lambda opened: opened.bucket.close())

    def check(self, deadline: float) -> None:
        """Return once the bucket is there and may be used; raises `ConfigError`, `TierError`."""
        try:
            self._opening.outcome(deadline)
        except OutOfTimeError as error:
            raise TierError(str(error)) from error

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Bound the answer by what is known, then search with several HEAD requests a round."""
        low, high = self._knowledge.bounds(chain)

        def probe(positions: Sequence[int]) -> list[bool] | None:
            try:
                return self._ask(
                    [PageKey(chain.namespace, chain.hashes[i]) for i in positions], deadline
                )
            except OutOfTimeError:
                return None

        width = best_width(high - low, self._pool.round_trip)
        found, bound = longest_prefix(low, high, probe, width)
        self._knowledge.add_chain(Chain(chain.namespace, chain.hashes[low:found]))
        if found == bound < high:
            # What was seen behind a page that is not there is not there any more either.
            absent = [PageKey(chain.namespace, h) for h in chain.hashes[found:]]
            self._knowledge.discard(*absent)
            self._knowledge.add_missing(absent[0])
        return Lookup(found, complete=found == bound)

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Ask for the pages that are not known to be present."""
        unknown = [key for key in dict.fromkeys(keys) if not self._knowledge.has(key)]
        try:
            found = dict(zip(unknown, self._ask(unknown, deadline), strict=True))
        except OutOfTimeError as error:
            raise TierError(str(error)) from error
        self._knowledge.add(key for key, there in found.items() if there)
        return [found.get(key, True) for key in keys]

    def load(self, pages: Sequence[Page], deadline: float) -> list[LoadResult]:
        """Receive each page straight into its buffers.

        All at once first, in a loop for what is as it should be; then one by one what was not.
        """
        results = self._load(pages, deadline)
        self._knowledge.add(
            page.key
            for page, result in zip(pages, results, strict=True)
            if result == LoadResult.LOADED
        )
        if LoadResult.LOADED in results:
            self.telemetry.over(LOAD_FAILED)
        if LoadResult.MISSING in results:  # then those behind it, which were not begun, are, too
            skipped = [p.key for p, r in zip(pages, results, strict=True) if r is None]
            self._knowledge.discard(*skipped)
        return [LoadResult.SKIPPED if result is None else result for result in results]

    def _load(self, pages: Sequence[Page], deadline: float) -> list[LoadResult | None]:
        transfers = self._transfers(deadline) if pages else None
        if transfers is None:
            return _stopped(LoadResult.FAILED, len(pages))
        loaded, faults, failure = transfers.fetch_all(pages, deadline)
        rest = [i for i, there in enumerate(loaded) if not there]
        if failure is None:
            moved = self._move_all(
                partial(transfers.fetch, seen=faults),
                [pages[i] for i in rest],
                deadline,
                done=LoadResult.LOADED,
                failed=LoadResult.FAILED,
            )
        else:
            self.telemetry.fault(LOAD_FAILED, failure)
            moved = _stopped(LoadResult.FAILED, len(rest))
        results: list[LoadResult | None] = [LoadResult.LOADED] * len(pages)
        for index, result in zip(rest, moved, strict=True):
            results[index] = result
        return results

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Send each page that is not known to be present straight from its buffers.

        Several are on their way at once: where one fails, a few behind it may yet be stored.
        """
        if self._read_only:
            return [SpillResult.REFUSED] * len(pages)
        unknown = [i for i, page in enumerate(pages) if not self._knowledge.has(page.key)]
        transfers = self._transfers(deadline) if unknown else None
        moved = (
            _stopped(SpillResult.FAILED, len(unknown))
            if transfers is None
            else self._move_all(
                transfers.store,
                [pages[i] for i in unknown],
                deadline,
                done=SpillResult.STORED,
                failed=SpillResult.FAILED,
            )
        )
        if SpillResult.STORED in moved:
            self.telemetry.over(SPILL_FAILED)
        results = [SpillResult.PRESENT] * len(pages)
        for index, result in zip(unknown, moved, strict=True):
            results[index] = SpillResult.FAILED if result is None else result
        return results

    def touch(self, chain: Chain) -> None:
        """There is nothing to do: see `note_use`."""

    def doubt(self, keys: Sequence[PageKey]) -> None:
        """Forget that they were seen."""
        self._knowledge.discard(*keys)

    def remove(self, keys: Sequence[PageKey]) -> int:
        """Ask which are there, remove them through the control path."""
        self._demand_writer()
        self._knowledge.discard(*keys)
        deadline = time.monotonic() + CONTROL_TIME
        asked = list(dict.fromkeys(keys))
        present = self.present(asked, deadline)
        there = [key for key, found in zip(asked, present, strict=True) if found]
        self._bucket().remove(self._names.page(key) for key in there)
        self._knowledge.discard(*there)
        return len(there)

    def describe(self, namespace: Namespace) -> None:
        """Store the description as an object beside the namespace's pages; a reader does not."""
        if not self._read_only:
            self._bucket().write(self._names.description(namespace.digest), namespace.description)

    def namespaces(self) -> dict[bytes, Namespace]:
        """List the prefixes, read their descriptions; what is not one is left out."""
        bucket, found = self._bucket(), {}
        for name in bucket.names(self._names.root, recursive=False):
            digest = _digest(name.removeprefix(self._names.root))
            content = bucket.read(self._names.description(digest)) if digest else None
            namespace = _parse(content) if content else None
            if namespace and namespace.digest == digest:
                found[digest] = namespace
        return found

    def clear(self, namespace: bytes) -> int:
        """List the namespace's objects and remove them, its description too; a reader does not."""
        if self._read_only:
            return 0
        bucket = self._bucket()
        names = bucket.names(self._names.namespace(namespace), recursive=True)
        bucket.remove(names)
        self._knowledge.forget(namespace)
        return sum(name != self._names.description(namespace) for name in names)

    def keep_limits(
        self, config: CollectorConfig, metrics: Metrics, *, delay: float = DELAY
    ) -> None:
        """Note uses in the bucket, and collect what is beyond the limits, from now on; call once.

        A use is noted after `delay` seconds. Does nothing for a reader; without limits, nothing is
        collected.
        """
        if self._read_only:
            return
        self._noted = NotedPages(config.use_period)
        self._toucher = Toucher(
            lambda: self._opened(time.monotonic() + OPENING_TIME).client,
            self._config.bucket,
            self._names,
            self._noted,
            self.telemetry,
            delay=delay,
        )
        if config.capacity or config.max_age:
            self._limit = config.capacity or None
            self._collector = CollectorWorker(lambda: self.collector(config), config, metrics)

    def note_use(self, chain: Chain) -> None:
        """Have the present use of a chain's pages, given from its root, noted in the bucket."""
        if self._toucher is not None:
            self._toucher.note_use(chain)

    def collector(self, config: CollectorConfig) -> tuple[Collector, Lease]:
        """Return who removes pages, and the lease to hold meanwhile. Raises `TierError`."""
        self._demand_writer()
        bucket, records, names = self.control()
        collector = Collector(bucket, records, names, config, self._forget)
        return collector, Lease(records, names.lease, config.lease)

    def control(self) -> ControlPath:
        """Return the bucket's control path, once the bucket is open. Raises `TierError`."""
        bucket = self._bucket()
        client, storage_fields = self._opened(0.0).client, server_side_encryption(self._config)
        return ControlPath(bucket, Records(client, storage_fields), self._names)

    def pinned(self) -> frozenset[PageKey]:
        """Read which pages nobody may remove. Raises `TierError`."""
        return PinStore(*self.control()).kept()

    def _forget(self, keys: Sequence[PageKey]) -> None:
        self._knowledge.discard(*keys)

    def usage(self) -> TierUsage:
        """Return what the last collection saw, whichever node made it; zeros before the first."""
        worker = self._collector
        if worker is None or worker.last is None:
            return TierUsage(pages=0, bytes=0, capacity=self._limit)
        return TierUsage(worker.last.pages, worker.last.bytes, self._limit, worker.removed)

    def problem(self) -> str | None:
        """Say what the opening, or else the last calls of a kind, met."""
        opening = self._opening.problem
        return opening if opening is None or opening else self.telemetry.problem()

    def check_integrity(self) -> list[str]:
        """Compare what is known present with what is known missing."""
        return self._knowledge.check_integrity()

    def close(self) -> None:
        """Wait for pages in flight, then close threads and connections.

        Not for the opening: it ends by itself within seconds, and then leaves nothing open.
        """
        self._opening.close()
        if self._collector is not None:
            self._collector.close()
        if self._toucher is not None:
            self._toucher.close()
        self._movers.close()
        self._pool.close()

    def _open(self) -> _Opened:
        provider = credential_provider(self._config)
        bucket = Bucket(self._config, provider, self._context)
        signer = Signer(provider, self._config.region)
        client = ObjectClient(self._pool, signer, self.telemetry, ways=self._config.connections)
        try:
            bucket.ensure()
        except BaseException:
            bucket.close()
            raise
        transfers = PageTransfers(
            client,
            partial(self._bulk.read, signer),
            self._config.bucket,
            self._names,
            self._knowledge,
            self.telemetry,
            self._form,
            server_side_encryption(self._config),
            on_bucket_lost=self._bucket_lost,
            read_only=self._read_only,
            noted=lambda: self._noted,
        )
        return _Opened(bucket, client, transfers)

    def _demand_writer(self) -> None:
        if self._read_only:
            raise TierError("minio.role is `reader`: this node does not change the bucket")

    def _bucket_lost(self) -> None:
        self._opening.again()

    def _opened(self, deadline: float) -> _Opened:
        try:
            return self._opening.outcome(deadline)
        except (TierError, OutOfTimeError):
            raise
        except Exception as error:
            raise TierError(str(error)) from error

    def _bucket(self) -> Bucket:
        try:
            return self._opened(time.monotonic() + OPENING_TIME).bucket
        except OutOfTimeError as error:
            raise TierError(str(error)) from error

    def _ask(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Ask the server for pages; raises `TierError`, `OutOfTimeError`."""
        if not keys:
            return []
        client = self._opened(deadline).client
        names = [self._names.page(key) for key in keys]
        try:
            found = client.exist(names, deadline)
        except OutOfTimeError as error:
            self.telemetry.fault(LOOKUP_FAILED, error)
            raise
        except (TransferError, StatusError) as error:
            self.telemetry.fault(LOOKUP_FAILED, error)
            raise TierError(f"MinIO does not answer: {error}") from error
        self.telemetry.over(LOOKUP_FAILED)
        return found

    def _transfers(self, deadline: float) -> PageTransfers | None:
        """Return what moves pages, None if it cannot be had in time."""
        try:
            return self._opened(deadline).transfers
        except (TierError, OutOfTimeError) as error:
            self.telemetry.fault("is not usable", error)
            return None

    def _move_all(
        self,
        move: Callable[[Page, float, Guard], Result],
        pages: Sequence[Page],
        deadline: float,
        *,
        done: Result,
        failed: Result,
    ) -> list[Result | None]:
        """Move pages in order; None for those that were not begun."""
        if not pages:
            return []
        return self._movers.run(
            lambda index, guard: move(pages[index], deadline, guard),
            len(pages),
            deadline,
            goes_on=lambda result: result == done,
            failed=failed,
        )


def _stopped(failed: Result, count: int) -> list[Result | None]:
    """Return the results of pages of which the first failed and no other was begun."""
    return [failed, *[None] * (count - 1)] if count else []


def _digest(name: str) -> bytes | None:
    """Return the namespace digest that a listed prefix names."""
    digits = name.removesuffix("/")
    if name == digits or not re.fullmatch(rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}", digits):
        return None
    return bytes.fromhex(digits)


def _parse(description: bytes) -> Namespace | None:
    try:
        return Namespace.parse(description)
    except msgspec.MsgspecError:
        return None

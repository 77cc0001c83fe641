"""The MinIO tier: transfers, search and knowledge put together under the tier contract."""

import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec

from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.metrics import Metrics
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    Fetched,
    LoadResult,
    Lookup,
    SpillResult,
    Tier,
    TierError,
    TierUsage,
)
from memkv_sglang.tiers.minio.admin import REMOVED_AT_ONCE, Bucket
from memkv_sglang.tiers.minio.auth import Signer, credential_provider, read_credentials
from memkv_sglang.tiers.minio.forms import page_form
from memkv_sglang.tiers.minio.http import (
    BackgroundCall,
    ConnectionPool,
    OutOfTimeError,
    ServerClock,
    StatusError,
    TransferError,
    parse_endpoints,
    tls_context,
)
from memkv_sglang.tiers.minio.names import ObjectNames, is_ours, server_side_encryption
from memkv_sglang.tiers.minio.objects import (
    LOAD_FAILED,
    LOOKUP_FAILED,
    SPILL_FAILED,
    BulkReader,
    Guard,
    ObjectClient,
    Telemetry,
)
from memkv_sglang.tiers.minio.presence_cache import PresenceCache
from memkv_sglang.tiers.minio.retention import (
    DELAY,
    AccessTimeCache,
    AccessTimeUpdater,
    Collector,
    CollectorWorker,
    KeptPages,
    Lease,
    PinStore,
    Records,
)
from memkv_sglang.tiers.minio.search import best_width, longest_prefix
from memkv_sglang.tiers.minio.transfer_pool import TransferPool
from memkv_sglang.tiers.minio.transfers import PageTransfers

log = logging.getLogger(__name__)

OPENING_TIME = 8.0
"""Seconds that calls of the control path, which have no deadline of their own, wait at first."""

CONTROL_TIME = 60.0
"""Seconds for asking which of the pages to be removed are there."""

NAMESPACES_LIMIT = 4096
"""Namespaces whose descriptions are read."""

LARGEST_PAGE = 1 << 30
"""Bytes of a page; a description that tells of more, or of none, is not believed."""

NAMES_SHOWN = 5
"""Objects that a log line names."""

Result = TypeVar("Result")

SKIPPED = Fetched(LoadResult.SKIPPED)


class ControlPath(NamedTuple):
    """What lists, collects and pins need. The tier closes it."""

    bucket: Bucket
    records: Records
    names: ObjectNames


class _Opened(NamedTuple):
    bucket: Bucket
    client: ObjectClient
    control: ObjectClient
    """For small requests that nobody waits for at the end."""
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
        self._knowledge = PresenceCache(config.presence_cache_pages, config.negative_ttl)
        self.telemetry = Telemetry()
        self._movers = TransferPool(config.connections)
        self._pool = ConnectionPool(
            endpoints,
            context=self._context,
            connect_timeout=config.connect_timeout,
            stall_timeout=config.stall_timeout,
            idle_timeout=config.idle_timeout,
            keep=2 * config.connections,
        )
        self._control_pool = ConnectionPool(
            endpoints,
            context=self._context,
            connect_timeout=config.connect_timeout,
            stall_timeout=config.stall_timeout,
            idle_timeout=config.idle_timeout,
            keep=2,
        )
        self._limit: int | None = None
        self._clock = ServerClock()
        self._noted: AccessTimeCache | None = None
        self._toucher: AccessTimeUpdater | None = None
        self._collector: CollectorWorker | None = None
        self._pins: PinStore | None = None
        self._opening = BackgroundCall(self._open, lambda opened: opened.bucket.close())
        self._opening.begin()

    def check(self, deadline: float) -> None:
        """Return once the bucket is there and may be used; raises `ConfigError`, `TierError`."""
        try:
            self._opening.result(deadline)
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

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Receive each page straight into its buffers.

        All at once first, in a loop for what is as it should be; then one by one what was not.
        """
        outcomes = [fetched or SKIPPED for fetched in self._fetch(pages, deadline)]
        self._knowledge.add(
            page.key for page, fetched in zip(pages, outcomes, strict=True) if fetched.checksum
        )
        if any(fetched.checksum for fetched in outcomes):
            self.telemetry.over(LOAD_FAILED)
        if Fetched(LoadResult.MISSING) in outcomes:
            # Pages behind the missing one were not begun and are likely to be missing too.
            skipped = [
                p.key for p, fetched in zip(pages, outcomes, strict=True) if fetched is SKIPPED
            ]
            self._knowledge.discard(*skipped)
        return outcomes

    def _fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched | None]:
        failed = Fetched(LoadResult.FAILED)
        transfers = self._transfers(deadline) if pages else None
        if transfers is None:
            return _stopped(failed, len(pages))
        checksums, faults, failure = transfers.fetch_all(pages, deadline)
        rest = [i for i, checksum in enumerate(checksums) if checksum is None]
        if failure is None:
            moved = self._move_all(
                partial(transfers.fetch, seen=faults),
                [pages[i] for i in rest],
                deadline,
                goes_on=lambda fetched: fetched.result is LoadResult.LOADED,
                failed=failed,
            )
        else:
            self.telemetry.fault(LOAD_FAILED, failure)
            moved = _stopped(failed, len(rest))
        outcomes: list[Fetched | None] = [Fetched(LoadResult.LOADED, c) for c in checksums]
        for index, fetched in zip(rest, moved, strict=True):
            outcomes[index] = fetched
        return outcomes

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
                goes_on=lambda result: result is SpillResult.STORED,
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

    def invalidate(self, keys: Sequence[PageKey]) -> None:
        """Forget that they were seen."""
        self._knowledge.discard(*keys)

    def remove(self, keys: Sequence[PageKey]) -> int:
        """Ask which are there, remove them through the control path."""
        self._demand_writer()
        self._knowledge.discard(*keys)
        removed = self._remove_ours([self._names.page(key) for key in dict.fromkeys(keys)])
        self._knowledge.discard(*keys)
        return removed

    def _remove_ours(self, names: Sequence[str]) -> int:
        """Remove those objects that are there and were stored as pages; return how many."""
        bucket, records, _ = self.control()
        removed = 0
        for first in range(0, len(names), REMOVED_AT_ONCE):
            batch = names[first : first + REMOVED_AT_ONCE]
            heads = records.heads(batch, time.monotonic() + CONTROL_TIME)
            ours = [name for name, head in zip(batch, heads, strict=True) if is_ours(head)]
            bucket.remove(ours)
            removed += len(ours)
        return removed

    def describe(self, namespace: Namespace) -> None:
        """Store the description as an object beside the namespace's pages; a reader does not."""
        if not self._read_only:
            self._bucket().write(self._names.description(namespace.digest), namespace.description)

    def namespaces(self) -> dict[bytes, Namespace]:
        """List the prefixes, read their descriptions; what is not one is left out, with a line."""
        bucket = self._bucket()
        found: dict[bytes, Namespace] = {}
        odd: list[str] = []
        digests = dict.fromkeys(filter(None, map(_digest, bucket.folders(self._names.root))))
        for count, digest in enumerate(digests):
            if count == NAMESPACES_LIMIT:
                odd.append(f"all beyond {NAMESPACES_LIMIT} namespaces")
                break
            name = self._names.description(digest)
            content = bucket.read(name)
            namespace = _parse(content) if content else None
            if namespace and namespace.digest == digest:
                found[digest] = namespace
            elif content is not None:
                odd.append(name)
        if odd:
            self.telemetry.count("odd_descriptions", len(odd))
            fields = {"count": len(odd), "examples": odd[:NAMES_SHOWN]}
            log.warning("no descriptions of namespaces", extra={"fields": fields})
        return found

    def clear(self, namespace: bytes) -> int:
        """List the namespace's pages and remove them, its description too; a reader does not.

        Objects of others that lie among them stay.
        """
        if self._read_only:
            return 0
        bucket = self._bucket()
        prefix = self._names.namespace(namespace)
        names = [item.name for item in bucket.objects(prefix) if self._names.page_key(item.name)]
        removed = self._remove_ours(names)
        bucket.remove([self._names.description(namespace)])
        self._knowledge.forget(namespace)
        return removed

    def keep_limits(
        self, config: CollectorConfig, metrics: Metrics, *, delay: float = DELAY
    ) -> None:
        """Note uses in the bucket, and collect what is beyond the limits, from now on; call once.

        A use is noted after `delay` seconds. Does nothing for a reader; without limits, nothing is
        collected.
        """
        if self._read_only:
            return
        self._noted = AccessTimeCache(config.use_period, self._clock)
        self._toucher = AccessTimeUpdater(
            lambda: self._opened(time.monotonic() + OPENING_TIME).control,
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
        collector = Collector(bucket, records, names, config, self._forget, self.pins())
        return collector, Lease(records, names.lease, config.lease)

    def control(self) -> ControlPath:
        """Return the bucket's control path, once the bucket is open. Raises `TierError`."""
        bucket = self._bucket()
        client, storage_fields = self._opened(0.0).control, server_side_encryption(self._config)
        return ControlPath(bucket, Records(client, storage_fields, self._clock), self._names)

    def pins(self) -> PinStore:
        """Return the bucket's pins, once it is open. Raises `TierError`."""
        control = self.control()
        if self._pins is None:  # two of them, made at once, do no harm
            self._pins = PinStore(*control, count_odd=partial(self.telemetry.count, "odd_pins"))
        return self._pins

    def pinned(self) -> KeptPages:
        """Read which pages nobody may remove. Raises `TierError`."""
        return self.pins().kept()

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

    def close(self, deadline: float = math.inf) -> None:
        """Wait for pages in flight, then close threads and connections.

        Not for the control path: its requests are ended, whatever the server does. An opening
        under way ends by itself within seconds, and then leaves nothing open.
        """
        self._opening.close()
        self._control_pool.break_off()
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
        ways = self._config.connections
        client = ObjectClient(self._pool, signer, self.telemetry, ways=ways)
        control = ObjectClient(self._control_pool, signer, self.telemetry, ways=ways)
        try:
            bucket.ensure()
        except BaseException:
            bucket.close()
            raise
        transfers = PageTransfers(
            client,
            BulkReader(self._pool, signer, self.telemetry, connections=ways),
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
        return _Opened(bucket, client, control, transfers)

    def _demand_writer(self) -> None:
        if self._read_only:
            raise TierError("minio.role is `reader`: this node does not change the bucket")

    def _bucket_lost(self) -> None:
        with suppress(TierError):  # closed meanwhile
            self._opening.begin()

    def _opened(self, deadline: float) -> _Opened:
        try:
            return self._opening.result(deadline)
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
        goes_on: Callable[[Result], bool],
        failed: Result,
    ) -> list[Result | None]:
        """Move pages in order; None for those that were not begun."""
        if not pages:
            return []
        return self._movers.run(
            lambda index, guard: move(pages[index], deadline, guard),
            len(pages),
            deadline,
            goes_on=goes_on,
            failed=failed,
        )


def _stopped(failed: Result, count: int) -> list[Result | None]:
    """Return the results of pages of which the first failed and no other was begun."""
    return [failed, *[None] * (count - 1)] if count else []


def _digest(folder: str) -> bytes | None:
    """Return the namespace digest that a folder is named by."""
    if not re.fullmatch(rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}", folder):
        return None
    return bytes.fromhex(folder)


def _parse(description: bytes) -> Namespace | None:
    try:
        namespace = Namespace.parse(description)
    except msgspec.MsgspecError:
        return None
    return namespace if 0 < namespace.page_bytes <= LARGEST_PAGE else None

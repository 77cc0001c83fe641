"""The MinIO tier: implements the tier contract on top of the transfers and the caches."""

import logging
import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from typing_extensions import override

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
from memkv_sglang.tiers.minio.hidden import HiddenPages
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
    ObjectClient,
    Telemetry,
)
from memkv_sglang.tiers.minio.presence_cache import PresenceCache
from memkv_sglang.tiers.minio.probe import ServerSupport, probe_server
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
from memkv_sglang.tiers.minio.transfers import PageTransfers, stopped

log = logging.getLogger(__name__)

OPENING_TIME = 8.0
"""How long calls of the control path wait for the bucket to open, in seconds."""

CLOCK_MARGIN = 1.0
"""Seconds by which the known time of a server can be behind: servers report whole seconds."""

CONTROL_TIME = 60.0
"""Maximum time, in seconds, to check which of a batch of pages exist before deleting them."""

NAMESPACES_LIMIT = 4096
"""Maximum number of namespaces whose descriptions are read."""

LARGEST_PAGE = 1 << 30
"""Maximum size of a page, in bytes; descriptions with larger or empty pages are ignored."""

NAMES_SHOWN = 5
"""Maximum number of objects that a log line names."""

CALLS_AT_ONCE = 16
"""Calls for which connections are kept open: loads of eight ranks, and some that wait."""

SKIPPED = Fetched(LoadResult.SKIPPED)


class ControlPath(NamedTuple):
    """What listings, the collector and pins need. The tier closes it."""

    bucket: Bucket
    records: Records
    names: ObjectNames


class _Opened(NamedTuple):
    bucket: Bucket
    client: ObjectClient
    control: ObjectClient
    """For small requests, which `close` aborts."""
    transfers: PageTransfers


class MinioTier(Tier):
    """Stores pages as objects in a bucket that any number of nodes share.

    This node's presence cache may be stale; `load` reports missing pages. Lookups do not affect the
    eviction order, only `record_access` does, and only `keep_limits` evicts pages.
    """

    name = "minio"

    def __init__(self, config: MinioConfig, hidden: Path | None = None) -> None:
        """Start to open the bucket in the background. Raises `ConfigError` for invalid settings.

        The file `hidden` remembers what `hide` has hidden.
        """
        endpoints = parse_endpoints(config)
        self._config = config
        self._read_only = config.role == "reader"
        self._context = tls_context(config)
        self._form = page_form(config.encryption_key_file)
        if config.credentials_file:
            read_credentials(config.credentials_file)  # raises now if the file is invalid
        self._names = ObjectNames(config.prefix)
        self._presence = PresenceCache(config.presence_cache_pages, config.negative_ttl)
        self._hidden = HiddenPages(hidden)
        self.telemetry = Telemetry()
        self._threads = TransferPool(config.connections)
        make_pool = partial(
            ConnectionPool,
            endpoints,
            context=self._context,
            connect_timeout=config.connect_timeout,
            stall_timeout=config.stall_timeout,
            idle_timeout=config.idle_timeout,
        )
        self._pool = make_pool(keep=CALLS_AT_ONCE * config.connections)
        self._control_pool = make_pool(keep=2)
        self._limit: int | None = None
        self._clock = ServerClock()
        self._access_times: AccessTimeCache | None = None
        self._access_time_updater: AccessTimeUpdater | None = None
        self._collector: CollectorWorker | None = None
        self._pins: PinStore | None = None
        self._support = BackgroundCall(self._probe)
        self._opening = BackgroundCall(self._open, lambda opened: opened.bucket.close())
        self._opening.begin()

    def check(self, deadline: float) -> None:
        """Wait until the bucket exists and is usable. Raises `ConfigError`, `TierError`."""
        try:
            self._opening.result(deadline)
        except OutOfTimeError as error:
            raise TierError(str(error)) from error

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Narrow the result by the presence cache, then search with several HEADs per round."""
        low, high = self._presence.bounds(chain)

        def probe(positions: Sequence[int]) -> list[bool] | None:
            try:
                return self._ask(
                    [PageKey(chain.namespace, chain.hashes[i]) for i in positions], deadline
                )
            except OutOfTimeError:
                return None

        width = best_width(high - low, self._pool.round_trip)
        found, bound = longest_prefix(low, high, probe, width)
        self._presence.add_chain(Chain(chain.namespace, chain.hashes[low:found]))
        if found == bound < high:
            # A page is useless without its ancestors, so the pages after the missing one are too.
            absent = [PageKey(chain.namespace, h) for h in chain.hashes[found:]]
            self._presence.discard(*absent)
            self._presence.add_missing(absent[0])
        return Lookup(found, complete=found == bound)

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Send a HEAD for each page that is not cached as present."""
        unknown = [key for key in dict.fromkeys(keys) if not self._presence.has(key)]
        try:
            found = dict(zip(unknown, self._ask(unknown, deadline), strict=True))
        except OutOfTimeError as error:
            raise TierError(str(error)) from error
        self._presence.add(key for key, exists in found.items() if exists)
        return [found.get(key, True) for key in keys]

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Receive pages straight into their buffers; see `PageTransfers.load`."""
        if pages and self._hidden.until(pages[0].key.namespace):
            visible = self.present([page.key for page in pages], deadline)
            if not all(visible):
                end = visible.index(False)
                rest = [SKIPPED] * (len(pages) - end - 1)
                return [*self._fetch(pages[:end], deadline), Fetched(LoadResult.MISSING), *rest]
        return self._fetch(pages, deadline)

    def _fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        transfers = self._transfers(deadline) if pages else None
        fetched = (
            stopped(Fetched(LoadResult.FAILED), len(pages))
            if transfers is None
            else transfers.load(pages, deadline)
        )
        outcomes = [outcome or SKIPPED for outcome in fetched]
        self._presence.add(
            page.key for page, outcome in zip(pages, outcomes, strict=True) if outcome.checksum
        )
        if any(outcome.checksum for outcome in outcomes):
            self.telemetry.succeeded(LOAD_FAILED)
        if Fetched(LoadResult.MISSING) in outcomes:
            # The pages after a missing one were not tried, and are probably missing as well.
            skipped = [
                p.key for p, outcome in zip(pages, outcomes, strict=True) if outcome is SKIPPED
            ]
            self._presence.discard(*skipped)
        return outcomes

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Send pages that are not known to be present straight from their buffers."""
        if self._read_only:
            return [SpillResult.REFUSED] * len(pages)
        unknown = [i for i, page in enumerate(pages) if not self._presence.has(page.key)]
        transfers = self._transfers(deadline) if unknown else None
        spilled = (
            stopped(SpillResult.FAILED, len(unknown))
            if transfers is None
            else transfers.spill([pages[i] for i in unknown], deadline)
        )
        if SpillResult.STORED in spilled:
            self.telemetry.succeeded(SPILL_FAILED)
        results = [SpillResult.PRESENT] * len(pages)
        for index, result in zip(unknown, spilled, strict=True):
            results[index] = SpillResult.FAILED if result is None else result
        return results

    @override
    def touch(self, chain: Chain) -> None:
        pass  # see `record_access`

    @override
    def invalidate(self, keys: Sequence[PageKey]) -> None:
        self._presence.discard(*keys)

    def remove(self, keys: Sequence[PageKey]) -> int:
        """Delete the pages that exist; return how many there were. Raises `TierError`."""
        self._demand_writer()
        self._presence.discard(*keys)
        removed = self._remove_ours([self._names.page(key) for key in dict.fromkeys(keys)])
        self._presence.discard(*keys)
        return removed

    def _remove_ours(self, names: Sequence[str]) -> int:
        """Delete the objects that exist and were stored as pages; return their number."""
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
        """Store the description next to the namespace's pages; a no-op for a reader."""
        if not self._read_only:
            self._bucket().write(self._names.description(namespace.digest), namespace.description)

    def namespaces(self) -> dict[bytes, Namespace]:
        """Read the descriptions of all namespaces; invalid ones are skipped and logged."""
        bucket = self._bucket()
        found: dict[bytes, Namespace] = {}
        invalid: list[str] = []
        digests = dict.fromkeys(filter(None, map(_digest, bucket.folders(self._names.root))))
        for count, digest in enumerate(digests):
            if count == NAMESPACES_LIMIT:
                invalid.append(f"all beyond {NAMESPACES_LIMIT} namespaces")
                break
            name = self._names.description(digest)
            content = bucket.read(name)
            namespace = _parse(content) if content else None
            if namespace and namespace.digest == digest:
                found[digest] = namespace
            elif content is not None:
                invalid.append(name)
        if invalid:
            self.telemetry.count("odd_descriptions", len(invalid))
            fields = {"count": len(invalid), "examples": invalid[:NAMES_SHOWN]}
            log.warning("invalid namespace descriptions skipped", extra={"fields": fields})
        return found

    def clear(self, namespace: bytes) -> int:
        """Delete the namespace's pages and description; a no-op for a reader.

        Keeps foreign objects under the namespace's prefix.
        """
        if self._read_only:
            return 0
        bucket = self._bucket()
        prefix = self._names.namespace(namespace)
        names = [item.name for item in bucket.objects(prefix) if self._names.page_key(item.name)]
        removed = self._remove_ours(names)
        bucket.remove([self._names.description(namespace)])
        self._presence.forget(namespace)
        return removed

    @override
    def hide(self, namespace: bytes) -> int:
        """Find only pages that are stored from now on, or more exactly from a second later."""
        deadline = time.monotonic() + CONTROL_TIME
        try:
            name = self._names.description(namespace)
            (head,) = self._opened(deadline).control.heads([name], deadline)
            self._hidden.hide(namespace, self._clock.now(head) + CLOCK_MARGIN)
        except (TransferError, StatusError, OutOfTimeError, OSError) as error:
            raise TierError(f"cannot hide the namespace: {error}") from error
        self._presence.forget(namespace)
        return 0

    def digests(self) -> list[bytes]:
        """Return every namespace that has objects in the bucket. Raises `TierError`."""
        return list(filter(None, map(_digest, self._bucket().folders(self._names.root))))

    def keep_limits(
        self, config: CollectorConfig, metrics: Metrics, *, delay: float = DELAY
    ) -> None:
        """Start to record uses in the bucket, and to collect pages beyond the limits; call once.

        A use is recorded after `delay` seconds. A no-op for a reader. Without limits, no pages are
        collected.
        """
        if self._read_only:
            return
        self._support.begin()
        self._access_times = AccessTimeCache(config.use_period, self._clock)
        self._access_time_updater = AccessTimeUpdater(
            lambda: self._opened(time.monotonic() + OPENING_TIME).control,
            self._config.bucket,
            self._names,
            self._access_times,
            self.telemetry,
            delay=delay,
        )
        if config.capacity or config.max_age:
            self._limit = config.capacity or None
            self._collector = CollectorWorker(lambda: self.collector(config), config, metrics)

    def record_access(self, chain: Chain) -> None:
        """Record the use of a chain's pages, given from the root, in the background."""
        if self._access_time_updater is not None:
            self._access_time_updater.record_access(chain)

    def collector(self, config: CollectorConfig) -> tuple[Collector, Lease]:
        """Return the collector, and the lease that its caller must hold. Raises `TierError`."""
        self._demand_writer()
        bucket, records, names = self.control()
        collector = Collector(bucket, records, names, config, self._forget, self.pins())
        return collector, Lease(records, names.lease, config.lease_ttl)

    def control(self) -> ControlPath:
        """Wait until the bucket is open, and return its control path. Raises `TierError`."""
        bucket = self._bucket()
        client, storage_fields = self._opened(0.0).control, server_side_encryption(self._config)
        return ControlPath(bucket, Records(client, storage_fields, self._clock), self._names)

    def support(self, deadline: float) -> ServerSupport:
        """Return what the server supports: measured once, then from memory.

        `keep_limits` starts the measurement in the background; otherwise the first call does. Takes
        seconds. A failed measurement is repeated by the next call. Raises `TierError`, also for a
        reader, and `OutOfTimeError` at the deadline.
        """
        self._demand_writer()
        return self._support.result(deadline)

    def pins(self) -> PinStore:
        """Wait until the bucket is open, and return its pins. Raises `TierError`."""
        control = self.control()
        if self._pins is None:  # creating two at once is harmless
            self._pins = PinStore(
                *control, count_unusable=partial(self.telemetry.count, "odd_pins")
            )
        return self._pins

    def read_pins(self) -> KeptPages:
        """Read which pages are pinned. Raises `TierError`."""
        return self.pins().kept()

    def _forget(self, keys: Sequence[PageKey]) -> None:
        self._presence.discard(*keys)

    def usage(self) -> TierUsage:
        """Return the result of the last collection by any node; zeros before the first."""
        worker = self._collector
        if worker is None or worker.last is None:
            return TierUsage(pages=0, bytes=0, capacity=self._limit)
        return TierUsage(worker.last.pages, worker.last.bytes, self._limit, worker.removed)

    def problem(self) -> str | None:
        """Return why the bucket could not be opened, or which operations keep failing."""
        opening = self._opening.problem
        return opening if opening is None or opening else self.telemetry.problem()

    def check_integrity(self) -> list[str]:
        """Check the presence cache."""
        return self._presence.check_integrity()

    def close(self, deadline: float = math.inf) -> None:
        """Wait for pages in flight, then close threads and connections.

        Aborts requests of the control path. If the bucket is still being opened, that ends by
        itself within seconds and then closes its connections.
        """
        self._opening.close()
        self._support.close()
        self._control_pool.abort()
        if self._collector is not None:
            self._collector.close()
        if self._access_time_updater is not None:
            self._access_time_updater.close()
        self._threads.close()
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
            self._config,
            client,
            self._threads,
            self._form,
            self._presence,
            access_times=lambda: self._access_times,
            on_bucket_lost=self._bucket_lost,
        )
        return _Opened(bucket, client, control, transfers)

    def _probe(self) -> ServerSupport:
        opened = self._opened(time.monotonic() + OPENING_TIME)
        support = probe_server(
            opened.control,
            opened.bucket,
            self._names,
            self._config.bucket,
            server_side_encryption(self._config),
        )
        for finding in support.findings:
            if finding.level != "ok":
                fields = {"detail": finding.detail, "advice": finding.advice}
                log.warning(f"S3 server: {finding.what}", extra={"fields": fields})
        return support

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

    def _visible(
        self, client: ObjectClient, keys: Sequence[PageKey], names: Sequence[str], deadline: float
    ) -> list[bool]:
        """Return which pages are stored and not hidden."""
        if not any(self._hidden.until(key.namespace) for key in keys):
            return client.exist(names, deadline)
        times = client.stored_times(names, deadline)
        return [
            stored > self._hidden.until(key.namespace)
            for key, stored in zip(keys, times, strict=True)
        ]

    def _ask(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Return which pages the server has. Raises `TierError`, `OutOfTimeError`."""
        if not keys:
            return []
        client = self._opened(deadline).client
        names = [self._names.page(key) for key in keys]
        try:
            found = self._visible(client, keys, names, deadline)
        except OutOfTimeError as error:
            self.telemetry.fault(LOOKUP_FAILED, error)
            raise
        except (TransferError, StatusError) as error:
            self.telemetry.fault(LOOKUP_FAILED, error)
            raise TierError(f"MinIO does not answer: {error}") from error
        self.telemetry.succeeded(LOOKUP_FAILED)
        return found

    def _transfers(self, deadline: float) -> PageTransfers | None:
        """Wait until the bucket is open; return the transfers, None if that fails."""
        try:
            return self._opened(deadline).transfers
        except (TierError, OutOfTimeError) as error:
            self.telemetry.fault("is not usable", error)
            return None


def _digest(folder: str) -> bytes | None:
    """Return the namespace digest in the name of a folder, None if it is not one."""
    if not re.fullmatch(rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}", folder):
        return None
    return bytes.fromhex(folder)


def _parse(description: bytes) -> Namespace | None:
    try:
        namespace = Namespace.parse(description)
    except msgspec.MsgspecError:
        return None
    return namespace if 0 < namespace.page_bytes <= LARGEST_PAGE else None

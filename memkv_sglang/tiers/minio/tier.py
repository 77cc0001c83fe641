"""The MinIO tier: implements the tier contract with the transfers and the caches."""

import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

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
from memkv_sglang.tiers.minio.admin import REMOVED_AT_ONCE
from memkv_sglang.tiers.minio.auth import read_credentials
from memkv_sglang.tiers.minio.bucket_access import BucketAccess
from memkv_sglang.tiers.minio.forms import page_form
from memkv_sglang.tiers.minio.hidden import HiddenPages
from memkv_sglang.tiers.minio.http import (
    OutOfTimeError,
    ServerClock,
    StatusError,
    TransferError,
)
from memkv_sglang.tiers.minio.names import ObjectNames, is_ours
from memkv_sglang.tiers.minio.objects import (
    LOAD_FAILED,
    LOOKUP_FAILED,
    SPILL_FAILED,
    ObjectClient,
    Telemetry,
)
from memkv_sglang.tiers.minio.presence_cache import PresenceCache
from memkv_sglang.tiers.minio.retention import KeptPages, NodeRetention, namespace_entries
from memkv_sglang.tiers.minio.search import best_width, longest_prefix
from memkv_sglang.tiers.minio.transfer_pool import TransferPool
from memkv_sglang.tiers.minio.transfers import PageTransfers, stopped

log = logging.getLogger(__name__)

CLOCK_MARGIN = 1.0
"""Seconds by which a server's time may be behind, because servers report whole seconds."""

CONTROL_TIME = 60.0
"""Maximum seconds to check which pages of a batch exist before deleting them."""

NAMESPACES_LIMIT = 4096
"""Maximum number of namespaces whose descriptions are read."""

LARGEST_PAGE = 1 << 30
"""Maximum bytes of a page. Descriptions with larger or empty pages are ignored."""

NAMES_SHOWN = 5
"""Maximum number of objects that are named in a log line."""

LOG_SECONDS = 2.0
"""Maximum seconds to write the last log when the tier is closed."""

SKIPPED = Fetched(LoadResult.SKIPPED)


class MinioTier(Tier):
    """Stores pages as objects in a bucket that any number of nodes share.

    The presence cache may be stale, but `load` reports missing pages. Only `record_access` affects
    the eviction order; lookups do not. Only `keep_limits` evicts pages.
    """

    name = "minio"

    def __init__(
        self, config: MinioConfig, hidden: Path | None = None, *, any_format: bool = False
    ) -> None:
        """Start to open the bucket in the background. Raises `ConfigError` for invalid settings.

        The file `hidden` keeps what `hide` has hidden. With `any_format`, buckets of other formats
        are opened too, for `rebuilder`.
        """
        self._config = config
        self._read_only = config.role == "reader"
        self._form = page_form(config.encryption_key_file)
        if config.credentials_file:
            read_credentials(config.credentials_file)  # raises now if the file is invalid
        self._names = ObjectNames(config.prefix)
        self._presence = PresenceCache(config.presence_cache_pages, config.negative_ttl)
        self._hidden = HiddenPages(hidden)
        self.telemetry = Telemetry()
        self._threads = TransferPool(config.connections)
        self._clock = ServerClock()
        self.access = BucketAccess(
            config,
            self._names,
            self._clock,
            self.telemetry,
            self._make_transfers,
            any_format=any_format,
        )
        """Opens the bucket."""
        self.retention = NodeRetention(
            self.access, config.bucket, self._clock, self.telemetry, self._forget
        )
        """Logs what this node uses, and collects."""
        self._uses = self.retention.uses
        self.access.begin()

    def check(self, deadline: float) -> None:
        """Wait until the bucket exists and is usable. Raises `ConfigError`, `TierError`."""
        self.access.check(deadline)

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Narrow the result with the presence cache, then search with several HEADs per round."""
        low, high = self._presence.bounds(chain)

        def probe(positions: Sequence[int]) -> list[bool] | None:
            try:
                return self._ask(
                    [PageKey(chain.namespace, chain.hashes[i]) for i in positions], deadline
                )
            except OutOfTimeError:
                return None

        width = best_width(high - low, self.access.round_trip)
        found, bound = longest_prefix(low, high, probe, width)
        self._presence.add_chain(Chain(chain.namespace, chain.hashes[low:found]))
        if found == bound < high:
            # A page is useless without its ancestors, so all pages after a missing one count as
            # missing.
            absent = [PageKey(chain.namespace, h) for h in chain.hashes[found:]]
            self._presence.discard(*absent)
            self._presence.add_missing(absent[0])
        return Lookup(found, complete=found == bound)

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Send a HEAD for each page that is not cached as present."""
        different = list(dict.fromkeys(keys))
        known = self._presence.has(different)
        unknown = [key for key, is_known in zip(different, known, strict=True) if not is_known]
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
        loaded = [p for p, outcome in zip(pages, outcomes, strict=True) if outcome.checksum]
        if loaded:
            self.telemetry.succeeded(LOAD_FAILED)
            self._presence.add(page.key for page in loaded)
            self._note_loaded(loaded)
        if Fetched(LoadResult.MISSING) in outcomes:
            # The pages after a missing one were not tried. They are probably missing, too.
            skipped = [
                p.key for p, outcome in zip(pages, outcomes, strict=True) if outcome is SKIPPED
            ]
            self._presence.discard(*skipped)
        return outcomes

    def _note_loaded(self, pages: Sequence[Page]) -> None:
        """Record the pages' sizes, in case the node that stored them could not log them."""
        if self._read_only:
            return
        by_size: defaultdict[int, list[PageKey]] = defaultdict(list)
        for page in pages:
            by_size[page.length].append(page.key)
        for size, keys in by_size.items():
            self._uses.loaded(keys, size + self._form.overhead)

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Send pages that are not known to be present, straight from their buffers."""
        if self._read_only:
            return [SpillResult.REFUSED] * len(pages)
        known = self._presence.has(page.key for page in pages)
        unknown = [i for i, is_known in enumerate(known) if not is_known]
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
        self.access.demand_writer()
        self._presence.discard(*keys)
        removed = self._remove_ours([self._names.page(key) for key in dict.fromkeys(keys)])
        self._uses.removed(keys)
        self._presence.discard(*keys)
        return removed

    def _remove_ours(self, names: Sequence[str]) -> int:
        """Delete those objects that exist and were stored as pages; return their number."""
        bucket, records, _ = self.access.control()
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
            self.access.bucket().write(
                self._names.description(namespace.digest), namespace.description
            )

    def namespaces(self) -> dict[bytes, Namespace]:
        """Read the descriptions of all namespaces. Skips and logs invalid ones."""
        bucket = self.access.bucket()
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
        """Delete the namespace's pages and description. A no-op for a reader.

        Finds the pages through the index and the logs. Keeps foreign objects.
        """
        if self._read_only:
            return 0
        from memkv_sglang.tiers.minio.retention.entries import key_bytes

        parts = self.retention.parts()
        if not self._uses.flush(CONTROL_TIME):
            raise TierError("could not log what this node stored; clear again")
        removed = 0
        for found in namespace_entries(parts, namespace):
            keys = [PageKey(namespace, key[len(namespace) :]) for key in key_bytes(found)]
            for first in range(0, len(keys), REMOVED_AT_ONCE):
                batch = keys[first : first + REMOVED_AT_ONCE]
                parts.bucket.remove(map(self._names.page, batch))
                self._uses.removed(batch)
            removed += int((found["size"] > 0).sum())
        parts.bucket.remove([self._names.description(namespace)])
        self._presence.forget(namespace)
        if not self._uses.flush(CONTROL_TIME):
            raise TierError("could not log which pages were removed; clear again")
        return removed

    @override
    def hide(self, namespace: bytes) -> int:
        """Hide all pages stored up to now or, more exactly, up to a second from now."""
        deadline = time.monotonic() + CONTROL_TIME
        try:
            name = self._names.description(namespace)
            (head,) = self.access.opened(deadline).control.heads([name], deadline)
            self._hidden.hide(namespace, self._clock.now(head) + CLOCK_MARGIN)
        except (TransferError, StatusError, OutOfTimeError, OSError) as error:
            raise TierError(f"cannot hide the namespace: {error}") from error
        self._presence.forget(namespace)
        return 0

    def digests(self) -> list[bytes]:
        """Return every namespace that has objects in the bucket. Raises `TierError`."""
        return list(filter(None, map(_digest, self.access.bucket().folders(self._names.root))))

    def keep_limits(
        self,
        config: CollectorConfig,
        metrics: Metrics,
        on_collected: Callable[[], None] = lambda: None,
    ) -> None:
        """Take part in the rounds of collection from now on. Call this once.

        `on_collected` is called after each round that this node began. A no-op for a reader.
        """
        if self._read_only:
            return
        self.access.measure_support()
        self.retention.keep_limits(config, metrics, on_collected)

    def record_access(self, chain: Chain, positions: Sequence[int] | None = None) -> None:
        """Record the use of a chain's pages, and their positions in the chain if they are known."""
        if not self._read_only:
            self._uses.used(chain, positions)

    def flush_accesses(self, timeout: float) -> bool:
        """Write what was recorded to the bucket. Returns False if that fails or takes too long."""
        return self._uses.flush(timeout)

    def _forget(self, keys: Sequence[PageKey]) -> None:
        self._presence.discard(*keys)

    def round_trip(self) -> float:
        """Return the measured seconds from a request to its response; 0 if unknown."""
        return self.access.round_trip

    def usage(self) -> TierUsage:
        """Return the result of the last collection by any node; zeros before the first one."""
        return self.retention.usage()

    def problem(self) -> str | None:
        """Return why the bucket could not be opened, or which operations keep failing."""
        opening = self.access.problem
        return opening if opening is None or opening else self.telemetry.problem()

    def check_integrity(self) -> list[str]:
        """Check the presence cache."""
        return self._presence.check_integrity()

    def close(self, deadline: float = math.inf) -> None:
        """Write the last log, wait for pages in flight, then close threads and connections.

        Aborts requests of the control path. If the bucket is still being opened, that ends within
        seconds, and its connections are then closed.
        """
        if self.access.problem == "":
            self._uses.close(min(max(deadline - time.monotonic(), 0.0), LOG_SECONDS))
        self.access.abort()
        self.retention.close()
        self._threads.close()
        self.access.close()

    def read_pins(self) -> KeptPages:
        """Read which pages are pinned. Raises `TierError`."""
        return self.retention.read_pins()

    def _make_transfers(self, client: ObjectClient) -> PageTransfers:
        return PageTransfers(
            self._config,
            client,
            self._threads,
            self._form,
            self._presence,
            stored=self._uses.stored,
            on_bucket_lost=self._bucket_lost,
        )

    def _bucket_lost(self) -> None:
        with suppress(TierError):  # the tier was closed meanwhile
            self.access.begin()

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
        client = self.access.opened(deadline).client
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
        """Wait until the bucket is open; return the transfers, or None if that fails."""
        try:
            return self.access.opened(deadline).transfers
        except (TierError, OutOfTimeError) as error:
            self.telemetry.fault("is not usable", error)
            return None


def _digest(folder: str) -> bytes | None:
    """Return the namespace digest that a folder is named after; None if it is not one."""
    if not re.fullmatch(rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}", folder):
        return None
    return bytes.fromhex(folder)


def _parse(description: bytes) -> Namespace | None:
    try:
        namespace = Namespace.parse(description)
    except msgspec.MsgspecError:
        return None
    return namespace if 0 < namespace.page_bytes <= LARGEST_PAGE else None

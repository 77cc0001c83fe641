"""Opens the bucket in the background, and gives access to its control path."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.admin import Bucket
from memkv_sglang.tiers.minio.auth import Signer, credential_provider
from memkv_sglang.tiers.minio.http import (
    BackgroundCall,
    ConnectionPool,
    OutOfTimeError,
    ServerClock,
    parse_endpoints,
    tls_context,
)
from memkv_sglang.tiers.minio.names import ObjectNames, server_side_encryption
from memkv_sglang.tiers.minio.objects import ObjectClient, Telemetry
from memkv_sglang.tiers.minio.probe import ServerSupport, probe_server
from memkv_sglang.tiers.minio.retention import (
    BucketFormat,
    ControlPath,
    OpenPath,
    Records,
    ensure_format,
)
from memkv_sglang.tiers.minio.transfers import PageTransfers

log = logging.getLogger(__name__)

OPENING_TIME = 8.0
"""Seconds that calls of the control path wait for the bucket to be opened."""

PROBE_TIME = 60.0
"""Seconds to wait until the server's abilities are measured."""

CALLS_AT_ONCE = 16
"""Number of calls for which connections are kept open: loads of eight ranks, and some that wait."""

Connect = Callable[[ObjectClient], PageTransfers]


class OpenBucket(NamedTuple):
    """An open bucket."""

    format: BucketFormat
    bucket: Bucket
    client: ObjectClient
    """For pages."""
    control: ObjectClient
    """Connections for small requests. `abort` aborts these."""
    transfers: PageTransfers


class BucketAccess:
    """Opens a bucket once, and again if it was lost. Thread-safe."""

    def __init__(
        self,
        config: MinioConfig,
        names: ObjectNames,
        clock: ServerClock,
        telemetry: Telemetry,
        connect: Connect,
        *,
        any_format: bool,
    ) -> None:
        """Prepare; `begin` starts to open the bucket. Raises `ConfigError` for invalid settings.

        `connect` makes the transfers from a client for pages. With `any_format`, buckets of other
        formats are opened as well.
        """
        self.read_only = config.role == "reader"
        self.names = names
        self._config = config
        self._clock = clock
        self._telemetry = telemetry
        self._connect = connect
        self._any_format = any_format
        self._context = tls_context(config)
        make_pool = partial(
            ConnectionPool,
            parse_endpoints(config),
            context=self._context,
            connect_timeout=config.connect_timeout,
            stall_timeout=config.stall_timeout,
            idle_timeout=config.idle_timeout,
        )
        self.pool = make_pool(keep=CALLS_AT_ONCE * config.connections)
        self._control_pool = make_pool(keep=2)
        self._support = BackgroundCall(self._probe)
        self._opening = BackgroundCall(self._open, lambda opened: opened.bucket.close())

    def begin(self) -> None:
        """Start to open the bucket in the background, also if it was open before."""
        self._opening.begin()

    def opened(self, deadline: float) -> OpenBucket:
        """Wait until the bucket is open. Raises `TierError`, `OutOfTimeError`."""
        try:
            return self._opening.result(deadline)
        except (TierError, OutOfTimeError):
            raise
        except Exception as error:
            raise TierError(str(error)) from error

    def check(self, deadline: float) -> None:
        """Wait until the bucket exists and is usable. Raises `ConfigError`, `TierError`."""
        try:
            self._opening.result(deadline)
        except OutOfTimeError as error:
            raise TierError(str(error)) from error

    def bucket(self) -> Bucket:
        """Wait until the bucket is open; return it. Raises `TierError`."""
        try:
            return self.opened(time.monotonic() + OPENING_TIME).bucket
        except OutOfTimeError as error:
            raise TierError(str(error)) from error

    def control(self) -> ControlPath:
        """Wait until the bucket is open; return its control path. Raises `TierError`."""
        return self.path().control

    def path(self) -> OpenPath:
        """Wait until the bucket is open; return what retention uses. Raises `TierError`."""
        bucket, opened = self.bucket(), self.opened(0.0)
        control = ControlPath(bucket, self._records(opened.control), self.names)
        return OpenPath(control, opened.control, opened.format)

    def _records(self, client: ObjectClient) -> Records:
        return Records(client, server_side_encryption(self._config), self._clock)

    def measure_support(self) -> None:
        """Start to measure in the background what the server supports."""
        self._support.begin()

    def support(self, deadline: float) -> ServerSupport:
        """Return what the server supports. It is measured once.

        The measurement takes seconds. `measure_support` starts it in the background; otherwise, the
        first call does. If it failed, the next call repeats it. Raises `TierError`, also for a
        reader, and `OutOfTimeError` at the deadline.
        """
        self.demand_writer()
        return self._support.result(deadline)

    def measured_support(self) -> ServerSupport:
        """Return what the server supports. Measures it if necessary. Raises `TierError`."""
        try:
            return self.support(time.monotonic() + PROBE_TIME)
        except OutOfTimeError as error:
            raise TierError(str(error)) from error

    def demand_writer(self) -> None:
        """Raise `TierError` if this node only reads."""
        if self.read_only:
            raise TierError("minio.role is `reader`: this node does not change the bucket")

    @property
    def round_trip(self) -> float:
        """Seconds from a request to its response, as measured; 0 if unknown."""
        return self.pool.round_trip

    @property
    def problem(self) -> str | None:
        """Why the bucket could not be opened; empty if it is open, None if that is under way."""
        return self._opening.problem

    def abort(self) -> None:
        """Stop opening and measuring, and abort requests of the control path."""
        self._opening.close()
        self._support.close()
        self._control_pool.abort()

    def close(self) -> None:
        """Close the connections for pages."""
        self.pool.close()

    def _open(self) -> OpenBucket:
        provider = credential_provider(self._config)
        bucket = Bucket(self._config, provider, self._context)
        signer = Signer(provider, self._config.region)
        ways = self._config.connections
        client = ObjectClient(self.pool, signer, self._telemetry, ways=ways)
        control = ObjectClient(self._control_pool, signer, self._telemetry, ways=ways)
        try:
            bucket.ensure()
            bucket_format = self._ensure_format(bucket, control)
        except BaseException:
            bucket.close()
            raise
        return OpenBucket(bucket_format, bucket, client, control, self._connect(client))

    def _ensure_format(self, bucket: Bucket, control: ObjectClient) -> BucketFormat:
        if self._any_format:
            return BucketFormat()
        return ensure_format(
            self._records(control), bucket, self.names, writable=not self.read_only
        )

    def _probe(self) -> ServerSupport:
        opened = self.opened(time.monotonic() + OPENING_TIME)
        support = probe_server(
            opened.control,
            opened.bucket,
            self.names,
            self._config.bucket,
            server_side_encryption(self._config),
        )
        for finding in support.findings:
            if finding.level != "ok":
                fields = {"detail": finding.detail, "advice": finding.advice}
                log.warning(f"S3 server: {finding.what}", extra={"fields": fields})
        return support

"""Check the bucket, the permissions of the credentials, and what the S3 server supports."""

import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from memkv_sglang.cli.output import human_size
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.finding import Finding, split_problem
from memkv_sglang.tiers.base import TierError

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.admin.bucket import Bucket
    from memkv_sglang.tiers.minio.auth.credentials import RenewableProvider

CHAIN_LIMIT = 10.0
"""Seconds for the credential chain. Its last provider may wait for a server."""

PROBE_SECONDS = 60.0
"""Seconds to find out what the server supports."""

_KEY_FILES = ("~/.aws/credentials", "~/.mc/config.json")

LARGE_PAGE, SMALL_PAGE = 8 << 20, 64 << 10
"""Bytes of a large and of a small page."""

_CONTENT = b"probe of memkv doctor"


def check_bucket(config: MinioConfig, collector: CollectorConfig) -> Iterator[Finding]:
    """Test the credentials and the server with probe objects, then remove these."""
    from memkv_sglang.cli.listing.minio import open_bucket
    from memkv_sglang.tiers.minio.auth.signing import credential_provider

    provider = credential_provider(config)
    finding = _credentials(config, provider)
    yield finding
    if finding.level == "FAIL":
        return
    yield from _key_files(config)
    name = "/".join(filter(None, (config.prefix, f"memkv-doctor-{uuid.uuid4().hex}")))
    bucket, usable = open_bucket(config), True
    for finding in _probe(bucket, name, config):
        usable = usable and finding.level == "ok"
        yield finding
    if usable:
        yield from check_server(config, collector)
        yield check_features(bucket, config)


def check_server(config: MinioConfig, collector: CollectorConfig) -> Iterator[Finding]:
    """Find out what the S3 server supports. The bucket must exist."""
    if config.role == "reader":
        yield Finding("skip", "conditions", "not tried: minio.role is `reader`")
        return
    from memkv_sglang.cli.listing.minio import open_minio

    limited = collector.run == "auto" and bool(collector.capacity or collector.max_age)
    with open_minio(config) as tier:
        try:
            support = tier.access.support(time.monotonic() + PROBE_SECONDS)
        except TierError as error:
            yield split_problem("server", str(error))
            return
    for finding in support.findings:
        if finding.what == "conditions" and limited and not support.exclusive:
            # Without conditional writes, no node would enforce the limits.
            yield finding._replace(level="FAIL")
        else:
            yield finding


def check_features(bucket: "Bucket", config: MinioConfig) -> Finding:
    """Check object lock and the lifecycle rule. Not all credentials may read them."""
    from memkv_sglang.tiers.minio.admin import read_features

    what = "lifecycle"
    try:
        features = read_features(bucket.administration(), config)
    except TierError as error:
        return split_problem(what, str(error))
    if features is None:
        detail = "these credentials may not read the lifecycle rule and object lock"
        return Finding("skip", what, detail, "an administrator's `memkv bucket setup` shows them")
    if features.locked:
        advice = "use a bucket created without object lock"
        return Finding("FAIL", "lock", f"bucket {config.bucket} has object lock", advice)
    if features.days is None:
        detail = "no rule expires pages that nobody removes"
        return Finding("warn", what, detail, "run `memkv bucket setup`, if the server has rules")
    return Finding("ok", what, f"pages unused for {features.days} days expire; no object lock")


def _credentials(config: MinioConfig, provider: "RenewableProvider") -> Finding:
    outcome: queue.Queue[bool] = queue.Queue()

    def retrieve() -> None:
        try:
            provider.retrieve()
        except Exception:  # each provider raises its own types of exceptions
            outcome.put(False)
        else:
            outcome.put(True)

    threading.Thread(target=retrieve, daemon=True).start()
    try:
        found = outcome.get(timeout=CHAIN_LIMIT)
    except queue.Empty:
        found = False
    if found:
        return Finding("ok", "credentials", f"from {_source(config)}")
    detail, _, advice = provider.advice.partition(": ")
    return Finding("FAIL", "credentials", detail, advice)


def _source(config: MinioConfig) -> str:
    if config.credentials_file:
        return "minio.credentials_file"
    if config.access_key:
        return "minio.access_key"
    if config.certificate_login:
        return "minio.certificate_login"
    return "minio-py's standard chain"


def _key_files(config: MinioConfig) -> Iterator[Finding]:
    """Warn about credential files that other users can read."""
    if config.access_key or config.credentials_file:
        return
    for path in (Path(os.path.expanduser(name)) for name in _KEY_FILES):  # noqa: PTH111 - never raises
        if path.exists() and path.stat().st_mode & 0o077:
            detail = f"other users can read {path}"
            yield Finding("warn", "credentials", detail, f"chmod 600 {path}")


def _probe(bucket: "Bucket", name: str, config: MinioConfig) -> Iterator[Finding]:
    listing = _try("list", lambda: bucket.names(name, recursive=True), config)
    yield listing or Finding("ok", "list", f"allowed in bucket {config.bucket}")
    if listing is not None and (listing.what == "bucket" or listing.level == "FAIL"):
        return
    if config.role == "reader":
        get = _try("get", lambda: bucket.read(name), config)
        yield get or Finding("ok", "get", "allowed; a reader needs no more")
        return
    put = _try("put", lambda: bucket.write(name, _CONTENT), config)
    yield put or Finding("ok", "put", "allowed")
    if put is not None:
        return
    page = f"{name}-page"
    yield _largest_put(bucket, page, config)
    yield _try("get", lambda: _read(bucket, name), config) or Finding(
        "ok", "get", "allowed, for head requests too"
    )
    removal = _try("delete", lambda: bucket.remove([name, page]), config)
    yield removal or Finding("ok", "delete", "allowed; the probe objects were removed")


def _largest_put(bucket: "Bucket", name: str, config: MinioConfig) -> Finding:
    """Store an object of a page's size, because proxies often limit the size of requests."""
    problem = _try("page size", lambda: bucket.write(name, bytes(LARGE_PAGE)), config)
    if problem is None:
        return Finding("ok", "page size", f"objects of {human_size(LARGE_PAGE)} can be stored")
    size = LARGE_PAGE // 2
    while size >= SMALL_PAGE and "HTTP status 413" in problem.detail:
        if _try("page size", partial(bucket.write, name, bytes(size)), config) is None:
            detail = f"{problem.detail} (up to {human_size(size)} can be stored)"
            return problem._replace(detail=detail)
        size //= 2
    return problem


def _read(bucket: "Bucket", name: str) -> None:
    if bucket.read(name) != _CONTENT:
        raise TierError("the probe object was altered; check proxies and the server's drives")


def _try(what: str, operation: Callable[[], object], config: MinioConfig) -> Finding | None:
    """Run an operation; return a finding if it fails, else None."""
    try:
        operation()
    except ConfigError as error:
        return split_problem(what, str(error))
    except TierError as error:
        if getattr(error.__cause__, "code", "") == "NoSuchBucket":
            return _no_bucket(config)
        return split_problem(what, str(error))
    return None


def _no_bucket(config: MinioConfig) -> Finding:
    if config.create_bucket:
        detail = f"{config.bucket} does not exist yet and will be created on first use"
        return Finding("warn", "bucket", detail, "nothing, if these credentials may create buckets")
    advice = "create it, correct minio.bucket, or set minio.create_bucket = true"
    return Finding("FAIL", "bucket", f"{config.bucket} does not exist", advice)

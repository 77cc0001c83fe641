"""Check the bucket and the permissions of the credentials."""

import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.finding import Finding, split_problem
from memkv_sglang.tiers.base import TierError

if TYPE_CHECKING:
    from minio.credentials.providers import Provider

    from memkv_sglang.tiers.minio.admin.bucket import Bucket

CHAIN_LIMIT = 10.0
"""Time limit in seconds for the credential chain; its last provider may wait for a server."""

_KEY_FILES = ("~/.aws/credentials", "~/.mc/config.json")

_CONTENT = b"probe of memkv doctor"


def check_bucket(config: MinioConfig) -> Iterator[Finding]:
    """Try the credentials with a probe object, and remove it. Creates no bucket."""
    if not config.endpoint:
        return
    from memkv_sglang.cli.listing.minio import open_bucket
    from memkv_sglang.tiers.minio.auth.signing import credential_provider

    provider = credential_provider(config)
    finding = _credentials(config, provider)
    yield finding
    if finding.level == "FAIL":
        return
    yield from _key_files(config)
    name = "/".join(filter(None, (config.prefix, f"memkv-doctor-{uuid.uuid4().hex}")))
    yield from _probe(open_bucket(config), name, config)


def _credentials(config: MinioConfig, provider: "Provider") -> Finding:
    source = _source(config)
    outcome: queue.Queue[bool] = queue.Queue()

    def retrieve() -> None:
        try:
            provider.retrieve()
        except Exception:  # each provider raises its own types
            outcome.put(False)
        else:
            outcome.put(True)

    threading.Thread(target=retrieve, daemon=True).start()
    try:
        found = outcome.get(timeout=CHAIN_LIMIT)
    except queue.Empty:
        found = False
    if found:
        return Finding("ok", "credentials", f"from {source}")
    advice = "set MEMKV_MINIO_ACCESS_KEY and MEMKV_MINIO_SECRET_KEY"
    return Finding("FAIL", "credentials", f"none from {source}", advice)


def _source(config: MinioConfig) -> str:
    if config.credentials_file:
        return "minio.credentials_file"
    return "minio.access_key" if config.access_key else "minio-py's standard chain"


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
    versions: list[bool] = []
    put = _try("put", lambda: versions.append(bucket.write(name, _CONTENT)), config)
    yield put or Finding("ok", "put", "allowed")
    if put is not None:
        return
    yield _try("get", lambda: _read(bucket, name), config) or Finding(
        "ok", "get", "allowed, for head requests too"
    )
    removal = _try("delete", lambda: bucket.remove([name]), config)
    yield removal or Finding("ok", "delete", "allowed; the probe object was removed")
    if any(versions):
        detail = f"bucket {config.bucket} is versioned, so removing pages frees no space"
        yield Finding("warn", "versions", detail, "run `memkv bucket setup` for advice")


def _read(bucket: "Bucket", name: str) -> None:
    if bucket.read(name) != _CONTENT:
        raise TierError("the probe object was altered; check proxies and the server's drives")


def _try(what: str, operation: Callable[[], object], config: MinioConfig) -> Finding | None:
    """Run an operation; returns a finding if it fails, else None."""
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

"""Cache fingerprints, so that one rank computes them for all ranks and servers of a node.

A fingerprint is keyed by the device, inode, size and times of every file of the model. Programs
cannot set a file's ctime, so weights overwritten in place are noticed even if their size and
modification time are restored.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memkv_sglang.agent.paths import private_directory
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.plugin.fingerprint import fingerprint, model_files

log = logging.getLogger(__name__)

VERSION = 1
"""Version of the computation. Increase it when fingerprints are computed in another way."""

FOLDER = "fingerprints"

KEPT = 100
"""Maximum fingerprints per node. If there are more, the oldest are removed."""

SETTLED_SECONDS = 2.0
"""Seconds during which a changed file may change again with the same timestamp, because file
systems have coarse clocks. The fingerprint of such a file is not cached."""

_DIGEST = re.compile("[0-9a-f]{64}")


def cached_fingerprint(model: Path) -> str:
    """Return the fingerprint of the model in the directory `model`; see `fingerprint`.

    Blocks while another process reads the same or another model. Raises `NoFingerprintError` and
    `OSError`.
    """
    try:
        directory = private_directory(FOLDER)
    except ConfigError as error:
        log.info("memkv: no fingerprint cache, so each rank reads the model itself: %s", error)
        return fingerprint(model)
    with _locked(directory):
        begin = time.time()
        key, changed = _stat(model)
        path = directory / key
        known = _load(path)
        if known:
            return known
        found = fingerprint(model)
        if _stat(model)[0] == key and changed < begin - SETTLED_SECONDS:
            _store(path, found)
    return found


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _stat(model: Path) -> tuple[str, float]:
    """Return a cache key for the state of a model's files, and the time of their last change."""
    facts, changed = [], 0
    for path in (path for paths in model_files(model) for path in paths):
        status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        facts.append((path.name, status.st_dev, status.st_ino, status.st_size, *times))
        changed = max(changed, status.st_ctime_ns)
    return hashlib.sha256(json.dumps([VERSION, facts]).encode()).hexdigest(), changed / 1e9


def _load(path: Path) -> str:
    """Return a cached fingerprint; "" if there is none."""
    with suppress(OSError, UnicodeDecodeError):
        text = path.read_text()
        if _DIGEST.fullmatch(text):
            return text
    return ""


def _store(path: Path, digest: str) -> None:
    """Cache a fingerprint. Best effort."""
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(digest)
        temporary.replace(path)
        kept = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        for old in kept[:-KEPT]:
            old.unlink()
    except OSError as error:
        log.info("memkv: fingerprint not cached: %s", error)

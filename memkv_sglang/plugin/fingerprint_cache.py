"""Fingerprints that one rank reads for all servers and ranks of a node.

A fingerprint is kept by the device, inode, size and times of every file of the model. The time of
the last status change (ctime) cannot be set, so that weights overwritten in place are noticed even
if their size and modification time are put back.
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
"""Raise it when fingerprints are computed in another way."""

FOLDER = "fingerprints"

KEPT = 100
"""Fingerprints per node; beyond that the oldest are removed."""

SETTLED_SECONDS = 2.0
"""A file changed later than this may change again without a new time: clocks of file systems are
coarse. Its fingerprint is not kept."""

_DIGEST = re.compile("[0-9a-f]{64}")


def cached_fingerprint(model: Path) -> str:
    """Return the fingerprint of the model in the directory `model`; see `fingerprint`.

    Blocks while another process reads the same or another model. Raises `NoFingerprintError` and
    `OSError`.
    """
    try:
        directory = private_directory(FOLDER)
    except ConfigError as error:
        log.info("memkv: each rank reads the model itself: %s", error)
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
    """Return a name for the state of all of a model's files, and when one last changed."""
    facts, changed = [], 0
    for path in (path for paths in model_files(model) for path in paths):
        status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        facts.append((path.name, status.st_dev, status.st_ino, status.st_size, *times))
        changed = max(changed, status.st_ctime_ns)
    return hashlib.sha256(json.dumps([VERSION, facts]).encode()).hexdigest(), changed / 1e9


def _load(path: Path) -> str:
    """Return a fingerprint that was kept; empty if there is none."""
    with suppress(OSError, UnicodeDecodeError):
        text = path.read_text()
        if _DIGEST.fullmatch(text):
            return text
    return ""


def _store(path: Path, digest: str) -> None:
    """Keep a fingerprint, as far as possible."""
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(digest)
        temporary.replace(path)
        kept = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        for old in kept[:-KEPT]:
            old.unlink()
    except OSError as error:
        log.info("memkv: fingerprint not kept: %s", error)

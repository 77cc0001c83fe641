"""Record lookups for `memkv plan --trace`: salted hashes of pages, no text.

Threads only append to a bounded queue. The event loop encodes and writes, so a slow disk never
delays a lookup. Records that do not fit in the queue are dropped and counted.
"""

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import aiofiles
import msgspec

from memkv_sglang.config.schema import RecorderConfig
from memkv_sglang.page import Chain

log = logging.getLogger(__name__)

VERSION = 1
"""Version of the format, in the first line of each file."""

MAX_QUEUED_PAGES = 1 << 17
"""Maximum pages of the queued lookups, about 12 MB."""

KNOWN_PAGES = 1 << 18
"""Number of recorded pages to remember, about 40 MB. Their chains need not be written again."""

PERIOD = 0.25
"""Seconds between writes."""

_BATCH = 256
"""Lookups to encode before yielding to the event loop."""

Count = Callable[[str, int], None]
"""Counts records by result."""


class _Lookup(NamedTuple):
    seconds: float
    chain: Chain
    hit: int


class Recorder:
    """Writes one line per lookup: the time, the namespace, the new pages of the chain and the hits.

    A chain's pages are written once per file. Later records name the last page that was written
    before (`parent`), with its position in the chain (`at`), and list only the pages after it.
    """

    def __init__(self, config: RecorderConfig, count: Count) -> None:
        """Write to `config.file`, beginning with an empty one; `count` counts records.

        Raises `OSError` if the file cannot be created.
        """
        self._path = Path(config.file)
        self._config = config
        self._count = count
        self._salt = config.salt.encode()[:64] or os.urandom(16)
        self._queue: deque[_Lookup] = deque()
        self._queued_pages = 0
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, None] = OrderedDict()
        """Pages in the current file, by parts of namespace and hash."""
        self._size = 0
        self._failed = False
        self._begin_file()

    def record(self, chain: Chain, hit: int) -> None:
        """Queue a lookup and the length of its hit. Takes a microsecond; any thread may call it.

        The chain must not change afterwards.
        """
        pages = len(chain.hashes)
        with self._lock:
            fits = self._queued_pages + pages <= MAX_QUEUED_PAGES
            if fits:
                self._queued_pages += pages
                self._queue.append(_Lookup(time.time(), chain, hit))
        if not fits:
            self._count("dropped", 1)

    async def run(self) -> None:
        """Write queued lookups until cancelled."""
        while True:
            await asyncio.sleep(PERIOD)
            await self.flush()

    async def flush(self) -> None:
        """Write what is queued."""
        while batch := self._take():
            try:
                if self._size >= self._config.max_size:
                    await asyncio.to_thread(self._begin_file)
                await self._append(b"".join(map(self._encode, batch)))
            except OSError as error:
                self._known.clear()  # The file lacks some of these pages now.
                with suppress(OSError):
                    await asyncio.to_thread(os.truncate, self._path, self._size)
                self._count("dropped", len(batch))
                if not self._failed:
                    fields = {"file": self._path, "reason": str(error)}
                    log.warning("cannot record lookups, still retrying", extra={"fields": fields})
                self._failed = True
                return
            self._failed = False
            self._count("written", len(batch))

    def _take(self) -> list[_Lookup]:
        with self._lock:
            batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            self._queued_pages -= sum(len(lookup.chain.hashes) for lookup in batch)
        return batch

    async def _append(self, lines: bytes) -> None:
        if not self._size:
            lines = msgspec.json.encode({"memkv_record": VERSION}) + b"\n" + lines
        async with aiofiles.open(self._path, "ab") as file:
            await file.write(lines)
        self._size += len(lines)

    def _begin_file(self) -> None:
        """Begin a new, self-contained file: chains are written to it in full again."""
        if self._path.exists():
            self._shift()
        os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
        self._size = 0
        self._known.clear()

    def _shift(self) -> None:
        """Rename file to file.1, file.1 to file.2 and so on; the oldest one is removed."""
        for number in range(self._config.files - 1, 0, -1):
            older = self._numbered(number)
            source = self._numbered(number - 1)
            if source.exists():
                source.replace(older)
        self._path.unlink(missing_ok=True)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def _encode(self, lookup: _Lookup) -> bytes:
        """Return the line of a lookup, and remember its pages."""
        chain = lookup.chain
        known = self._known_prefix(chain)
        record: dict[str, Any] = {
            "t": round(lookup.seconds, 3),
            "ns": self._name(chain.namespace),
            "n": len(chain.hashes),
            "hit": lookup.hit,
        }
        if known:
            record |= {"at": known, "parent": self._name(chain.hashes[known - 1])}
        if new := chain.hashes[known:]:
            record["new"] = "".join(map(self._name, new))
        self._known.update((_short(chain, page_hash), None) for page_hash in new)
        while len(self._known) > KNOWN_PAGES:
            self._known.popitem(last=False)
        return msgspec.json.encode(record) + b"\n"

    def _known_prefix(self, chain: Chain) -> int:
        """Return how many leading pages of the chain the file contains.

        The file contains all ancestors of each of its pages, so a binary search finds it.
        """
        low, high = 0, len(chain.hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if _short(chain, chain.hashes[middle - 1]) in self._known:
                low = middle
            else:
                high = middle - 1
        return low

    def _name(self, value: bytes) -> str:
        """Return the salted hash of a value, as 16 hex digits."""
        return blake2b(value, key=self._salt, digest_size=8).hexdigest()


def _short(chain: Chain, page_hash: bytes) -> bytes:
    """Return a short key of the page: half of its digest and half of its hash."""
    return chain.namespace[:8] + page_hash[:16]

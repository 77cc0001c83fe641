"""KV events of the tiers, in SGLang's own stream: which blocks can be had from disk or MinIO.

A block is announced on a medium once the agent says that the tier holds the page, and taken back
when the agent says that the disk no longer does, or when this server's storage is cleared. Blocks
carry the hashes and tokens that SGLang's own events give them. Requests with a salt or an adapter
are left out: SGLang's events name their blocks otherwise than its storage does.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import Config
from memkv_sglang.page import Chain

log = logging.getLogger(__name__)

LOCAL = "nvme"

MEDIA = {LOCAL: "DISK", "minio": "EXTERNAL"}
"""SGLang's `StorageMedium` of each tier."""

POLL_SECONDS = 1.0
"""From one question after pages that are not on a tier yet to the next."""

POLL_PAGES = 64
"""Pages of a question; each that MinIO has not been seen to hold costs a request."""

MISSES = 32
"""Backups in vain after which a round ends: uploads go in order, so that the rest waits too."""

PATIENCE = 600.0
"""Seconds after which pages that have not reached a tier are not waited for any more."""

SWEEP_SECONDS = 10.0
SWEEP_PAGES = 2048
"""How often, and how many announced pages at a time, are looked for on the disk again."""

MAX_WAITING = 4096
"""Backups whose pages are waited for; over that the oldest are not announced."""

MAX_ANNOUNCED = 200_000
"""Pages of a medium that are remembered as announced."""

MAX_EVENTS = 100_000
"""Events that wait for SGLang, which asks at every step."""


class Block(NamedTuple):
    """A page as events name it."""

    hash: bytes
    name: int
    parent: int | None
    tokens: list[Any]


class _Backup(NamedTuple):
    """Blocks of a chain, in order, that are to be announced on a tier."""

    namespace: bytes
    tier: str
    blocks: Sequence[Block]
    since: float


class Announcer:
    """Asks the agent in a thread of its own. The other calls do not block."""

    def __init__(self, client: AgentClient, tiers: Sequence[str]) -> None:
        """Begin to serve; `tiers` are those that there are, of `MEDIA`."""
        self._client = client
        self._changed = threading.Condition()
        self._waiting: deque[_Backup] = deque(maxlen=MAX_WAITING)
        self._events: deque[Any] = deque(maxlen=MAX_EVENTS)
        self._announced: dict[str, OrderedDict[tuple[bytes, bytes], int]] = {
            tier: OrderedDict() for tier in tiers
        }
        self._clears = 0
        self._fresh = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memkv-events", daemon=True)
        self._thread.start()

    def stored(self, namespace: bytes, blocks: Sequence[Block]) -> None:
        """Announce the blocks of a chain, in order, on each tier that they are on or get to."""
        if not blocks:
            return
        with self._changed:
            now = time.monotonic()
            self._waiting.extend(_Backup(namespace, tier, blocks, now) for tier in self._announced)
            self._fresh = True
            self._changed.notify()

    def cleared(self) -> None:
        """Take back everything: this server finds none of it any more."""
        with self._changed:
            self._clears += 1
            self._waiting.clear()
            for tier, announced in self._announced.items():
                self._remove(tier, list(announced))

    def take(self) -> list[Any]:
        """Return the events since the last call."""
        if not self._events:
            return []
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def close(self) -> None:
        """Stop; returns at once."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        swept = time.monotonic()
        while not self._closed:
            try:
                self._poll()
                if time.monotonic() - swept > SWEEP_SECONDS:
                    self._sweep()
                    swept = time.monotonic()
            except Exception:
                log.exception("memkv: events of the tiers end")
                return
            with self._changed:
                pause = POLL_SECONDS if self._waiting else SWEEP_SECONDS
                self._changed.wait_for(lambda: self._fresh or self._closed, pause)
                self._fresh = False

    def _poll(self) -> None:
        """Ask once after each backup that is waited for, the oldest first."""
        misses = 0
        for _ in range(len(self._waiting)):
            with self._changed:
                if self._closed or not self._waiting or misses == MISSES:
                    return
                backup, clears = self._waiting.popleft(), self._clears
            found = self._on_tier(backup)
            misses += not found
            with self._changed:
                if clears == self._clears:
                    self._store(backup, found)
                    self._wait_for(backup._replace(blocks=backup.blocks[found:]))

    def _wait_for(self, left: _Backup) -> None:
        """Ask again later. What is not on the disk once it has been stored does not get there."""
        comes = left.blocks and left.tier != LOCAL
        if comes and time.monotonic() - left.since < PATIENCE:
            self._waiting.append(left)

    def _on_tier(self, backup: _Backup) -> int:
        """Return how many of the backup's blocks, from the first, the tier holds."""
        found, ask = 0, 1
        while found < len(backup.blocks):
            asked = [block.hash for block in backup.blocks[found : found + ask]]
            there = self._client.present(Chain(backup.namespace, asked), POLL_SECONDS, backup.tier)
            count = sum(1 for _ in takewhile(bool, there))
            found += count
            if count < len(asked):
                break
            ask = POLL_PAGES
        return found

    def _store(self, backup: _Backup, count: int) -> None:
        from sglang.srt.disaggregation.kv_events import BlockStored

        blocks, announced = backup.blocks[:count], self._announced[backup.tier]
        if not blocks:
            return
        for block in blocks:
            key = (backup.namespace, block.hash)
            announced[key] = block.name
            announced.move_to_end(key)
        self._events.append(
            BlockStored(
                block_hashes=[block.name for block in blocks],
                parent_block_hash=blocks[0].parent,
                token_ids=[token for block in blocks for token in block.tokens],
                block_size=len(blocks[0].tokens),
                lora_id=None,
                medium=MEDIA[backup.tier],
            )
        )
        while len(announced) > MAX_ANNOUNCED:
            announced.popitem(last=False)

    def _sweep(self) -> None:
        """Look for some of what was announced on the disk; MinIO would be asked page by page."""
        with self._changed:
            announced = self._announced.get(LOCAL, OrderedDict())
            keys = [announced.popitem(last=False) for _ in range(min(SWEEP_PAGES, len(announced)))]
            announced.update(keys)
        for namespace in {namespace for (namespace, _), _ in keys}:
            hashes = [page for (of, page), _ in keys if of == namespace]
            there = self._client.present(Chain(namespace, hashes), POLL_SECONDS, LOCAL)
            if self._client.problem:
                return  # nobody who could tell
            gone = [(namespace, h) for h, held in zip(hashes, there, strict=True) if not held]
            with self._changed:
                self._remove(LOCAL, gone)

    def _remove(self, tier: str, keys: Sequence[tuple[bytes, bytes]]) -> None:
        from sglang.srt.disaggregation.kv_events import BlockRemoved

        names = [self._announced[tier].pop(key, None) for key in keys]
        hashes = [name for name in names if name is not None]
        if hashes:
            self._events.append(BlockRemoved(block_hashes=hashes, medium=MEDIA[tier]))


def blocks_of(operation: Any, page_size: int) -> list[Block]:
    """Return what a backup, SGLang's `StorageOperation`, has stored; nothing if it is left out."""
    from sglang.srt.mem_cache.utils import hash_str_to_int64

    key = operation.token_ids
    if operation.prefix_keys is None:
        return []  # what comes before is not known
    if getattr(key, "extra_key", None) is not None or getattr(key, "cache_salt", None) is not None:
        return []
    pages = operation.completed_tokens // page_size
    parent = hash_str_to_int64(operation.prefix_keys[-1]) if operation.prefix_keys else None
    tokens, blocks = list(key), []
    for i, page in enumerate(operation.hash_value[:pages]):
        name = hash_str_to_int64(page)
        part = tokens[i * page_size : (i + 1) * page_size]
        blocks.append(Block(bytes.fromhex(page), name, parent, part))
        parent = name
    return blocks


def tiers_of(config: Config) -> list[str]:
    """Return which of `MEDIA` the agent has."""
    configured = (config.nvme.directory, config.minio.endpoint)
    return [tier for tier, place in zip(MEDIA, configured, strict=True) if place]


def are_wanted() -> bool:
    """Tell whether this rank publishes SGLang's events."""
    from sglang.srt.disaggregation.kv_events import is_kv_publisher_rank
    from sglang.srt.runtime_context import get_observability

    return bool(is_kv_publisher_rank(get_observability().kv_events_config))

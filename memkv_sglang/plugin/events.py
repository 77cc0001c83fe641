"""Publish KV events in SGLang's own stream that say which blocks are on disk or in MinIO.

A block is announced on a medium once the agent reports that the tier holds the page. It is
withdrawn when the agent reports that the disk no longer holds the page, or when this server's
storage is cleared. Blocks have the hashes and tokens of SGLang's own events. Requests with a salt
or an adapter have no events, because SGLang's events and its storage name their blocks differently.
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
from memkv_sglang.config.shards import has_minio
from memkv_sglang.page import Chain

log = logging.getLogger(__name__)

LOCAL = "nvme"

MEDIA = {LOCAL: "DISK", "minio": "EXTERNAL"}
"""The `StorageMedium` in SGLang's events, by tier."""

POLL_SECONDS = 1.0
"""Seconds between checks whether pages have reached their tier."""

POLL_PAGES = 64
"""Pages per check. A page that is not in the presence cache costs a request to MinIO."""

MISSES = 32
"""Number of misses after which a round ends. Uploads are in order, so later backups are not there
either."""

PATIENCE = 600.0
"""Seconds to wait for pages to reach a tier before giving up."""

SWEEP_SECONDS = 10.0
SWEEP_PAGES = 2048
"""Seconds between checks whether announced pages are still on the disk, and the pages per check."""

MAX_WAITING = 4096
"""Maximum backups that wait for a check. If there are more, the oldest are not announced."""

MAX_ANNOUNCED = 200_000
"""Maximum announced pages to remember per medium."""

MAX_EVENTS = 100_000
"""Maximum events that wait for SGLang, which takes them in every iteration of its scheduler."""


class Block(NamedTuple):
    """A page as KV events identify it."""

    hash: bytes
    name: int
    parent: int | None
    tokens: list[Any]


class _Backup(NamedTuple):
    """Consecutive blocks of a chain that wait to be announced on a tier."""

    namespace: bytes
    tier: str
    blocks: Sequence[Block]
    since: float


class Announcer:
    """Announces blocks. Asks the agent in a thread of its own, so no method blocks."""

    def __init__(self, client: AgentClient, tiers: Sequence[str]) -> None:
        """Start the thread. `tiers` are the names of the agent's tiers, as in `MEDIA`."""
        self._client = client
        self._changed = threading.Condition()
        self._waiting: deque[_Backup] = deque(maxlen=MAX_WAITING)
        self._events: deque[Any] = deque(maxlen=MAX_EVENTS)
        self._announced: dict[str, OrderedDict[tuple[bytes, bytes], int]] = {
            tier: OrderedDict() for tier in tiers
        }
        self._clears = 0
        self._has_new = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memkv-events", daemon=True)
        self._thread.start()

    def stored(self, namespace: bytes, blocks: Sequence[Block]) -> None:
        """Announce consecutive blocks of a chain on each tier as soon as it holds them."""
        if not blocks:
            return
        with self._changed:
            now = time.monotonic()
            self._waiting.extend(_Backup(namespace, tier, blocks, now) for tier in self._announced)
            self._has_new = True
            self._changed.notify()

    def cleared(self) -> None:
        """Withdraw every announced block, because this server's pages are now hidden."""
        with self._changed:
            self._clears += 1
            self._waiting.clear()
            for tier, announced in self._announced.items():
                self._withdraw(tier, list(announced))

    def take(self) -> list[Any]:
        """Return the events since the last call."""
        if not self._events:
            return []
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def close(self) -> None:
        """Stop the thread. Returns at once."""
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
                log.exception(
                    "memkv: no more KV events of the tiers because of an unexpected error"
                )
                return
            with self._changed:
                pause = POLL_SECONDS if self._waiting else SWEEP_SECONDS
                self._changed.wait_for(lambda: self._has_new or self._closed, pause)
                self._has_new = False

    def _poll(self) -> None:
        """Check each waiting backup once, beginning with the oldest."""
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
        """Check again later, except on the disk, which stores pages in the spill or never."""
        may_come = left.blocks and left.tier != LOCAL
        if may_come and time.monotonic() - left.since < PATIENCE:
            self._waiting.append(left)

    def _on_tier(self, backup: _Backup) -> int:
        """Return how many blocks of the backup, from the first on, the tier holds."""
        found, ask = 0, 1
        while found < len(backup.blocks):
            asked = [block.hash for block in backup.blocks[found : found + ask]]
            chain = Chain(backup.namespace, asked)
            present = self._client.present(chain, POLL_SECONDS, backup.tier)
            count = sum(1 for _ in takewhile(bool, present))
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
        """Check whether some announced pages are still on the disk. MinIO would need requests."""
        with self._changed:
            announced = self._announced.get(LOCAL, OrderedDict())
            keys = [announced.popitem(last=False) for _ in range(min(SWEEP_PAGES, len(announced)))]
            announced.update(keys)
        for namespace in {namespace for (namespace, _), _ in keys}:
            hashes = [page for (of, page), _ in keys if of == namespace]
            present = self._client.present(Chain(namespace, hashes), POLL_SECONDS, LOCAL)
            if self._client.problem:
                return  # Without an agent, a miss does not mean that the page is gone.
            missing = [(namespace, h) for h, held in zip(hashes, present, strict=True) if not held]
            with self._changed:
                self._withdraw(LOCAL, missing)

    def _withdraw(self, tier: str, keys: Sequence[tuple[bytes, bytes]]) -> None:
        from sglang.srt.disaggregation.kv_events import BlockRemoved

        names = [self._announced[tier].pop(key, None) for key in keys]
        hashes = [name for name in names if name is not None]
        if hashes:
            self._events.append(BlockRemoved(block_hashes=hashes, medium=MEDIA[tier]))


def blocks_of(operation: Any, page_size: int) -> list[Block]:
    """Return the blocks that a backup (SGLang's `StorageOperation`) has stored.

    The list is empty if the request has no events, or if its prefix is not known.
    """
    from sglang.srt.mem_cache.utils import hash_str_to_int64

    key = operation.token_ids
    if operation.prefix_keys is None:
        return []
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
    """Return the names of the tiers that are configured."""
    configured = (config.nvme.directory, has_minio(config.minio))
    return [tier for tier, place in zip(MEDIA, configured, strict=True) if place]


def are_published() -> bool:
    """Return whether this rank publishes SGLang's KV events."""
    from sglang.srt.disaggregation.kv_events import is_kv_publisher_rank
    from sglang.srt.runtime_context import get_observability

    return bool(is_kv_publisher_rank(get_observability().kv_events_config))

"""Check that nodes share pages: one node's agent stores a page, and other agents load it."""

import mmap
import os
import random
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memkv_sglang.cli.output import human_time
from memkv_sglang.cli.running import running_agent
from memkv_sglang.config.schema import Config
from memkv_sglang.finding import Finding
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import PAGE_HASH_SIZE, Buffer, Chain
from memkv_sglang.tiers.base import LoadResult, SpillResult

if TYPE_CHECKING:
    from memkv_sglang.client.client import AgentClient

PAGE_BYTES = 1 << 20

TOKEN_BYTES = 8

UPLOAD_SECONDS = 30.0
"""Seconds for the page to be uploaded."""

LOOKUP_SECONDS = 4.0

_POLL = 0.2

_WHAT = "fleet"


def make_token() -> str:
    """Return a random name for one check."""
    return secrets.token_hex(TOKEN_BYTES)


def is_token(text: str) -> bool:
    """Return whether this is a name that `make_token` could have made."""
    return len(text) == 2 * TOKEN_BYTES and all(char in "0123456789abcdef" for char in text)


class SharedPage:
    """The page of one check, whose key and content are derived from the token."""

    def __init__(self, token: str) -> None:
        """Derive the page from a token of `make_token`."""
        self.token = token
        self.namespace = Namespace(
            model=f"memkv doctor --fleet {token}",
            kv_dtype="uint8",
            layout="page_first",
            page_size=1,
            page_bytes=PAGE_BYTES,
            layers=(0, 1),
        )
        generator = random.Random(token)  # noqa: S311 - content, not a secret
        self.chain = Chain(self.namespace.digest, [generator.randbytes(PAGE_HASH_SIZE)])
        self.content = generator.randbytes(PAGE_BYTES)


def write_page(client: "AgentClient", page: SharedPage) -> Finding:
    """Make this node's agent store the page in the shared tier."""
    report = client.status()
    if report is None or all(tier.name != "minio" for tier in report.engine.tiers):
        advice = "set minio.endpoint, and restart the agent"
        return Finding("FAIL", _WHAT, "this node's agent has no MinIO tier", advice)
    client.describe(page.namespace)
    with _memory(client, page.content) as (_, buffers):
        result = client.spill(page.chain, buffers)[0]
        if result > SpillResult.PRESENT:
            detail = f"the agent did not store the page ({result.name})"
            return Finding("FAIL", _WHAT, detail, "see the agent's log, and `memkv stats`")
        # With engine.upload = "second_use", a page is uploaded when it is used again.
        client.load(page.chain, buffers)
    if not _is_shared(client, page):
        advice = (
            "see `memkv stats`: MinIO may be down, the upload queue may be long, or this node may "
            'upload late or not at all (engine.upload = "before_eviction", minio.role = "reader")'
        )
        detail = f"the page did not reach MinIO within {human_time(UPLOAD_SECONDS)}"
        return Finding("FAIL", _WHAT, detail, advice)
    # Short enough that the token is not on a line of its own in 80 columns.
    advice = f"on the others: memkv doctor --fleet-read {page.token}"
    return Finding("ok", _WHAT, "this node's agent stored a page in MinIO", advice)


def _is_shared(client: "AgentClient", page: SharedPage) -> bool:
    """Wait until the page is in the shared tier, behind other pages in the upload queue."""
    deadline = time.monotonic() + UPLOAD_SECONDS
    while not client.present(page.chain, LOOKUP_SECONDS, "minio")[0]:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def read_page(client: "AgentClient", page: SharedPage) -> Finding:
    """Make this node's agent load the page that another node stored, and compare its content."""
    if not client.lookup(page.chain, LOOKUP_SECONDS).length:
        advice = (
            "compare minio.endpoint, minio.bucket and minio.prefix of both agents (`memkv stats`), "
            "and check that the other command still waits"
        )
        return Finding("FAIL", _WHAT, "this node's agent does not find the page", advice)
    begin = time.perf_counter()
    with _memory(client, bytes(PAGE_BYTES)) as (memory, buffers):
        load = client.load(page.chain, buffers)[0]
        seconds = time.perf_counter() - begin
        same = memory[:] == page.content
    if load.result is not LoadResult.LOADED:
        detail = f"this node's agent finds the page but cannot load it ({load.result.name})"
        advice = "compare minio.encryption_key_file of both nodes; the agent's log has the reason"
        return Finding("FAIL", _WHAT, detail, advice)
    if not same:
        return Finding(
            "FAIL", _WHAT, "the page's content differs from what was stored", "report a bug"
        )
    source = "MinIO" if load.tier == "minio" else f"this node's {load.tier}"
    return Finding("ok", _WHAT, f"loaded the page from {source} in {human_time(seconds)}")


def write_for_fleet(config: Config, token: str) -> Finding:
    """Store a token's page through the running agent. Raises `click.ClickException`."""
    with running_agent(config) as client:
        return write_page(client, SharedPage(token))


def read_for_fleet(config: Config, token: str) -> Finding:
    """Load a token's page through the running agent. Raises `click.ClickException`."""
    with running_agent(config) as client:
        return read_page(client, SharedPage(token))


def remove_for_fleet(config: Config, token: str) -> None:
    """Remove a token's page from this node and MinIO."""
    with running_agent(config) as client:
        client.empty(SharedPage(token).namespace.digest, UPLOAD_SECONDS)


@contextmanager
def _memory(client: "AgentClient", content: bytes) -> Iterator[tuple[Any, list[list[Buffer]]]]:
    """Share memory that is filled with `content` with the agent."""
    descriptor = os.memfd_create("memkv-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, len(content))
        memory = mmap.mmap(descriptor, len(content))
        memory[:] = content
        pool = client.register_pool(descriptor, len(content))
    finally:
        os.close(descriptor)
    try:
        yield memory, [[Buffer(pool, 0, len(content))]]
    finally:
        client.release_pool(pool)

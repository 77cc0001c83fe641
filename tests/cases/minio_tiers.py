"""A MinIO tier behind a proxy that can change the responses."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
from memkv_testbed.http_proxy import HttpFaultProxy
from memkv_testbed.tcp_proxy import TcpProxy

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio import MinioTier

PAGE = 16 << 10
NAMESPACE = make_namespace(PAGE)
LIMIT = 30.0

Proxy = HttpFaultProxy | TcpProxy


def soon(seconds: float = LIMIT) -> float:
    """Return a deadline that many seconds from now."""
    return time.monotonic() + seconds


@contextmanager
def opened(
    config: MinioConfig, proxy: Proxy | None = None, **settings: object
) -> Iterator[MinioTier]:
    """Open a tier, through `proxy` if given."""
    if proxy is not None:
        settings["endpoint"] = proxy.url
    tier = MinioTier(msgspec.structs.replace(config, **settings))
    try:
        tier.check(soon())
        yield tier
    finally:
        tier.close()


def chain_of(count: int, seed: str) -> Chain:
    return make_chain(NAMESPACE, count, seed)


def spill(tier: MinioTier, chain: Chain, seconds: float = LIMIT) -> list[SpillResult]:
    pages = [make_page(key, [PAGE], filled=True) for key in chain.keys()]
    return tier.spill(pages, soon(seconds))


def load(tier: MinioTier, chain: Chain, seconds: float = LIMIT) -> list[LoadResult]:
    """Load pages and check the content of those reported as loaded."""
    pages = [make_page(key, [PAGE], filled=False) for key in chain.keys()]
    results = tier.load(pages, soon(seconds))
    for page, result in zip(pages, results, strict=True):
        assert holds_content(page) == (result == LoadResult.LOADED)
    return results


def with_field(name: bytes, value: bytes | None) -> Callable[[bytes], bytes]:
    """Return a function that sets a header field of a response, or removes it if None."""

    def edit(head: bytes) -> bytes:
        lines = [line for line in head[:-4].split(b"\r\n") if not _names(line, name)]
        if value is not None:
            lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    return edit


def _names(line: bytes, name: bytes) -> bool:
    return line.partition(b":")[0].lower() == name.lower()

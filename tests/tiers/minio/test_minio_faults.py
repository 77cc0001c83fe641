"""Network faults cause misses and counts, never wrong bytes or hangs."""

import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.s3_server import free_port
from memkv_testbed.tcp_proxy import Fault, TcpProxy

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.testing.pages import (
    holds_content,
    make_chain,
    make_hashes,
    make_namespace,
    make_page,
)
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier

LENGTHS = (40_000, 25_536)
CHAIN = make_chain(make_namespace(page_bytes=sum(LENGTHS)), 8)
CANARY = 0x5A
GUARD = 4096
LATE = 0.5
"""Seconds that a busy machine may take to notice a deadline."""

FAULTS = [
    Fault(action, after)
    for action in ("close", "reset", "stall", "drip")
    for after in (0, 100, 5_000, 50_000)
]


def soon(seconds: float = 30) -> float:
    return time.monotonic() + seconds


def eventually(condition: Callable[[], bool]) -> None:
    give_up = soon(10)
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


class Pool:
    """Pages in one block of memory with guards around each buffer, as in a host pool."""

    def __init__(self, keys: list[PageKey]) -> None:
        self.memory = bytearray([CANARY]) * (len(keys) * (sum(LENGTHS) + 3 * GUARD))
        view, offset = memoryview(self.memory), 0
        self.pages, self.spans = [], []
        for key in keys:
            buffers = []
            for length in LENGTHS:
                offset += GUARD
                buffers.append(view[offset : offset + length])
                self.spans.append((offset, offset + length))
                offset += length
            self.pages.append(Page(key, tuple(buffers)))

    def reuse(self) -> None:
        """Reuse the pages for another request, which overwrites them."""
        self.memory[:] = bytes([CANARY]) * len(self.memory)

    def untouched(self) -> bool:
        return self.memory.count(CANARY) == len(self.memory)

    def guards_intact(self) -> bool:
        copy = bytearray(self.memory)
        for begin, end in self.spans:
            copy[begin:end] = bytes([CANARY]) * (end - begin)
        return copy.count(CANARY) == len(copy)


@pytest.fixture
def proxy(minio_server: MinioServer) -> Iterator[TcpProxy]:
    with TcpProxy(minio_server.host, minio_server.port) as proxy:
        yield proxy


@pytest.fixture
def tier(
    minio_config: MinioConfig, proxy: TcpProxy, open_tier: Callable[[MinioConfig], MinioTier]
) -> MinioTier:
    """A tier with a proxy in front of the server, a stored chain, and reused connections."""
    tier = open_tier(
        msgspec.structs.replace(
            minio_config, endpoint=proxy.url, connections=3, stall_timeout=0.25, negative_ttl=0.0
        )
    )
    pages = [make_page(key, LENGTHS, filled=True) for key in CHAIN.keys()]
    give_up = soon()
    # A spill may stall on a busy machine.
    while max(tier.spill(pages, soon())) > SpillResult.PRESENT:
        assert time.monotonic() < give_up
    return tier


def load(tier: MinioTier, pool: Pool, seconds: float) -> list[LoadResult]:
    begin = time.monotonic()
    results = tier.load(pool.pages, begin + seconds)
    assert time.monotonic() - begin < seconds + LATE
    return results


def assert_recovered(tier: MinioTier) -> None:
    pool = Pool(CHAIN.keys())
    assert load(tier, pool, 30) == [LoadResult.LOADED] * 8
    assert all(map(holds_content, pool.pages))
    assert pool.guards_intact()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_load_through_a_failing_network(tier: MinioTier, proxy: TcpProxy, fault: Fault) -> None:
    pool = Pool(CHAIN.keys())
    proxy.fault = fault
    results = load(tier, pool, 0.6)
    pool.reuse()
    assert results[0] == LoadResult.FAILED
    assert set(results) <= {LoadResult.FAILED, LoadResult.SKIPPED}
    proxy.fault = None  # the proxy now sends the bytes that it held back
    assert_recovered(tier)
    assert tier.telemetry.counts()["load_failed"] >= 1
    assert pool.untouched()


@pytest.mark.parametrize("action", ["stall", "drip"])
def test_deadline_comes_before_the_stall_timeout(
    tier: MinioTier, proxy: TcpProxy, action: str
) -> None:
    pool = Pool(CHAIN.keys())
    proxy.fault = Fault(action, 20_000)  # type: ignore[arg-type]  # one of its literals
    assert load(tier, pool, 0.1)[0] == LoadResult.FAILED
    pool.reuse()
    proxy.fault = None
    assert_recovered(tier)
    assert pool.untouched()


HEAD = b"HTTP/1.1 200 OK\r\n"
GOOD = b"x-amz-meta-memkv-format: 1\r\nx-amz-meta-memkv-length: 65536\r\n"
REPLIES = {
    "garbage": b"\x00\xff" * 100 + b"\r\n\r\n",
    "endless head": HEAD + b"x: y\r\n" * 5000 + b"\r\n",
    "chunked": HEAD + GOOD + b"Transfer-Encoding: chunked\r\n\r\n10000\r\n" + b"x" * 65536,
    "redirect": b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "forbidden": b"HTTP/1.1 403 No\r\nContent-Length: 25\r\n\r\n<Code>AccessDenied</Code>\n",
    "busy": b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n",
    "too many": b"HTTP/1.1 429 Slow Down\r\nContent-Length: 0\r\n\r\n",
    "huge error": b"HTTP/1.1 500 No\r\nContent-Length: 999999999\r\n\r\n" + b"x" * 1000,
    "no length": HEAD + GOOD + b"\r\n" + b"x" * 65536,
    "shorter": HEAD + GOOD + b"Content-Length: 65535\r\n\r\n" + b"x" * 65535,
    "longer": HEAD + GOOD + b"Content-Length: 65537\r\n\r\n" + b"x" * 65537,
    "much longer": HEAD + GOOD + b"Content-Length: 400000\r\n\r\n" + b"x" * 400_000,
    "more than declared": HEAD + GOOD + b"Content-Length: 65536\r\n\r\n" + b"x" * 90_000,
    "wrong content": HEAD + GOOD + b"Content-Length: 65536\r\n\r\n" + b"x" * 65_536,
    "another format": HEAD + b"x-amz-meta-memkv-format: 2\r\nContent-Length: 65536\r\n\r\n",
}


@pytest.mark.parametrize("reply", REPLIES)
def test_responses_that_are_not_the_page(tier: MinioTier, proxy: TcpProxy, reply: str) -> None:
    pool = Pool(CHAIN.keys())
    proxy.reply = REPLIES[reply]
    results = load(tier, pool, 2)
    # Not a response of an object store, so no page is quarantined.
    assert results[0] == LoadResult.FAILED
    assert LoadResult.LOADED not in results
    assert pool.guards_intact()
    pages = [make_page(key, LENGTHS, filled=True) for key in make_chain(make_namespace(), 4).keys()]
    if not reply.startswith(("shorter", "longer", "much", "more", "wrong", "another")):
        assert set(tier.spill(pages, soon(2))) == {SpillResult.FAILED}
    pool.reuse()
    proxy.reply = None
    assert_recovered(tier)
    assert pool.untouched()


def test_full_server_refuses(tier: MinioTier, proxy: TcpProxy) -> None:
    proxy.reply = b"HTTP/1.1 507 Full\r\nContent-Length: 0\r\n\r\n"
    page = make_page(make_chain(make_namespace(), 1).keys()[0], LENGTHS, filled=True)
    assert tier.spill([page], soon()) == [SpillResult.REFUSED]


def test_idle_connections_that_the_server_closed_are_replaced(
    tier: MinioTier, proxy: TcpProxy
) -> None:
    assert_recovered(tier)
    proxy.drop_connections()
    eventually(lambda: proxy.connections == 0)
    assert_recovered(tier)
    proxy.drop_connections()
    eventually(lambda: proxy.connections == 0)
    fresh = make_chain(make_namespace(model="other"), 6)
    pages = [make_page(key, LENGTHS, filled=True) for key in fresh.keys()]
    assert tier.spill(pages, soon()) == [SpillResult.STORED] * 6
    proxy.drop_connections()
    eventually(lambda: proxy.connections == 0)
    assert tier.present(make_chain(make_namespace(model="x"), 6).keys(), soon()) == [False] * 6
    assert "load_failed" not in tier.telemetry.counts()


@pytest.mark.parametrize("direction", ["request", "response"])
@pytest.mark.parametrize("action", ["close", "reset"])
def test_request_that_crosses_the_end_of_an_idle_connection_is_sent_again(
    tier: MinioTier, proxy: TcpProxy, action: str, direction: str
) -> None:
    key = CHAIN.keys()[0]
    fault = Fault(action, 0, direction, once=True)  # type: ignore[arg-type]  # its literals
    proxy.fault = fault
    page = make_page(key, LENGTHS, filled=False)
    assert tier.load([page], soon()) == [LoadResult.LOADED]
    assert holds_content(page)
    proxy.fault = fault
    assert tier.lookup(make_chain(make_namespace(model="other"), 1), soon()) == (0, True)
    proxy.fault = fault
    fresh = make_page(make_chain(make_namespace(model="b"), 1).keys()[0], LENGTHS, filled=True)
    assert tier.spill([fresh], soon()) == [SpillResult.STORED]
    assert proxy.fault is None


@pytest.mark.parametrize("after", [0, 300, 30_000])
@pytest.mark.parametrize("action", ["close", "reset", "stall"])
def test_interrupted_spill_leaves_nothing(
    tier: MinioTier,
    proxy: TcpProxy,
    minio_config: MinioConfig,
    open_tier: Callable[[MinioConfig], MinioTier],
    action: str,
    after: int,
) -> None:
    chain = make_chain(make_namespace(model="broken off"), 5)
    pages = [make_page(key, LENGTHS, filled=True) for key in chain.keys()]
    proxy.fault = Fault(action, after, "request")  # type: ignore[arg-type]  # one of its literals
    begin = time.monotonic()
    assert set(tier.spill(pages, begin + 0.6)) == {SpillResult.FAILED}
    assert time.monotonic() - begin < 0.6 + LATE
    other = open_tier(minio_config)
    assert other.present(chain.keys(), soon()) == [False] * 5
    proxy.fault = None
    eventually(lambda: tier.spill(pages, soon())[-1] <= SpillResult.PRESENT)
    assert other.present(chain.keys(), soon()) == [True] * 5


def test_lookup_ends_at_its_deadline(tier: MinioTier, proxy: TcpProxy) -> None:
    unknown = Chain(CHAIN.namespace, [*CHAIN.hashes, *make_hashes(50, "other")])
    proxy.fault = Fault("stall")
    begin = time.monotonic()
    assert tier.lookup(unknown, begin + 0.1) == (8, False)
    assert time.monotonic() - begin < 0.1 + LATE
    proxy.fault = None
    assert tier.lookup(unknown, soon()) == (8, True)


def test_stalled_lookup_is_an_error(tier: MinioTier, proxy: TcpProxy) -> None:
    proxy.fault = Fault("stall")
    with pytest.raises(TierError, match="nothing moved"):
        tier.lookup(make_chain(make_namespace(), 5), soon())


def test_server_that_cannot_be_reached(
    minio_config: MinioConfig, open_tier: Callable[[MinioConfig], MinioTier]
) -> None:
    config = msgspec.structs.replace(minio_config, endpoint=f"http://127.0.0.1:{free_port()}")
    tier = open_tier(config)
    chain = make_chain(make_namespace(), 3)
    pages = [make_page(key, LENGTHS, filled=True) for key in chain.keys()]
    for call in (
        lambda: tier.lookup(chain, soon()),
        lambda: tier.present(chain.keys(), soon()),
        lambda: tier.check(soon()),
        tier.namespaces,
    ):
        with pytest.raises(TierError):
            call()
    assert tier.load(pages, soon()) == [LoadResult.FAILED, *[LoadResult.SKIPPED] * 2]
    assert tier.spill(pages, soon()) == [SpillResult.FAILED] * 3


def test_server_restarts_under_a_live_tier(
    open_tier: Callable[[MinioConfig], MinioTier],
) -> None:
    with MinioServer() as server:
        config = MinioConfig(
            endpoint=server.endpoint, access_key=server.access_key, secret_key=server.secret_key
        )
        tier = open_tier(config)
        pages = [make_page(key, LENGTHS, filled=True) for key in CHAIN.keys()]
        assert tier.spill(pages, soon()) == [SpillResult.STORED] * 8
        server.kill()
        assert load(tier, Pool(CHAIN.keys()), 30)[0] == LoadResult.FAILED
        with pytest.raises(TierError):
            tier.lookup(make_chain(make_namespace(), 3), soon())
        server.start()
        assert_recovered(tier)

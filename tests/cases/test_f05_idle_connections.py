"""A load balancer silently drops idle connections: no call fails, and no circuit opens."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.tcp_proxy import Fault, TcpProxy

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.engine.breaker import BreakerState, BreakerTier, CircuitBreaker
from memkv_sglang.testing.pages import make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.http import connection
from memkv_sglang.tiers.minio.http.transport import KEEP_ALIVE
from memkv_sglang.tiers.minio.objects import bulk_client
from tests.cases.minio_tiers import PAGE, chain_of, load, opened, soon, spill

CHAIN = chain_of(12, "idle")
OTHER = chain_of(5, "other")
STALL = 0.3


@pytest.fixture
def proxy(minio_server: MinioServer) -> Iterator[TcpProxy]:
    with TcpProxy(minio_server.host, minio_server.port) as proxy:
        yield proxy


@pytest.fixture(params=["compiled", "page by page"])
def tier(
    request: pytest.FixtureRequest,
    minio_config: MinioConfig,
    proxy: TcpProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[MinioTier]:
    """A tier with pages, and with connections that were used before."""
    if request.param == "page by page":
        monkeypatch.setattr(bulk_client, "WHY_NOT", "not compiled")
    with opened(minio_config, proxy, connections=3, stall_timeout=STALL, negative_ttl=0.0) as tier:
        # A spill may stall on a busy machine.
        while set(spill(tier, CHAIN)) != {SpillResult.PRESENT}:
            pass
        assert tier.access.pool.idle()
        yield tier


@pytest.fixture
def guarded(tier: MinioTier) -> Iterator[BreakerTier]:
    """The tier behind a breaker that opens at the first failure and never closes again."""
    yield BreakerTier(tier, CircuitBreaker("minio", 1, 1e6))


def try_load(tier: BreakerTier) -> None:
    pages = [make_page(key, [PAGE], filled=False) for key in CHAIN.keys()]
    assert tier.load(pages, soon()) == [LoadResult.LOADED] * 12


def try_spill(tier: BreakerTier) -> None:
    pages = [make_page(key, [PAGE], filled=True) for key in OTHER.keys()]
    assert tier.spill(pages, soon()) == [SpillResult.STORED] * 5


def try_lookup(tier: BreakerTier) -> None:
    tier.invalidate(CHAIN.keys())
    assert tier.lookup(CHAIN, soon()) == (12, True)


def try_present(tier: BreakerTier) -> None:
    tier.invalidate(CHAIN.keys())
    assert tier.present(CHAIN.keys(), soon()) == [True] * 12


CALLS = [try_load, try_spill, try_lookup, try_present]


@pytest.mark.parametrize("call", CALLS)
def test_a_dropped_idle_connection_is_not_the_servers_fault(
    guarded: BreakerTier, tier: MinioTier, proxy: TcpProxy, call: Callable[[BreakerTier], None]
) -> None:
    proxy.forget_connections()
    call(guarded)
    assert guarded.breaker.state is BreakerState.CLOSED
    assert not [name for name in tier.telemetry.counts() if name.endswith("failed")]


def test_a_lookup_with_a_small_budget_after_a_pause_answers_in_time(
    guarded: BreakerTier, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a silence, half of the call's time is left for a fresh connection, however short the
    call is.
    """
    monkeypatch.setattr(connection, "PAUSE", 0.0)
    guarded.invalidate(CHAIN.keys())
    proxy.forget_connections()
    assert guarded.lookup(CHAIN, soon(0.9 * STALL)) == (12, True)
    assert guarded.breaker.state is BreakerState.CLOSED


def test_only_some_connections_are_forgotten(
    tier: MinioTier, guarded: BreakerTier, proxy: TcpProxy
) -> None:
    """The other connections continue with their pages."""
    while tier.access.pool.idle() > 1:
        [(server, lent)] = tier.access.pool.take_several(1, soon())
        lent.close()
        tier.access.pool.give_back(server, lent, None)
    proxy.forget_connections()
    with tier.access.pool.lend(soon(), fresh=True), tier.access.pool.lend(soon(), fresh=True):
        pass
    try_load(guarded)
    assert guarded.breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_stays_silent_is_at_fault(
    guarded: BreakerTier, proxy: TcpProxy, call: Callable[[BreakerTier], None]
) -> None:
    """If a fresh connection is silent, it counts as a failure and the circuit opens."""
    proxy.fault = Fault("stall")
    with pytest.raises((AssertionError, TierError)):
        call(guarded)
    assert guarded.breaker.state is BreakerState.OPEN


def test_a_response_that_stops_in_the_middle_is_a_fault(
    guarded: BreakerTier, proxy: TcpProxy
) -> None:
    proxy.fault = Fault("stall", after=2000)
    with pytest.raises(AssertionError):
        try_load(guarded)
    assert guarded.breaker.state is BreakerState.OPEN


def test_a_connection_that_was_idle_for_long_is_not_reused(
    minio_config: MinioConfig, proxy: TcpProxy
) -> None:
    with opened(minio_config, proxy, connections=3, idle_timeout=0.05) as tier:
        spill(tier, CHAIN)
        time.sleep(0.05)
        proxy.forget_connections()
        begin = time.monotonic()
        assert load(tier, CHAIN) == [LoadResult.LOADED] * 12
        # Less than the default stall_timeout, so no page waited that long.
        assert time.monotonic() - begin < 2


def test_the_kernel_probes_idle_connections(minio_config: MinioConfig) -> None:
    with opened(minio_config) as tier, tier.access.pool.lend(soon()) as lent:
        sock = socket.socket(fileno=lent.transport.fileno)
        try:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            for option, value in KEEP_ALIVE.items():
                assert sock.getsockopt(socket.IPPROTO_TCP, option) == value
        finally:
            sock.detach()

"""With wrong dates in one response or in all, no page is removed early and no access time is
updated.
"""

import time
from collections.abc import Iterator
from email.utils import formatdate

import pytest
from memkv_testbed.http_proxy import NO_FAULT, HttpFault, HttpFaultProxy
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.retention.pins import Pin, PinStore
from memkv_sglang.tiers.minio.retention.shards import Shard
from tests.cases.minio_tiers import LIMIT, chain_of, load, opened, spill, with_field

DAY = 86400.0
CHAIN = chain_of(6, "dates")


def date(seconds: float) -> bytes:
    """Return the HTTP date that many seconds from now."""
    return formatdate(time.time() + seconds, usegmt=True).encode()


def error(status: bytes, seconds: float) -> bytes:
    return b"HTTP/1.1 %b X\r\nDate: %b\r\nContent-Length: 0\r\n\r\n" % (status, date(seconds))


@pytest.fixture
def proxy(minio_server: MinioServer) -> Iterator[HttpFaultProxy]:
    with HttpFaultProxy(minio_server.host, minio_server.port) as proxy:
        yield proxy


@pytest.fixture
def tier(minio_config: MinioConfig, proxy: HttpFaultProxy) -> Iterator[MinioTier]:
    """A node that has just stored pages."""
    with opened(minio_config, proxy) as tier:
        assert set(spill(tier, CHAIN)) == {SpillResult.STORED}
        yield tier


def present(config: MinioConfig) -> list[bool]:
    with opened(config) as other:
        return other.present(CHAIN.keys(), time.monotonic() + LIMIT)


def collect(tier: MinioTier, max_age: float) -> None:
    """Collect like `memkv gc`; it may report that it cannot."""
    try:
        config = CollectorConfig(max_age=max_age, use_period=1, interval=1)
        tier.retention.collector(config).collect(lambda *_: None)
    except TierError as error:
        assert "\n" not in str(error)


ALL = ("GET", "HEAD", "PUT")


@pytest.mark.parametrize(
    "methods",
    [
        pytest.param(("HEAD",), marks=pytest.mark.slow),
        pytest.param(("GET",), marks=pytest.mark.slow),
        ALL,
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "value",
    [date(400 * DAY), date(2 * DAY), date(600), date(-400 * DAY), b"", b"tomorrow", None],
    ids=["400 days", "2 days", "10 minutes", "-400 days", "empty", "garbage", "none"],
)
def test_no_page_is_removed_early(
    tier: MinioTier,
    proxy: HttpFaultProxy,
    minio_config: MinioConfig,
    value: bytes | None,
    methods: tuple[str, ...],
) -> None:
    proxy.fault = HttpFault(methods=methods, edit_response=with_field(b"Date", value))
    for _ in range(3):
        collect(tier, max_age=300)
    proxy.fault = NO_FAULT
    collect(tier, max_age=300)
    assert all(present(minio_config))


@pytest.mark.parametrize(
    "status",
    [
        b"503",
        b"404",
        pytest.param(b"403", marks=pytest.mark.slow),
        pytest.param(b"302", marks=pytest.mark.slow),
        pytest.param(b"504", marks=pytest.mark.slow),
    ],
)
def test_no_page_is_removed_because_of_a_proxys_date(
    tier: MinioTier, proxy: HttpFaultProxy, minio_config: MinioConfig, status: bytes
) -> None:
    proxy.fault = HttpFault(methods=("HEAD",), answer=error(status, 400 * DAY))
    collect(tier, max_age=300)
    proxy.fault = NO_FAULT
    collect(tier, max_age=300)
    assert all(present(minio_config))


def test_a_listing_with_impossible_times_removes_nothing(
    tier: MinioTier, proxy: HttpFaultProxy, minio_config: MinioConfig
) -> None:
    year = time.strftime("<LastModified>%Y-").encode()
    proxy.fault = HttpFault(
        methods=("GET",), edit_content=lambda body: body.replace(year, b"<LastModified>1970-")
    )
    tier.retention.rebuilder(CollectorConfig()).run(lambda *_: None)
    collect(tier, max_age=300)
    assert all(present(minio_config))


def test_expired_pages_are_still_removed(tier: MinioTier, minio_config: MinioConfig) -> None:
    deadline = time.monotonic() + LIMIT
    while any(present(minio_config)):
        collect(tier, max_age=1)
        assert time.monotonic() < deadline


def test_wrong_dates_do_not_get_into_logs(tier: MinioTier, proxy: HttpFaultProxy) -> None:
    proxy.fault = HttpFault(edit_response=with_field(b"Date", date(400 * DAY)))
    assert set(load(tier, CHAIN)) == {LoadResult.LOADED}
    tier.record_access(CHAIN, range(len(CHAIN.hashes)))
    tier.flush_accesses(LIMIT)  # may fail: it waits for a time that can be trusted
    proxy.fault = NO_FAULT
    give_up = time.monotonic() + LIMIT
    while not tier.flush_accesses(LIMIT):
        assert time.monotonic() < give_up
    logs = tier.retention.parts().logs
    times = {int(t) for found in logs.read(logs.listed(), 0, 256) for t in found["used"]}
    assert times
    assert all(abs(used - time.time()) < LIMIT * 2 for used in times)


@pytest.mark.parametrize("methods", [("GET",), ALL], ids=str)
def test_a_pin_does_not_end_by_a_wrong_date(
    tier: MinioTier, proxy: HttpFaultProxy, minio_config: MinioConfig, methods: tuple[str, ...]
) -> None:
    pin = Pin(
        namespaces=[CHAIN.namespace.hex()], hashes=[h.hex() for h in CHAIN.hashes], seconds=3600
    )
    store = PinStore(*tier.access.control())
    store.add(pin)
    proxy.fault = HttpFault(methods=methods, edit_response=with_field(b"Date", date(400 * DAY)))
    collect(tier, max_age=300)
    proxy.fault = NO_FAULT
    assert [stored.name for stored in store.all() if stored.left > 3000] == [pin.name]


def test_a_lease_does_not_run_out_by_a_wrong_date(
    tier: MinioTier, proxy: HttpFaultProxy, minio_config: MinioConfig
) -> None:
    with opened(minio_config) as other:
        lease, rival = (_shard(one) for one in (other, tier))
        lease.acquire()
        proxy.fault = HttpFault(edit_response=with_field(b"Date", date(2 * DAY)))
        with pytest.raises(TierError):
            rival.acquire()
        lease.release()


def _shard(tier: MinioTier) -> Shard:
    bucket, records, names = tier.access.control()
    return Shard(records, bucket, names, 0, 60)

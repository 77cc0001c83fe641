"""Slow opening, name resolution or credentials never delay a call beyond its deadline."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import msgspec
import pytest
from minio.credentials import Credentials  # type: ignore[attr-defined]  # missing from its __all__
from minio.credentials.providers import Provider

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.admin.bucket import Bucket
from memkv_sglang.tiers.minio.auth import signing
from memkv_sglang.tiers.minio.http.background import BackgroundCall

OpenTier = Callable[[MinioConfig], MinioTier]
LENGTHS = (1000, 24)
CHAIN = make_chain(make_namespace(page_bytes=sum(LENGTHS)), 4)
BUDGET = 0.2
LATE = 1.0
"""Seconds that a busy machine may take to notice a deadline."""


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """The slow part waits for this event, which is set at the end of the test at the latest."""
    event = threading.Event()
    yield event
    event.set()


def assert_deadlines_hold(tier: MinioTier) -> None:
    begin = time.monotonic()
    assert tier.lookup(CHAIN, begin + BUDGET) == (0, False)
    assert time.monotonic() - begin < BUDGET + LATE
    pages = [make_page(key, LENGTHS, filled=False) for key in CHAIN.keys()]
    begin = time.monotonic()
    assert tier.load(pages, begin + BUDGET)[0] == LoadResult.FAILED
    assert time.monotonic() - begin < BUDGET + LATE


def assert_spills(tier: MinioTier) -> None:
    pages = [make_page(key, LENGTHS, filled=True) for key in CHAIN.keys()]
    assert set(tier.spill(pages, time.monotonic() + 30)) == {SpillResult.STORED}


def test_slow_name_resolution(
    minio_config: MinioConfig,
    open_tier: OpenTier,
    hold: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = urlsplit(minio_config.endpoint).port
    config = msgspec.structs.replace(minio_config, endpoint=f"http://localhost:{port}")
    tier = open_tier(config)
    tier.check(time.monotonic() + 30)
    resolve = socket.getaddrinfo

    def slow(*args: object, **options: object) -> object:
        hold.wait(30)
        return resolve(*args, **options)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert_deadlines_hold(tier)
    hold.set()
    assert_spills(tier)


def test_slow_credentials(
    minio_config: MinioConfig,
    open_tier: OpenTier,
    hold: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow(Provider):
        """Provides expired credentials at once, and valid ones slowly."""

        is_slow = False

        def retrieve(self) -> Credentials:
            keys = minio_config.access_key, minio_config.secret_key
            if self.is_slow:
                hold.wait(30)
                return Credentials(*keys)
            return Credentials(*keys, None, datetime.now(UTC) - timedelta(seconds=1))

    provider = Slow()
    monkeypatch.setattr(
        "memkv_sglang.tiers.minio.bucket_access.credential_provider", lambda _: provider
    )
    static = signing.credential_provider(minio_config)
    monkeypatch.setattr(
        "memkv_sglang.tiers.minio.bucket_access.Bucket",
        lambda config, _, context: Bucket(config, static, context),
    )
    tier = open_tier(minio_config)
    tier.check(time.monotonic() + 30)
    provider.is_slow = True
    assert_deadlines_hold(tier)
    hold.set()
    assert_spills(tier)


def test_closing_does_not_wait_for_a_server_that_never_answers() -> None:
    with ExitStack() as held:
        server = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = server.getsockname()[1]
        tier = MinioTier(
            MinioConfig(endpoint=f"http://127.0.0.1:{port}", access_key="a", secret_key="b" * 8)
        )
        server.settimeout(20)
        connection = held.enter_context(server.accept()[0])
        begin = time.monotonic()
        tier.close()
        assert time.monotonic() - begin < LATE
        # Read the request, then the end: the tier has closed its connection.
        connection.settimeout(20)
        while connection.recv(1 << 16):
            pass
        assert time.monotonic() - begin < 10


def test_call_is_retried_after_a_thread_failed_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    call = BackgroundCall(lambda: 7)
    with monkeypatch.context() as patch:

        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            call.begin()
    assert call.begin().result(timeout=60) == 7

"""The log of uses: a flush succeeds only if everything recorded before it was written."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from memkv_sglang.config.schema import MIB
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http import ServerClock
from memkv_sglang.tiers.minio.objects import Telemetry
from memkv_sglang.tiers.minio.retention import use_log
from memkv_sglang.tiers.minio.retention.entries import merge, page_keys
from memkv_sglang.tiers.minio.retention.use_log import LogTarget, UseLog

CHAIN = make_chain(make_namespace(MIB), 50)
OTHER = make_chain(make_namespace(MIB), 50, "other")


class Logs:
    """Keeps the pages of all logs; raises the next of `errors` instead, if there is one."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.pages: set[Any] = set()
        self.entries: list[Any] = []

    def write(self, found: Any, _now: float) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.pages.update(page_keys(found))
        self.entries.append(found)


@pytest.fixture
def logs() -> Logs:
    return Logs()


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def uses(logs: Logs, telemetry: Telemetry) -> Iterator[UseLog]:
    target = LogTarget(SimpleNamespace(write=logs.write), time.time)  # type: ignore[arg-type]
    uses = UseLog(lambda: target, ServerClock(), telemetry)
    yield uses
    uses.close(5)


@pytest.mark.parametrize("error", [TierError("down"), ValueError("a defect")])
def test_failed_flush_is_reported_and_the_uses_are_written_later(
    uses: UseLog, logs: Logs, error: Exception
) -> None:
    logs.errors.append(error)
    uses.used(CHAIN, range(len(CHAIN.hashes)))
    assert not uses.flush(20)
    assert not logs.pages
    assert uses.flush(20)
    assert logs.pages == set(CHAIN.keys())


def test_flush_writes_all_uses_even_if_they_do_not_fit_at_once(
    uses: UseLog, telemetry: Telemetry, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second use is accepted once the first has left the queue, and waits there."""
    monkeypatch.setattr(use_log, "QUEUE_LIMIT", len(CHAIN.hashes))
    uses.used(CHAIN, range(len(CHAIN.hashes)))
    dropped, give_up = -1, time.monotonic() + 20
    while dropped != (dropped := telemetry.counts().get("uses_not_recorded", 0)):
        assert time.monotonic() < give_up
        uses.used(OTHER, range(len(OTHER.hashes)))
    assert uses.flush(20)
    assert logs.pages == {*CHAIN.keys(), *OTHER.keys()}


@pytest.mark.parametrize("last", ["stored", "removed"])
def test_stores_and_removals_in_one_second_count_in_their_order(
    uses: UseLog, logs: Logs, last: str
) -> None:
    page = CHAIN.keys()[0]
    for _ in range(3):
        for what in ("removed", "stored") if last == "stored" else ("stored", "removed"):
            if what == "stored":
                uses.stored([page], MIB)
            else:
                uses.removed([page])
    assert uses.flush(20)
    assert page_keys(merge(*logs.entries)) == ([page] if last == "stored" else [])

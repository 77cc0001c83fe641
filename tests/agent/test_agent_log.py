"""Rate limits and formatting of the agent's log."""

import logging
import time

import pytest

from memkv_sglang.agent.log import BURST, PERIOD, FloodFilter, LogfmtFormatter
from memkv_sglang.log_limit import KINDS, LogLimit
from memkv_sglang.printable import LIMIT


class Clock:
    """A fake monotonic clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def line(event: str, level: int = logging.WARNING) -> logging.LogRecord:
    record = logging.LogRecord("memkv_sglang.agent", level, "", 0, event, None, None)
    record.fields = {"uid": 0}
    return record


def test_repeated_event_is_suppressed_and_counted_but_others_pass(clock: Clock) -> None:
    flood = FloodFilter()
    passed = [flood.filter(line("connection aborted")) for _ in range(BURST + 70)]
    assert passed == [True] * BURST + [False] * 70
    assert flood.filter(line("minio load failed"))
    clock.now += PERIOD
    later = line("connection aborted")
    assert flood.filter(later)
    assert "uid=0 suppressed=70" in LogfmtFormatter().format(later)
    assert not flood.filter(line("connection aborted"))
    clock.now += BURST * PERIOD
    again = [flood.filter(line("connection aborted")) for _ in range(BURST + 1)]
    assert again == [True] * BURST + [False]


def test_debug_lines_are_not_suppressed() -> None:
    flood = FloodFilter()
    assert all(flood.filter(line("call", logging.DEBUG)) for _ in range(2 * BURST))


def test_unique_events_use_bounded_memory_and_are_suppressed(clock: Clock) -> None:
    flood = FloodFilter()
    passed = sum(flood.filter(line(f"event {i}")) for i in range(3 * KINDS))
    assert passed == KINDS + BURST
    clock.now += BURST * PERIOD
    assert flood.filter(line("an event of its own"))


def test_suppressed_events_outlast_idle_ones(clock: Clock) -> None:
    limit = LogLimit(10.0)
    for i in range(KINDS - 1):
        assert limit.admit(i) == 0
    clock.now += 10.0
    assert limit.admit("busy") == 0
    assert limit.admit("new") == 0
    assert limit.admit("busy") is None


def test_long_values_are_truncated() -> None:
    record = line("event")
    record.fields = {"reason": "x" * 100_000}
    assert len(LogfmtFormatter().format(record)) < LIMIT + 200

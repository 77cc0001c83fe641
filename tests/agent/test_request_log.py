"""The request log has the right calls, and its lines can be read back."""

import io
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from memkv_sglang.agent.log import FORMATTERS, FloodFilter
from memkv_sglang.agent.request_log import MAX_REQUESTS, RequestLog
from memkv_sglang.agent.request_log import log as request_log
from memkv_sglang.cli.request_times import RequestTimes, log_lines, read_requests
from memkv_sglang.engine.trace import record_skipped, record_step

CLIENT = 42


class Log:
    """What a `RequestLog` writes, with a clock that the test sets."""

    def __init__(self, which: str, log_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._requests = RequestLog(which)
        self._now = 0.0
        self.text = io.StringIO()
        self.handler = logging.StreamHandler(self.text)
        self.handler.setFormatter(FORMATTERS[log_format]())
        self.handler.addFilter(FloodFilter())
        monkeypatch.setattr(time, "perf_counter", lambda: self._now)

    def call(self, operation: str, request: str, seconds: float, client: int = CLIENT) -> None:
        with self._requests.call(operation, request, client, 8) as call:
            began, self._now = self._now, self._now + seconds
            record_step("nvme", 6, 4, began)
            record_step("minio", 4, 2, began, "minio: circuit open")
            record_skipped(1)
            call.done, call.complete = 5, False

    @property
    def lines(self) -> list[bytes]:
        return list(log_lines(io.BytesIO(self.text.getvalue().encode())))

    def read(self, **which: Any) -> list[RequestTimes]:
        return read_requests(self.lines, **which)


@pytest.fixture(params=["text", "json"])
def log_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_log(log_format: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    logs: list[Log] = []

    def make(which: str) -> Log:
        log = Log(which, log_format, monkeypatch)
        request_log.addHandler(log.handler)
        logs.append(log)
        return log

    monkeypatch.setattr(request_log, "level", logging.INFO)
    yield make
    for log in logs:
        request_log.removeHandler(log.handler)


def test_lines_tell_where_the_time_went(make_log: Any) -> None:
    log = make_log("all")
    log.call("lookup", "an id", 0.25)
    log.call("load", "an id", 0.5)
    log.call("load", "an id", 0.25)
    log.call("load", 'q"uoted\\', 2.0)
    (times,) = log.read(request="an id")
    assert (times.request, times.client, times.seconds) == ("an id", CLIENT, 1.0)
    load = times.operations["load"]
    assert (load.calls, load.pages, load.done, load.seconds) == (2, 16, 10, 0.75)
    minio = times.steps["load"]["minio"]
    assert (minio.calls, minio.pages, minio.done, minio.seconds) == (2, 8, 4, 0.75)
    assert (times.skipped, times.incomplete) == (3, 3)
    assert times.problems == ["minio: circuit open"]
    assert [one.request for one in log.read()] == ['q"uoted\\', "an id"]
    assert log.read(since=time.time() + 3600) == []


def test_only_calls_of_slow_requests_are_logged(make_log: Any) -> None:
    log = make_log("slow")
    for _ in range(4):
        log.call("load", "slow in all", 0.03)
    log.call("load", "slow in all", 0.01)
    log.call("load", "slow in all", 0.01, client=7)
    log.call("lookup", "fast", 0.09)
    log.call("lookup", "slow at once", 0.2)
    log.call("lookup", "", 0.2)
    by_id = {one.request: one for one in log.read()}
    assert by_id.keys() == {"slow in all", "slow at once"}
    slow = by_id["slow in all"]
    assert slow.seconds == pytest.approx(0.13)
    assert (slow.calls_before, slow.operations["load"].calls) == (3, 2)
    assert by_id["slow at once"].calls_before == 0
    assert len(log.lines) == 4


def test_memory_is_bounded(make_log: Any) -> None:
    log = make_log("slow")
    for number in range(2 * MAX_REQUESTS):
        log.call("load", str(number), 0.05)
    assert len(log._requests._before) == MAX_REQUESTS
    assert log.lines == []


def test_nothing_is_logged_if_turned_off(make_log: Any) -> None:
    log = make_log("none")
    log.call("load", "r", 10.0)
    assert log.lines == []


def test_damaged_lines_are_ignored(make_log: Any) -> None:
    log = make_log("all")
    log.call("load", "r", 1.0)
    (line,) = log.lines
    damaged = [line.replace(b"load", b"fly"), line.replace(b"42", b"x"), line[: len(line) // 2]]
    damaged += [line.replace(b"2", b"\xff", 1), b'{"operation": ["load"]}\n', b"{" * 10_000 + b"}"]
    (times,) = read_requests([*damaged, line, b"Nov 30 host memkv[1]: " + line])
    assert times.operations["load"].calls == 2


def test_reading_a_long_log_starts_near_its_end(
    make_log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_log("all")
    log.call("load", "early", 1.0)
    log.call("load", "late", 1.0)
    monkeypatch.setattr("memkv_sglang.cli.request_times.READ_LIMIT", len(log.lines[1]) + 20)
    assert [one.request for one in log.read()] == ["late"]

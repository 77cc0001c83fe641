"""Which times in responses are trusted."""

from email.utils import formatdate

import pytest

from memkv_sglang.tiers.minio.http.errors import ProtocolError
from memkv_sglang.tiers.minio.http.framing import ResponseHead, parse_head
from memkv_sglang.tiers.minio.http.times import SKEW_LIMIT, ServerClock

DAY = 86400.0


class Clocks:
    """This node's clocks, and a `ServerClock` over them."""

    def __init__(self, wall: float) -> None:
        self.wall = wall
        self.elapsed = 1000.0
        self.server = ServerClock(lambda: self.wall, lambda: self.elapsed)

    def step(self, seconds: float) -> None:
        self.wall += seconds
        self.elapsed += seconds

    def now(self, seconds: float, status: int = 200) -> float:
        return self.server.now(answer(seconds, status))


def answer(seconds: float, status: int = 200) -> ResponseHead:
    told = formatdate(seconds, usegmt=True).encode()
    return parse_head(b"HTTP/1.1 %d X\r\nDate: %b\r\nContent-Length: 0\r\n" % (status, told))


NOW = 1_800_000_000.0


def test_a_reading_that_agrees_with_this_node_is_trusted_at_once() -> None:
    assert Clocks(NOW).now(NOW + 3) == NOW + 3


def test_a_differing_reading_needs_confirmation() -> None:
    clocks = Clocks(NOW)
    with pytest.raises(ProtocolError, match="confirmed"):
        clocks.now(NOW + 300)
    clocks.step(20)
    assert clocks.now(NOW + 320) == NOW + 320


@pytest.mark.parametrize("ahead", [SKEW_LIMIT + 1, -SKEW_LIMIT - 1, 400 * DAY, -400 * DAY])
def test_a_far_date_is_never_trusted(ahead: float) -> None:
    clocks = Clocks(NOW)
    for _ in range(5):
        with pytest.raises(ProtocolError, match="NTP"):
            clocks.now(clocks.wall + ahead)
        clocks.step(1)
    assert clocks.now(clocks.wall) == clocks.wall


@pytest.mark.parametrize("status", [206, 302, 403, 500, 503, 504])
def test_dates_of_errors_are_ignored(status: int) -> None:
    with pytest.raises(ProtocolError):
        Clocks(NOW).now(NOW, status)


@pytest.mark.parametrize("wrong", [60.0, 600.0, -600.0, 400 * DAY])
def test_one_wrong_reading_does_not_change_a_trusted_time(wrong: float) -> None:
    clocks = Clocks(NOW)
    clocks.now(NOW)
    clocks.step(10)
    assert clocks.now(NOW + wrong) == NOW + 10
    clocks.step(10)
    assert clocks.now(NOW + 20) == NOW + 20


def test_clock_survives_a_suspended_machine() -> None:
    clocks = Clocks(NOW)
    clocks.now(NOW)
    clocks.wall += DAY  # NTP corrected the wall clock while the elapsed clock stood still
    assert clocks.now(NOW + DAY) == NOW + DAY


def test_the_earliest_clock_decides_what_is_old() -> None:
    clocks = Clocks(NOW)
    assert clocks.server.earliest(answer(NOW + 20)) == NOW
    assert clocks.server.earliest(answer(NOW - 20)) == NOW - 20

"""What the agent logs when a client makes it log without end."""

import logging

from memkv_sglang.agent.log import BURST, EVENTS, PERIOD, FloodFilter, LogfmtFormatter


def line(event: str, moment: float, level: int = logging.WARNING) -> logging.LogRecord:
    record = logging.LogRecord("memkv_sglang.agent", level, "", 0, event, None, None)
    record.created = moment
    record.fields = {"uid": 0}
    return record


def test_flood_of_one_event_is_cut_and_counted_and_hides_no_other() -> None:
    flood = FloodFilter()
    passed = [flood.filter(line("connection broken off", i / 1000)) for i in range(BURST + 70)]
    assert passed == [True] * BURST + [False] * 70
    assert flood.filter(line("minio load failed", 1.0))
    later = line("connection broken off", PERIOD + 1)
    assert flood.filter(later)
    assert "uid=0 left_out=70" in LogfmtFormatter().format(later)
    again = line("connection broken off", PERIOD + 2)
    assert flood.filter(again)
    assert "left_out" not in LogfmtFormatter().format(again)


def test_what_was_asked_for_in_detail_is_not_cut() -> None:
    flood = FloodFilter()
    assert all(flood.filter(line("call", 0.0, logging.DEBUG)) for _ in range(2 * BURST))


def test_events_that_never_repeat_take_no_memory() -> None:
    flood = FloodFilter()
    for i in range(3 * EVENTS):
        assert flood.filter(line(f"event {i}", 0.0))
    assert len(flood._seen) <= EVENTS + 1

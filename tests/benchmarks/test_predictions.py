"""Predictions of agents over shaped links follow from the links' rates."""

import statistics

import pytest

from benchmarks.predictions.links import LINKS, PAGE, PAGES, SERVER_LINK, Case, cases, predict
from memkv_sglang.planning.calibration import measured, published


def seconds(megabits: float) -> float:
    """Return the seconds of a call that gets this share of a link."""
    return PAGES * PAGE * 8 / (megabits * 1e6 * published().node.link_share.value)


def case(name: str) -> Case:
    return next(one for one in cases(quick=True) if one.name == name)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("one agent loads", [400]),
        ("four agents load", [SERVER_LINK / 4] * 4),
        ("four agents load the same pages", [SERVER_LINK / 4] * 4),
        ("four load, one over a narrow link", [(SERVER_LINK - 100) / 3] * 3 + [100]),
    ],
)
def test_links_are_shared_fairly(name: str, shares: list[float]) -> None:
    found = predict(case(name), published(), measured())
    for values, share in zip(found, shares, strict=True):
        # Until the sessions with wide links are done, the median call sees all of them.
        assert statistics.median(values) == pytest.approx(seconds(share), rel=0.01)


def test_thinking_sessions_wait_for_each_other() -> None:
    found = predict(case("twelve sessions think and load"), published(), measured())
    alone = seconds(min(LINKS["four equal links"]))
    times = [value for values in found for value in values]
    assert min(times) >= 0.999 * alone
    assert statistics.median(times) > 1.2 * alone

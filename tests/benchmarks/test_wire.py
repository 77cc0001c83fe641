"""The benchmark of lines with a limited rate, and its model of how calls keep shards busy."""

import shutil
from pathlib import Path
from statistics import fmean

import pytest
from memkv_testbed.machines import refusal

from benchmarks.base import MissingToolError, Options
from benchmarks.wire import run as wire
from benchmarks.wire.balance import busy_share
from memkv_sglang.config.schema import MIB


def share(callers: int, *, alike: bool, shards: int = 2) -> float:
    return fmean(busy_share(callers, shards, alike=alike, seed=seed) for seed in range(20))


def test_a_single_caller_waits_for_the_busiest_shard() -> None:
    # The larger part of 128 pages that two shards share has 68.5 pages on average (64 if they were
    # even).
    assert share(1, alike=False) == pytest.approx(64 / 68.5, abs=0.01)


def test_callers_fill_each_others_gaps_only_if_their_pages_split_differently() -> None:
    assert share(8, alike=True) == pytest.approx(share(1, alike=True), abs=0.001)
    assert share(1, alike=False) < share(2, alike=False) < share(8, alike=False) <= 1
    assert share(8, alike=False) > 0.99


def test_without_iperf3_the_benchmark_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(wire, "refusal", lambda: "")
    with pytest.raises(MissingToolError, match="iperf3 is missing; install it"):
        wire.run(Options(Path("/nonexistent"), repetitions=1))


def test_without_root_the_benchmark_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(MissingToolError, match=r"wire: skipped, .* need root"):
        wire.run(Options(Path("/nonexistent"), repetitions=1))


@pytest.mark.slow  # starts two servers and a cluster three times
@pytest.mark.skipif(bool(refusal()), reason=refusal())
@pytest.mark.skipif(shutil.which("iperf3") is None, reason="needs iperf3")
def test_the_benchmark_reports_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SIZES", {"1m": MIB})
    monkeypatch.setattr(wire, "POOL", 16 * MIB)
    monkeypatch.setattr(wire, "CALL_BYTES", 8 * MIB)
    monkeypatch.setattr(wire, "QUICK_SECONDS", 1)
    report = wire.run(Options(tmp_path, repetitions=1, quick=True))
    figures = report.figures
    for name in ("line_load_1m", "line_load_1m_halves", "line_upload_1m", "line_two_nodes_1m"):
        assert 0 < figures[name] < 1.2
    assert 0 < figures["line_least_share_1m"] <= 0.5
    assert list(tmp_path.iterdir()) == []

"""Each benchmark runs at tiny sizes and produces its figures, JSON and pictures."""

import json
import os
import xml.etree.ElementTree
from pathlib import Path

import pytest
from click.testing import CliRunner
from memkv_testbed.faults.base import Outcome
from memkv_testbed.faults.growth import Growth
from memkv_testbed.faults.rounds import AUDIT

from benchmarks import agent, cpu, faults, interference, lookup, minio, nvme, s3, sessions, visible
from benchmarks.__main__ import main
from benchmarks.base import MissingToolError, tool
from benchmarks.node import run as node
from benchmarks.report import Report
from benchmarks.targets import TARGETS, Comparison, Target, show_targets
from memkv_sglang.config.schema import MIB

FIGURES = {
    "nvme": {
        *(f"nvme_load_over_fio_{size}" for size in ("256k", "1m", "4m")),
        *(f"nvme_load_over_fio_{size}_small_pages" for size in ("256k", "1m", "4m")),
        *(f"nvme_spill_over_fio_{size}" for size in ("1m", "4m")),
        "nvme_load_over_nixl_1m",
        "nvme_load_over_nixl_4m",
        "nvme_load_over_file_1m",
    },
    "minio": {
        *(f"minio_load_over_wrk_{size}" for size in ("1m", "4m", "16m")),
        *(f"minio_load_over_seaweedfs_{size}" for size in ("256k", "1m", "8m")),
        *(f"minio_spill_over_seaweedfs_{size}" for size in ("1m", "8m")),
        "minio_load_over_seaweedfs_1m_tls",
        "minio_load_over_minio_py_1m",
        "minio_load_over_obstore_1m",
        "minio_cpu_per_gb_over_seaweedfs_1m",
        "spill_visible_over_direct_put",
    },
    "lookup": {
        "lookup_minio_2048_cold_over_seaweedfs",
        "lookup_minio_2048_cold_ms",
        "lookup_minio_2048_warm_ms",
        "lookup_nvme_2048_ms",
        "lookup_miss_round_trips",
        "lookup_repeated_miss_round_trips",
    },
    "interference": {
        "scheduler_speed_kept_nvme",
        "scheduler_speed_kept_minio",
        "scheduler_speed_kept_seaweedfs",
    },
    "s3": {
        f"s3_{verb}_{server}_over_minio"
        for verb in ("load", "spill")
        for server in ("seaweedfs", "versitygw", "versitygw_keep_alive")
    },
    "node": {
        f"node_{key}_{size}"
        for size in ("256k", "1m", "4m")
        for key in (
            "load_8_over_1",
            "load_cpu_8_over_1",
            "load_over_floor",
            "load_slowest_over_mean",
            "lock_ms_per_gb",
            "upload_8_over_1",
            "upload_lock_ms_per_gb",
            "ceiling_gb_s",
            "load_over_wrk_8",
            "tls_over_plain",
            "encrypted_over_plain",
        )
    },
    "agent": {"agent_calls_per_core_second", "index_bytes_per_page", "agent_idle_cpu_percent"},
}


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "QUICK_TOTAL", 16 * MIB)
    monkeypatch.setattr(nvme, "QUICK_DEPTHS", (4,))
    monkeypatch.setattr(minio, "QUICK_TOTAL", 16 * MIB)
    monkeypatch.setattr(minio, "TLS_PAGES", ("1m",))
    monkeypatch.setattr(cpu, "PAGES", 8)
    monkeypatch.setattr(visible, "PAGES", 8)
    monkeypatch.setattr(node, "QUICK_POOL", 8 * MIB)
    monkeypatch.setattr(node, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(lookup, "QUICK_LENGTHS", (16, 64))
    monkeypatch.setattr(lookup, "CLAIMED", 64)
    monkeypatch.setattr(s3, "QUICK_PAGES", 4)
    monkeypatch.setattr(s3, "SECONDS", 0.0)
    monkeypatch.setattr(interference, "PAGES", 4)
    monkeypatch.setattr(interference, "QUICK_SECONDS", 0.1)
    monkeypatch.setattr(agent, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(agent, "QUICK_INDEXED", 256)
    monkeypatch.setattr(agent, "QUICK_IDLE_SECONDS", 0.1)


SLOW = ("nvme", "minio", "interference", "lookup", "s3", "node")
"""These need fio, wrk or other servers, or take long. `agent` covers the code that they share."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FIGURES],
)
def test_a_benchmark_writes_figures_and_pictures(name: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    file = tmp_path / "out" / f"{name}.json"
    cores = os.sched_getaffinity(0)
    arguments = [name, "--quick", "--repetitions", "1", "--directory", str(disk)]
    result = CliRunner().invoke(main, [*arguments, "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output

    document = json.loads(file.read_text())
    assert FIGURES[name] <= document["figures"].keys()
    assert not document["left_out"]
    assert document["versions"]["memkv_sglang"] and document["machine"]["kernel"]
    for panel in document["panels"]:
        assert panel["cases"]
        for case in panel["cases"].values():
            assert all(document["runs"][case].values())
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    xml.etree.ElementTree.parse(file.with_suffix(".svg"))

    assert not list(disk.iterdir()), "files were left on the disk"
    assert os.sched_getaffinity(0) == cores


def test_every_target_of_these_benchmarks_is_measured() -> None:
    others = ("ttft", "sessions", "trace")
    keys = {target.key for target in TARGETS if not target.key.startswith(others)}
    assert keys <= set().union(*FIGURES.values())


def test_a_missed_target_is_marked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    show_targets({"nvme_load_over_fio_1m": 0.5, "lookup_miss_round_trips": 1})
    lines = capsys.readouterr().out.splitlines()
    assert any("nvme_load_over_fio_1m" in line and "MISSED" in line for line in lines)
    assert any("lookup_miss_round_trips" in line and "met" in line for line in lines)
    assert any("scheduler_speed_kept_nvme" in line and "not measured" in line for line in lines)


def test_comparisons() -> None:
    assert not Target("k", "", Comparison.UNDER, 2).met(2)
    assert Target("k", "", Comparison.AT_MOST, 2).met(2)
    assert Target("k", "", Comparison.AT_LEAST, 2).met(2)
    assert not Target("k", "", Comparison.AT_LEAST, 2).met(1.9)


def test_a_target_never_exceeds_the_possible() -> None:
    target = Target("k", "", Comparison.AT_LEAST, 43, bound="b")
    assert target.within({"b": 20}).value == 20
    assert target.within({"b": 50}).value == target.within({}).value == 43


@pytest.mark.parametrize(("load", "least"), [(0.5, 1.0), (4.0, 4.0)])
def test_sessions_are_bounded_by_compute_or_bandwidth(load: float, least: float) -> None:
    report = Report("sessions", "seconds a turn")
    seconds = {sessions.NONE: 40.0, sessions.HOST: 40.0, sessions.OURS: 5.0, sessions.LIMIT: 1.0}
    report.runs["case"] = {name: [value] for name, value in seconds.items()}
    report.runs[sessions.FIRST] = {sessions.OURS: [2.0] * 20, sessions.IDLE: [36.0]}
    sessions.claim(report, "case", 1000, load=load, bandwidth=1e9)
    figures = report.figures
    assert figures["sessions_over_no_storage"] == 8
    assert figures["sessions_bound_over_no_storage"] == 40 / least
    assert figures["sessions_p95_first_token_over_bound"] == pytest.approx(2 / (1.5 * 36))
    for panel in report.panels:
        assert all(report.runs[case] for case in panel.cases.values())


def test_faults_are_added_up() -> None:
    """Figures of rounds with every kind of damage, which real rounds never have."""
    growth = Growth()
    growth.sample([os.getpid()])
    with_harm = Outcome(
        fault="a",
        calls=10,
        hits=7,
        misses=2,
        wrong_pages=1,
        acknowledged_pages=9,
        acknowledged_pages_lost=2,
        destroyed_pages=3,
        hung_calls=4,
        changed_pages=5,
        violations=["removed: notes/readme"],
        lookups=[0.01] * 98 + [0.5] * 2,
        slowest_move=2.5,
        circuit_opened=0.5,
        first_hit=1.5,
    )
    without = Outcome("b", 10, 30, 0, 0, 9, 0, 0, 0, 0, (), [0.02] * 300, 0.1, None, 0.25)
    audit = without._replace(fault=AUDIT, acknowledged_pages=0, lookups=(), hits=19)
    report = faults._report([with_harm, without, without, audit], growth, rounds=3)
    assert AUDIT not in report.runs
    assert report.notes == ["a: removed: notes/readme"]
    assert report.figures == {
        "rounds": 3,
        "faults_injected": 3,
        "kinds_of_faults": 2,
        "pages_compared": 86,
        "pages_compared_at_the_end": 19,
        "calls": 40,
        "acknowledged_pages": 27,
        "wrong_pages": 1,
        "acknowledged_pages_lost": 2,
        "destroyed_pages": 3,
        "hung_calls": 4,
        "changed_pages": 5,
        "violations": 1,
        "lookup_p99_ms": 20.0,
        "over_budget_rounds": 1,
        "slowest_move_s": 2.5,
        "thread_growth": 0,
        "descriptor_growth": 0,
        "memory_growth_mb": 0,
        "rounds_of_the_oldest_agent": 1,
        "slowest_first_hit_s": 1.5,
    }


def test_a_missing_tool_is_one_line_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match="apt-get install fio"):
        tool("fio")
    result = CliRunner().invoke(main, ["nvme", "--quick", "--directory", str(tmp_path)])
    assert result.exit_code == 2
    assert "fio is missing" in result.output and "Traceback" not in result.output

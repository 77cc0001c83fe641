"""The GPU benchmark without a GPU: skipped in one line, and its copies into memory instead."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs an environment with SGLang 0.5.23")

from benchmarks.base import Options
from benchmarks.gpu import PAGE_SIZES, measure
from benchmarks.report import Report
from memkv_sglang.config.schema import MIB


def test_without_a_gpu_it_is_skipped_in_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stderr == "benchmarks: gpu: skipped, there is no CUDA device\n"


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_every_contestant_gives_the_pages_that_were_spilled(tmp_path: Path) -> None:
    """To memory in the place of a device's: `measure` compares it with what the tiers loaded."""
    report = Report("gpu", "GB/s")
    measure(report, Options(tmp_path, repetitions=1, quick=True), "cpu", 16 * MIB)
    assert set(report.runs) == set(PAGE_SIZES)
    assert all(values[0] > 0 for runs in report.runs.values() for values in runs.values())

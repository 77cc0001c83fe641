"""The GPU benchmark on a machine without a GPU: it is skipped, or copies to host memory."""

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


def test_without_a_gpu_the_benchmark_is_skipped() -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stderr == "benchmarks: gpu: skipped, there is no CUDA device\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_every_contestant_loads_the_spilled_pages(tmp_path: Path) -> None:
    """Copy to host memory instead of a GPU; `measure` compares it with the loaded pages."""
    report = Report("gpu", "GB/s")
    measure(report, Options(tmp_path, repetitions=1, quick=True), "cpu", 16 * MIB)
    assert set(report.runs) == set(PAGE_SIZES)
    assert all(values[0] > 0 for runs in report.runs.values() for values in runs.values())

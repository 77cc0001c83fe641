"""The GPU trial on a machine without a GPU: its steps on the CPU, and how it reports failures."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs an environment with SGLang 0.5.23")

ROOT = Path(__file__).parents[2]
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tools.gpu_trial", *arguments],
        capture_output=True,
        text=True,
        env=NO_GPU | environment,
    )


def steps(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text())
    assert document["device"] == "cpu"
    found: dict[str, Any] = document["steps"]
    return found


def test_without_a_gpu_the_trial_ends_with_one_line(tmp_path: Path) -> None:
    done = run(str(tmp_path / "result.json"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # imports torch three times
def test_a_failed_step_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    file, empty = tmp_path / "result.json", tmp_path / "empty"
    empty.mkdir()
    done = run(
        *(str(file), "--device", "cpu", "--quick", "--only", "pools", "environment"),
        MEMKV_TRIAL_SGLANG=str(empty),
    )
    assert done.returncode == 1
    found = steps(file)
    assert "No module named 'sglang.srt'" in found["pools"]["error"]
    assert found["environment"]["result"]["cores"] == os.cpu_count()


@pytest.mark.slow  # allocates pools, starts agents and a MinIO
def test_pools_and_transfers_keep_every_bit_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    only = ("--only", "pools", "transfers")
    done = run(str(file), "--device", "cpu", "--quick", "--directory", str(tmp_path), *only)
    assert done.returncode == 0, done.stdout
    found = steps(file)
    pools = found["pools"]["result"]
    assert set(pools) == {
        f"{kind} {layout}"
        for kind in ("mha", "mla")
        for layout in ("page_first", "page_first_direct")
    }
    transfers = found["transfers"]["result"]
    assert set(transfers) == {
        f"{tier} {kind}" for tier in ("nvme", "minio") for kind in ("mha", "mla")
    }
    assert all(one["layers_compared_on_the_device"] >= 61 for one in transfers.values())
    assert list(tmp_path.iterdir()) == [file], "files were left behind"


def test_the_archive_is_split_into_parts_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.gpu_trial import pack

    monkeypatch.setattr(pack, "LIMIT", 1000)
    archive = tmp_path / "archive"
    archive.write_bytes(os.urandom(2500))
    parts = pack._split(archive, tmp_path)
    assert [part.stat().st_size for part in parts] == [1000, 1000, 500]
    assert b"".join(part.read_bytes() for part in sorted(parts)) == archive.read_bytes()
    lines = (tmp_path / "memkv-trial.sha256").read_text().splitlines()
    assert lines[2] == f"{hashlib.sha256(parts[2].read_bytes()).hexdigest()}  {parts[2].name}"

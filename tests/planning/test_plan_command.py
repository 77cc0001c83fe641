"""`memkv plan` and `memkv bench --calibration`, as users run them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trace.requests import TRACE
from memkv_sglang.cli.main import main
from memkv_sglang.planning.calibration import MEASURED, fit_prefill, measured, published
from memkv_sglang.planning.scenario import make_scenario
from memkv_sglang.planning.sizing import servers_needed

LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "quantization_config": {"quant_method": "fp8"},
}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_more_tiers_hold_more_sessions(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "--context", 65536, "--sessions", 32)
    by_tier = list(found["sessions_per_gpu"].values())
    assert by_tier[2] > 2 * by_tier[0] > 0
    assert found["bytes_per_token"] == 327_680
    assert found["result"]["scenario"]["context"] == 65536
    assert sum(found["result"]["hits"].values()) == pytest.approx(1)


def test_copies_need_space_and_shards_no_network_between_servers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run_json(capsys, "--context", 8192, "--sessions", 4, "--shards", "--copies", 2)
    stored = found["live_bytes"] + found["uploaded_bytes_per_day"]
    assert found["bucket_bytes"] == pytest.approx(2 * stored)
    cluster = make_scenario(published(), measured(), model="llama-70b", nodes=8)
    shards = cluster.replace(layout="shards")
    copied = shards.replace(copies=2)
    needed = [servers_needed(each, get=400e9, put=50e9)[0] for each in (cluster, shards, copied)]
    assert needed[1] < needed[2] < needed[0]


def test_a_plan_repeats_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    options = ("--context", 65536, "--sessions", 8)
    first = run_json(capsys, *options, "--plot", picture)
    assert run_json(capsys, *options) == first
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_of_the_users_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A config.json with Llama 70B's shape gives Llama 70B's bytes."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_70B))
    found = run_json(capsys, "--model", file, "--context", 16384, "--sessions", 8)
    assert found["bytes_per_token"] == 327_680


def test_hits_of_a_trace_are_those_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(
        capsys, "--trace", TRACE, "--nvme", "20TiB", "--minio", "40TiB", "--host", "1MiB"
    )
    assert found["ideal_hits"] == pytest.approx(77953 / 121877)
    assert found["hits"]["nvme"] == pytest.approx(found["ideal_hits"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", "gpt-5"), "--model"),
        (("--gpu", "abacus"), "--gpu"),
        (("--gpus", "6"), "--gpus"),
        (("--context", "2048", "--new", "4096"), "--new"),
        (("--nodes", "0"), "--nodes"),
        (("--think", "soon"), "--think"),
        (("--nvme", "lots"), "--nvme"),
        (("--plot", "plan.xyz"), "--plot"),
        (("--trace", "absent.jsonl"), "absent.jsonl"),
        (("--calibration", "absent.toml"), "absent.toml"),
        (("--copies", "2"), "--shards"),
    ],
)
def test_bad_input_gets_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert named in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}\n",
        b"not json\n",
        b'{"hash_ids": "x"}\n',
        b"\xff\xfe\x00\n",
        b'{"memkv_record": 1}\n{"t": 1, "ns": "a", "n": 1, "hit": 0, "new": "abc"}\n',
        b'{"block_tokens": 64, "id": "a", "tool_tokens": 0, "system_tokens": 0, '
        b'"requests": [[0, 0, 0, 1, 1, [[1, -5]]]]}\n',
        # With mtime=0 these bytes, which are part of the test's name, are constant.
        gzip.compress(b'{"hash_ids": [1]}\n', mtime=0)[:-6],
        b'{"timestamp": 0, "input_length": 1, "output_length": 1, '
        b'"hash_ids": [18446744073709551615]}\n',
        b'{"block_tokens": 64, "id": "a", "tool_tokens": 0, "system_tokens": 0, '
        b'"requests": [[0, 0, 0, 1, 1, [[1, 2000000]]]]}\n',
    ],
)
def test_bad_traces_get_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_bytes(content)
    status, _, err = run(capsys, "--trace", file)
    assert status == 2
    assert str(file) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("cpu_s_per_gb = 0.24", "cpu_s_per_gb = nan"), ("bytes = 1048576", "bytes = 0")],
)
def test_bad_calibrations_get_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, value: str
) -> None:
    file = tmp_path / "node.toml"
    file.write_text(MEASURED.read_text().replace(key, value, 1))
    status, _, err = run(capsys, "--calibration", file)
    assert status == 2
    assert str(file) in err
    assert "client_load" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_key_value_heads", 0), ("num_attention_heads", 10_000), ("vocab_size", True)],
)
def test_bad_models_get_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, value: object
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**LLAMA_70B, key: value}))
    status, _, err = run(capsys, "--model", file)
    assert status == 2
    assert str(file) in err
    assert err.count("\n") == 1


def test_bench_writes_a_calibration_that_plan_reads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "node.toml"
    arguments = ["bench", "--nvme-directory", str(tmp_path / "nvme"), "--volume", "8MiB"]
    assert main([*arguments, "--page", "1MiB", "--calibration", str(file)]) == 0
    mine = measured(file)
    assert mine.disk[0].load_bytes_per_s > 0
    assert mine.disk[0].source in mine.sources
    assert mine.server_get == measured(MEASURED).server_get
    capsys.readouterr()
    found = run_json(capsys, "--calibration", file, "--context", 8192, "--sessions", 4)
    assert found["result"]["scenario"]["nvme_read"] == mine.disk[0].load_bytes_per_s


def test_the_fit_is_near_every_published_time() -> None:
    for model in published().models.values():
        for gpu in {row.gpu for row in model.prefill}:
            rows = [row for row in model.prefill if row.gpu == gpu]
            cost = fit_prefill(rows)
            for row in rows:
                assert cost.seconds(row.new, row.cached) == pytest.approx(row.seconds, rel=0.12)

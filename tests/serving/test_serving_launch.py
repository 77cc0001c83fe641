"""What the flag shows, sets and refuses on SGLang's own command line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from memkv_sglang.plugin.launch import CONFLICTS
from tests.serving.conftest import Models
from tests.serving.node import PAGE, prompt, reusable

CHANGES: dict[str, Sequence[str]] = {
    "disable_radix_cache": (),
    "enable_lmcache": (),
    "enable_flexkv": (),
    "radix_cache_backend": ("other",),
    "enable_unified_cache_external_linker": (),
    "hicache_storage_backend": ("file",),
    "hicache_mem_layout": ("layer_first",),
    "dcp_size": ("2",),
}
"""What makes each of the conflicts on a command line."""

BAD = (("--memkv-nvme-capacity", "much"), ("--memkv-config", "/none.toml"))
SIZES = (("--page-size", "32"), ("--chunked-prefill-size", "192"))
GONE = "sglang.srt.mem_cache.gone.Function"
ENGINE_TOKENS = prompt("engine")


def of_sglang(argvs: Sequence[Sequence[str]], *targets: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.arguments", *targets],
        input=json.dumps(argvs),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def ask_engine(models: Models, home: Path, tokens: list[int]) -> list[dict[str, Any]]:
    """Send an engine the same prompt twice, emptying its pools in between."""
    asked = {
        "model_path": str(models.mha),
        "dtype": "float32",
        "page_size": PAGE,
        "max_total_tokens": 8192,
        "mem_fraction_static": 0.8,
        "enable_memkv": True,
        "memkv_nvme_directory": str(home / "engine" / "pages"),
        "memkv_nvme_capacity": "64MiB",
    }
    environment = {
        "MEMKV_AGENT_SOCKET": str(home / "engine" / "run" / "agent.sock"),
        "MEMKV_AGENT_IDLE_TIMEOUT": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.engine"],
        input=json.dumps([asked, tokens]),
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


class Asked(NamedTuple):
    """Processes that run in parallel, because each needs long to import SGLang."""

    this_sglang: Future[dict[str, Any]]
    another_sglang: Future[dict[str, Any]]
    engine: Future[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def asked(models: Models, home: Path) -> Iterator[Asked]:
    nvme = ["--memkv-nvme-directory", str(home / "x")]
    basic = ["--model-path", str(models.mha), "--enable-memkv", *nvme]
    argvs = [basic[:2], basic]
    argvs += [[*basic, "--" + name.replace("_", "-"), *values] for name, values in CHANGES.items()]
    argvs += [[*basic, *more] for more in (*BAD, *SIZES)]
    with ThreadPoolExecutor(len(Asked._fields)) as processes:
        yield Asked(
            processes.submit(of_sglang, argvs),
            processes.submit(of_sglang, [basic], GONE),
            processes.submit(ask_engine, models, home, ENGINE_TOKENS),
        )


@pytest.fixture(scope="module")
def answers(asked: Asked) -> dict[str, Any]:
    answer = asked.this_sglang.result()
    outcomes = iter(answer["outcomes"])
    return {
        "help": answer["help"],
        "without": next(outcomes),
        "with": next(outcomes),
        "conflicts": {name: next(outcomes) for name in CHANGES},
        "bad": [next(outcomes) for _ in BAD],
        "sizes": [next(outcomes) for _ in SIZES],
    }


def test_help_shows_the_flags_with_their_defaults(answers: dict[str, Any]) -> None:
    text = " ".join(answers["help"].split())
    assert "--enable-memkv" in text
    assert "--memkv-minio-bucket" in text
    assert "(default: memkv)" in text
    assert "(default: 100GiB)" in text


def test_without_the_flag_nothing_is_set(answers: dict[str, Any]) -> None:
    outcome = answers["without"]
    assert not outcome["enable_hierarchical_cache"]
    assert outcome["hicache_storage_backend"] is None
    assert not outcome["log"]


def test_the_flag_sets_what_hicache_needs_and_says_so(answers: dict[str, Any]) -> None:
    outcome = answers["with"]
    assert outcome["enable_hierarchical_cache"]
    assert outcome["hicache_storage_backend"] == "dynamic"
    assert outcome["page_size"] == 256
    assert [line.split(":")[0] for line in outcome["log"].splitlines()] == ["memkv", "memkv"]
    assert "page size 256" in outcome["log"]


def test_user_settings_of_page_size_and_chunk_are_respected(answers: dict[str, Any]) -> None:
    assert [outcome["page_size"] for outcome in answers["sizes"]] == [32, 64]


def test_every_conflict_is_known_here() -> None:
    assert {conflict.name for conflict in CONFLICTS} == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_impossible_settings_are_refused_in_one_line(answers: dict[str, Any], name: str) -> None:
    outcome = answers["conflicts"][name]
    assert outcome["code"] == 2
    (line,) = outcome["stderr"].splitlines()
    assert line.startswith("error: --" + name.replace("_", "-"))


def test_bad_values_are_refused_in_one_line(answers: dict[str, Any]) -> None:
    for outcome in answers["bad"]:
        assert outcome["code"] == 2
        assert len(outcome["stderr"].splitlines()) == 1, outcome


def test_another_sglang_starts_without_the_tier_and_says_so(asked: Asked) -> None:
    (outcome,) = asked.another_sglang.result()["outcomes"]
    assert outcome["code"] == 0
    assert not outcome["enable_hierarchical_cache"]
    (line,) = outcome["log"].splitlines()
    assert "without the tier" in line
    assert GONE in line


def test_an_engine_takes_the_flags_as_arguments(asked: Asked) -> None:
    first, second = asked.engine.result()
    assert first["cached_tokens"] == 0
    assert second["cached_tokens_details"]["storage"] == reusable(len(ENGINE_TOKENS))
    assert second["output_ids"] == first["output_ids"]

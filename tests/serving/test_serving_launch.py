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
from sglang_cpu_platform import forking
from sglang_cpu_platform.fork_server import ForkServers

from memkv_sglang.plugin.launch import CONFLICTS
from tests.serving.conftest import Models
from tests.serving.node import LIMIT, PAGE, libraries, prompt, reusable

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
"""Arguments that cause each of the conflicts on a command line."""

BAD = (("--memkv-nvme-capacity", "much"), ("--memkv-config", "/none.toml"))
SIZES = (("--page-size", "32"), ("--chunked-prefill-size", "192"))
DECODE = ("--disaggregation-mode", "decode")
RADIX_CACHE = "--disaggregation-decode-enable-radix-cache"
DECODES: dict[str, Sequence[str]] = {
    "offload": DECODE,
    "radix cache": (*DECODE, RADIX_CACHE),
    "disabled radix cache": (*DECODE, "--disable-radix-cache"),
}
DECODE_CONFLICTS: dict[str, Sequence[str]] = {
    "--disaggregation-decode-host-receive-threshold": ("0.5",),
    "--enable-hierarchical-cache": (),
    # Prefill servers can become decode servers.
    "--enable-pd-role-switch": ("--disaggregation-mode", "prefill"),
    "--enable-unified-memory": (),
    "--disaggregation-decode-retraction-backup": ("host_pool",),
    "--disaggregation-decode-enable-offload-kvcache": (RADIX_CACHE,),
}
"""Flags that do not work on a decode server with the tier, and their values."""

HYBRIDS: dict[str, tuple[str, Sequence[str]]] = {
    "window": ("swa", ()),
    "small window": ("swa", ("--json-model-override-args", '{"sliding_window": 100}')),
    "only windows": (
        "swa",
        ("--json-model-override-args", json.dumps({"layer_types": ["sliding_attention"] * 4})),
    ),
    "states": ("states", ()),
}
"""Models with side pools: the model's directory, and more arguments."""

TWO_NODES = ("--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "127.0.0.1:1", "--tp-size")
NODES: dict[str, tuple[str, Sequence[str]]] = {
    "latent": ("mla", (*TWO_NODES, "2")),
    "latent, with MinIO": ("mla", (*TWO_NODES, "2", "--memkv-endpoint", "http://minio:9000")),
    "heads": ("mha", (*TWO_NODES, "2")),
    "latent, stages": ("mla", (*TWO_NODES, "1", "--pp-size", "2")),
}
"""Servers on two nodes: the model's directory, and more arguments."""

HYBRID_DECODES: dict[str, tuple[str, Sequence[str]]] = {
    "window": ("swa", DECODE),
    "window and radix cache": ("swa", (*DECODE, RADIX_CACHE)),
    "states": ("states", DECODE),
}
"""The same for decode servers, where SGLang cannot store such models' pages."""

GONE = "sglang.srt.mem_cache.gone.Function"
ENGINE_TOKENS = prompt("engine")
FORK = {forking.VARIABLE: "1"}


class Answers(NamedTuple):
    """What SGLang makes of command lines."""

    this_sglang: dict[str, Any]
    another_sglang: dict[str, Any]
    """An SGLang without one function that the tier requires."""


def of_sglang(
    forks: ForkServers,
    home: Path,
    argvs: Sequence[Sequence[str]],
    argvs_of_another: Sequence[Sequence[str]],
) -> Answers:
    questions = json.dumps([[argvs, []], [argvs_of_another, [GONE]]])
    argv = [sys.executable, "-m", "tests.serving.arguments", questions]
    with (home / "arguments.log").open("w+") as file:
        environment = os.environ | libraries(home) | {"OMP_NUM_THREADS": "1"}
        forks.start(argv, environment, file.fileno()).wait(LIMIT)
        file.seek(0)
        answers = [line for line in file if line.startswith("{")]  # skip SGLang's log lines
    return Answers(*map(json.loads, answers))


def ask_engine(
    models: Models, home: Path, tokens: list[int], variables: dict[str, str]
) -> list[dict[str, Any]]:
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
        env=os.environ | environment | variables,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def make_states_model(directory: Path) -> None:
    """Write the configuration of a model that keeps one state per sequence, without weights."""
    from transformers import Lfm2Config

    layers = ["conv", "full_attention"] * 2
    config = Lfm2Config(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=len(layers),
        layer_types=layers,
        architectures=["Lfm2ForCausalLM"],
    )
    config.save_pretrained(directory)


class Asked(NamedTuple):
    """Processes that run in parallel, because each needs long to import SGLang."""

    arguments: Future[Answers]
    engine: Future[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def asked(models: Models, home: Path, forks: ForkServers) -> Iterator[Asked]:
    nvme = ["--memkv-nvme-directory", str(home / "x")]
    basic = ["--model-path", str(models.mha), "--enable-memkv", *nvme]
    argvs = [basic[:2], basic]
    argvs += [[*basic, "--" + name.replace("_", "-"), *values] for name, values in CHANGES.items()]
    argvs += [[*basic, *more] for more in (*BAD, *SIZES)]
    argvs += [[*basic, *more] for more in DECODES.values()]
    argvs += [[*basic, *DECODE, flag, *more] for flag, more in DECODE_CONFLICTS.items()]
    make_states_model(models.swa.with_name("states"))
    for name, more in [*HYBRIDS.values(), *HYBRID_DECODES.values(), *NODES.values()]:
        argvs.append(["--model-path", str(models.swa.with_name(name)), *basic[2:], *more])
    with ThreadPoolExecutor(len(Asked._fields)) as processes:
        yield Asked(
            processes.submit(of_sglang, forks, home, argvs, [basic]),
            processes.submit(ask_engine, models, home, ENGINE_TOKENS, FORK),
        )


@pytest.fixture(scope="module")
def answers(asked: Asked) -> dict[str, Any]:
    answer = asked.arguments.result().this_sglang
    outcomes = iter(answer["outcomes"])
    return {
        "help": answer["help"],
        "without": next(outcomes),
        "with": next(outcomes),
        "conflicts": {name: next(outcomes) for name in CHANGES},
        "bad": [next(outcomes) for _ in BAD],
        "sizes": [next(outcomes) for _ in SIZES],
        "decodes": {name: next(outcomes) for name in DECODES},
        "decode conflicts": {name: next(outcomes) for name in DECODE_CONFLICTS},
        "hybrids": {name: next(outcomes) for name in HYBRIDS},
        "hybrid decodes": {name: next(outcomes) for name in HYBRID_DECODES},
        "nodes": {name: next(outcomes) for name in NODES},
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


@pytest.mark.parametrize("name", DECODES)
def test_a_decode_server_stores_in_the_way_that_sglang_allows(
    answers: dict[str, Any], name: str
) -> None:
    outcome = answers["decodes"][name]
    assert outcome["code"] == 0
    has_radix_cache = name == "radix cache"
    assert outcome["enable_hierarchical_cache"] == has_radix_cache
    assert outcome["disaggregation_decode_enable_offload_kvcache"] != has_radix_cache
    assert outcome["hicache_storage_backend"] == "dynamic"


@pytest.mark.parametrize("flag", DECODE_CONFLICTS)
def test_what_cannot_work_on_a_decode_server_is_refused_in_one_line(
    answers: dict[str, Any], flag: str
) -> None:
    outcome = answers["decode conflicts"][flag]
    assert outcome["code"] == 2
    (line,) = outcome["stderr"].splitlines()
    assert line.startswith(f"error: {flag}")


@pytest.mark.parametrize("name", HYBRID_DECODES)
def test_a_hybrid_model_that_a_decode_server_cannot_store_is_refused(
    answers: dict[str, Any], name: str
) -> None:
    outcome = answers["hybrid decodes"][name]
    assert outcome["code"] == 2
    *_, line = outcome["stderr"].splitlines()  # SGLang may print warnings before it
    assert line.startswith("error: --enable-memkv: SGLang")
    assert "Traceback" not in outcome["stderr"]


def test_the_page_size_of_hybrid_models(answers: dict[str, Any]) -> None:
    """The page size is at most the window. It is 1 if SGLang keeps one state per sequence; the log
    says why.
    """
    sizes = {name: outcome["page_size"] for name, outcome in answers["hybrids"].items()}
    assert sizes == {"window": 256, "small window": 64, "only windows": 256, "states": 1}
    (line,) = (line for line in answers["hybrids"]["states"]["log"].splitlines() if "page" in line)
    assert "this model needs page size 1" in line


def test_a_model_with_windows_only_starts_without_the_tier_and_says_so(
    answers: dict[str, Any],
) -> None:
    lines = answers["hybrids"]["only windows"]["log"].splitlines()
    assert [line for line in lines if "memkv: off" in line and "sliding window" in line]
    assert "memkv: off" not in answers["hybrids"]["window"]["log"]


def test_a_server_on_two_nodes_that_needs_minio_says_so(answers: dict[str, Any]) -> None:
    warned = {
        name for name, outcome in answers["nodes"].items() if "without MinIO" in outcome["log"]
    }
    assert warned == {"latent"}
    assert {outcome["code"] for outcome in answers["nodes"].values()} == {0}


def test_bad_values_are_refused_in_one_line(answers: dict[str, Any]) -> None:
    for outcome in answers["bad"]:
        assert outcome["code"] == 2
        assert len(outcome["stderr"].splitlines()) == 1, outcome


def test_another_sglang_starts_without_the_tier_and_says_so(asked: Asked) -> None:
    (outcome,) = asked.arguments.result().another_sglang["outcomes"]
    assert outcome["code"] == 0
    assert not outcome["enable_hierarchical_cache"]
    (line,) = outcome["log"].splitlines()
    assert "without the tier" in line
    assert GONE in line


def check_engine(answers: list[dict[str, Any]]) -> None:
    first, second = answers
    assert first["cached_tokens"] == 0
    assert second["cached_tokens_details"]["storage"] == reusable(len(ENGINE_TOKENS))
    assert second["output_ids"] == first["output_ids"]


def test_an_engine_takes_the_flags_as_arguments(asked: Asked) -> None:
    check_engine(asked.engine.result())


@pytest.mark.slow
def test_an_engine_that_spawns_its_processes(models: Models, home: Path) -> None:
    """Spawn processes, which SGLang does unless the CPU platform's variable asks for forks."""
    check_engine(ask_engine(models, home / "spawning", prompt("spawning"), {}))

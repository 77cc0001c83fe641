"""Fuzz targets for the files that `memkv plan` reads: traces, calibrations and models.

Values of valid files are replaced, removed or repeated, so that the files remain valid JSON or TOML
and damage gets past the syntax.
"""

import json
import math
import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.planning.calibration import MEASURED, measured, published
from memkv_sglang.planning.calibration_file import as_toml
from memkv_sglang.planning.config_json import read_config
from memkv_sglang.planning.replay import Tiers, replay, run_of
from memkv_sglang.planning.scenario import Scenario, make_scenario
from memkv_sglang.planning.traces import read_trace
from memkv_testbed.fuzz import Read, Target, damage

ODD: Sequence[Any] = (
    *(None, True, False, "", "é\n[b]\0", "1", [], {}, [[]], {"a": 1}, [1, "a"]),
    *(0, 1, -1, 255, 2**24, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.0, -0.0, 0.5, 5e-324, 1e-9, 1e18, 1e300, 1.7e308, -1.5),
)
"""Values to put in place of others."""

NOT_FINITE = (math.inf, -math.inf, math.nan)


def odd_document(document: Any, chance: random.Random, odd: Sequence[Any] = ODD) -> Any:
    """Return a copy with one to three values replaced, removed or repeated."""
    copy = deepcopy(document)
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(_places(copy, ()))
        if not places:
            return copy
        place = chance.choice(places)
        key: Any = place[-1]
        container: Any = copy
        for each in place[:-1]:
            container = container[each]
        match chance.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(chance.randrange(len(container) + 1), deepcopy(container[key]))
            case 2 if isinstance(container, dict):
                container[chance.choice(("extra", "", *container))] = deepcopy(container[key])
            case _:
                container[key] = deepcopy(chance.choice(odd))
    return copy


def _places(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value inside `value`."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from _places(item, (*path, key))


def _odd_lines(valid: Sequence[bytes], chance: random.Random) -> bytes:
    """Damage one line of a trace; sometimes also its bytes."""
    lines = chance.choice(valid).splitlines()
    at = chance.randrange(len(lines))
    lines[at] = json.dumps(odd_document(json.loads(lines[at]), chance)).encode()
    content = b"\n".join(lines) + b"\n"
    return damage(content, chance) if chance.random() < 0.2 else content


def _odd_json(valid: Sequence[bytes], chance: random.Random) -> bytes:
    return json.dumps(odd_document(json.loads(chance.choice(valid)), chance)).encode()


def _odd_toml(valid: Sequence[bytes], chance: random.Random) -> bytes:
    """Damage a calibration: its values or, if TOML cannot express the new ones, its bytes."""
    content = tomllib.loads(chance.choice(valid).decode())
    odd = odd_document(content, chance, (*ODD, *NOT_FINITE))
    try:
        written = as_toml(odd)
        tomllib.loads(written)
    except (TypeError, AttributeError, tomllib.TOMLDecodeError):
        return damage(valid[0], chance)
    return written.encode()


def _reader(directory: Path, name: str, use: Callable[[Path], object]) -> Read:
    """Return a reader that calls `use` with a file; the file is valid, or refused with one line."""
    file = directory / name

    def read(content: bytes) -> bool:
        file.write_bytes(content)
        try:
            use(file)
        except ConfigError as error:
            assert "\n" not in " ".join(str(error).split()), error
            assert str(file) in str(error) or str(error).startswith("--"), error
            return False
        return True

    return read


def _traces(directory: Path) -> tuple[list[bytes], Read]:
    mooncake = [
        {"timestamp": t, "input_length": 1500, "output_length": 9, "hash_ids": ids}
        for t, ids in ((0, [0, 1, 2]), (900, [0, 1, 7]), (1200, [5]))
    ]
    turns = [
        [0.0, 0.0, 5.2, 15818, 154, [[1, 247]]],
        [9.0, 3.0, 3.3, 17003, 99, [[1, 240], [300, 9]]],
    ]
    agentic = [
        {
            "id": "trace_1",
            "block_tokens": 64,
            "tool_tokens": 12448,
            "system_tokens": 2882,
            "requests": turns,
            "subagents": [{"t": 4.0, "requests": turns}],
        }
    ] * 2
    recorded = [
        {"memkv_record": 1},
        {"t": 1.0, "ns": "0" * 16, "n": 2, "hit": 0, "new": "0123456789abcdef" * 2},
        {"t": 2.5, "ns": "0" * 16, "n": 3, "hit": 2, "at": 2, "parent": "0123456789abcdef",
         "new": "f" * 16},
    ]  # fmt: skip
    valid = [
        b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        for lines in (mooncake, agentic, recorded)
    ]

    def use(file: Path) -> None:
        trace = read_trace(file)
        hits = replay(trace, Tiers(100, 1000, 10_000.0), nodes=2, run=run_of(trace))
        assert 0 <= hits.total <= hits.ideal <= hits.asked

    return valid, _reader(directory, "trace.jsonl", use)


def _check(scenario: Scenario) -> None:
    """Check that a scenario's numbers can be simulated."""
    numbers = [
        *(scenario.kv_bytes_per_token, scenario.device_tokens, scenario.lookup_seconds),
        *(*scenario.prefill, *scenario.step, *scenario.client_cpu, *scenario.server_get_cpu),
    ]
    assert all(math.isfinite(number) and number >= 0 for number in numbers), scenario
    assert scenario.prefill.seconds(8192, 0) > 0
    assert scenario.object_bytes > 0


def _calibrations(directory: Path) -> tuple[list[bytes], Read]:
    numbers = published()

    def use(file: Path) -> None:
        _check(make_scenario(numbers, measured(file), model="llama-70b"))

    return [MEASURED.read_bytes()], _reader(directory, "node.toml", use)


def _models(directory: Path) -> tuple[list[bytes], Read]:
    dense = {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "vocab_size": 128256,
    }  # fmt: skip
    experts = {
        **dense, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
        "head_dim": 128, "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    latent = {**experts, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1536}
    nested = {"model_type": "vision", "text_config": dense}
    valid = [json.dumps(config).encode() for config in (dense, experts, latent, nested)]

    numbers, machine = published(), measured()

    def use(file: Path) -> None:
        model = read_config(file, numbers, "h200", 8)
        _check(make_scenario(numbers, machine, model=model))

    return valid, _reader(directory, "config.json", use)


PLAN_TARGETS = [
    Target("traces", _traces, 0.02, _odd_lines),
    Target("calibrations", _calibrations, 0.005, _odd_toml),
    Target("models", _models, 0.02, _odd_json),
]

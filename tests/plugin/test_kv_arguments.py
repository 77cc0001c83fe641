"""Server arguments and variables that change pages are part of the namespace."""

import re
from collections.abc import Iterator
from importlib.metadata import distribution
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.environ import EnvField, envs
from sglang.srt.server_args import ServerArgs
from sglang_cpu_platform.tiny_model import make

from memkv_sglang.plugin import namespaces
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.kv_arguments import (
    ELSEWHERE,
    FORMAT_WORDS,
    HARMLESS,
    HARMLESS_VARIABLES,
    NAMED,
    describe_arguments,
    describe_environment,
    names_of,
)
from memkv_sglang.plugin.namespaces import ModelIdentity, identify_model
from tests.sglang_versions import IS_NEWEST
from tools.sglang_diff.tables import server_arguments

TABLES = (NAMED, ELSEWHERE, HARMLESS)
PATCHED = re.compile("enable_memkv|memkv_.*")
"""Arguments that the patches add to SGLang."""

REMOVED = {"speculative_skip_dp_mlp_sync"}
"""Arguments that only older supported versions have."""


def test_every_server_argument_is_named_or_declared_harmless() -> None:
    arguments = {field.name for field in record_fields(ServerArgs)}
    known = frozenset().union(*map(names_of, TABLES))
    assert arguments - known == set(), "say in plugin/kv_arguments.py what these arguments change"
    if IS_NEWEST:
        assert {name for name in known - arguments if not PATCHED.fullmatch(name)} == REMOVED


def test_sources_tell_the_same_arguments() -> None:
    """`make sglang-diff` reads them without importing SGLang."""
    found = server_arguments(Path(str(distribution("sglang").locate_file(""))))
    assert found == {field.name for field in record_fields(ServerArgs)}


def test_every_argument_is_in_one_table_once_and_has_a_reason() -> None:
    listed = [name for table in TABLES for names in table.values() for name in names.split()]
    assert len(listed) == len(set(listed))
    assert all(reason for table in TABLES for reason in table)


def variables() -> Iterator[str]:
    return (name for name, field in vars(type(envs)).items() if isinstance(field, EnvField))


def test_harmless_variables_are_variables_of_sglang_that_would_be_named() -> None:
    harmless = names_of(HARMLESS_VARIABLES)
    assert harmless <= set(variables()) or not IS_NEWEST
    assert all(FORMAT_WORDS & set(name.split("_")) for name in harmless)


def test_variables_that_choose_a_format_are_named() -> None:
    chosen = {"SGLANG_USE_HND_KVCACHE": "1", "SGLANG_MAMBA_SSM_DTYPE": "bfloat16"}
    others = {"SGLANG_KV_CANARY_RING_CAPACITY": "8", "SGLANG_LOG_MS": "1", "HOME": "/root"}
    named = {"env." + name: value for name, value in chosen.items()}
    assert describe_environment(chosen | others, list(variables())) == named


def test_only_values_that_are_not_the_default_are_named() -> None:
    values = {"mamba_ssm_dtype": "bfloat16", "cp_strategy": None, "port": 1}
    assert describe_arguments(values, {"cp_strategy": None}) == {"arg.mamba_ssm_dtype": "bfloat16"}


def test_an_unknown_argument_is_named_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert describe_arguments({"kv_twist": {"b": 1, "a": {3, 2}}}, {}) == {
        "arg.kv_twist": '{"a": ["2", "3"], "b": 1}'
    }
    assert "only servers with equal values share pages: kv_twist" in caplog.text


def test_files_are_named_by_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("experts")
    other.write_text("experts")

    def name(path: Path) -> dict[str, str]:
        return describe_arguments({"speculative_token_map": str(path)}, {})

    assert name(one) == name(other)
    other.write_text("others!")
    assert name(one) != name(other)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    make(tmp_path / "model")
    return str(tmp_path / "model")


def identify(model: str, salt: str = "", **arguments: Any) -> ModelIdentity:
    args = ServerArgs(model_path=model, **arguments)
    return identify_model(args, salt)


def test_the_salt_and_the_arguments_keep_models_apart(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = identify(tiny)
    assert plain == identify(tiny, port=1234, mem_fraction_static=0.5)
    assert plain != identify(tiny, "again")
    assert plain != identify(tiny, enable_deterministic_inference=True)
    monkeypatch.setenv("SGLANG_ROPE_CACHE_FP32", "1")
    assert plain != identify(tiny)


def test_scales_draft_models_and_layout_generations_keep_models_apart(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales, draft = tmp_path / "scales.json", tmp_path / "draft"
    make(draft, seed=1)
    identities = [identify(tiny)]
    for content in ("1.0", "0.5"):
        scales.write_text(content)
        identities.append(identify(tiny, quantization_param_path=str(scales)))
    identities.append(identify(tiny, speculative_draft_model_path=str(draft)))
    monkeypatch.setattr(namespaces, "LAYOUT_GENERATION", "next")
    identities.append(identify(tiny))
    assert all(one != other for one, other in combinations(identities, 2))


def test_what_sglang_resolves_counts_not_what_was_given(tiny: str) -> None:
    given, resolved = ServerArgs(model_path=tiny, mamba_ssm_dtype="bfloat16"), ServerArgs(tiny)
    declare_resolution(resolved, "test", mamba_ssm_dtype="bfloat16")
    assert identify_model(given) == identify_model(resolved)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"load_format": "dummy"}, "drop --load-format dummy"),
        ({"load_format": "remote_instance"}, "--load-format remote_instance"),
        ({"weight_cache_mode": "client"}, "--weight-cache-mode client"),
    ],
)
def test_weights_that_are_not_the_files_are_refused(
    tiny: str, arguments: dict[str, str], text: str
) -> None:
    with pytest.raises(NoFingerprintError, match=text):
        identify(tiny, **arguments)

"""`--enable-memkv` sets the arguments that HiCache needs and refuses conflicting ones."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.settings import all_settings
from memkv_sglang.plugin.flags import FLAGS, add_flags, take_flags
from memkv_sglang.plugin.launch import CONFLICTS, Conflict, prepare
from memkv_sglang.plugin.page_size import choose_page_size

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {"enable_memkv": True, "memkv_nvme_directory": str(tmp_path), "hicache_mem_layout": None}


def extra_config(values: dict[str, Any]) -> dict[str, Any]:
    extra: dict[str, Any] = json.loads(values["hicache_storage_backend_extra_config"])
    return extra


def test_sglang_does_not_get_the_tiers_own_arguments(values: dict[str, Any]) -> None:
    values["hicache_mem_layout"] = "page_first"
    prepare(values)
    assert not [name for name in values if "memkv" in name]
    assert values["enable_hierarchical_cache"]
    assert extra_config(values)["memkv"]["settings"].keys() == {"nvme.directory"}


def test_every_setting_but_secrets_has_a_flag(values: dict[str, Any]) -> None:
    values.update(memkv_minio_bucket="pages", memkv_engine_skip_slow_loads=False)
    values["memkv_settings"] = {"minio.prefix": "team"}
    file, settings = take_flags(values)
    assert file is None
    expected = {"minio.bucket": "pages", "engine.skip_slow_loads": "false", "minio.prefix": "team"}
    assert settings.items() > expected.items()
    keys = {setting.key for setting in all_settings() if not setting.secret}
    assert {flag.key for flag in FLAGS} == keys


@pytest.mark.parametrize("flag", ["--memkv-endpoint", "--memkv-minio-endpoint"])
def test_the_endpoint_has_a_short_flag(flag: str) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    _, settings = take_flags(vars(parser.parse_args([flag, "http://minio:9000"])))
    assert settings == {"minio.endpoint": "http://minio:9000"}


def test_secrets_stay_in_the_environment(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMKV_MINIO_ACCESS_KEY", "an access key")
    monkeypatch.setenv("MEMKV_MINIO_SECRET_KEY", "a secret key")
    values.update(hicache_mem_layout="page_first", memkv_endpoint="http://minio:9000")
    prepare(values)
    for secret in ("an access key", "a secret key"):
        assert secret not in str(values)


def test_user_settings_for_prefetching_take_precedence(values: dict[str, Any]) -> None:
    given = {"prefetch_timeout_base": 7, "prefetch_threshold": 512}
    values["hicache_mem_layout"] = "page_first"
    values["hicache_storage_backend_extra_config"] = json.dumps(given)
    prepare(values)
    assert extra_config(values).items() >= given.items()
    assert extra_config(values)["backend_name"] == "memkv"


def test_large_contexts_have_time_to_load(values: dict[str, Any]) -> None:
    """The timeout covers 128 Ki tokens of 40 KB each at 1 GB/s, but is no longer than computing
    them takes.
    """
    values["hicache_mem_layout"] = "page_first"
    prepare(values)
    extra = extra_config(values)
    seconds = extra["prefetch_timeout_base"] + 128 * extra["prefetch_timeout_per_ki_token"]
    assert 128 * 1024 * 40e3 / 1e9 < seconds < 20


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda conflict: conflict.name)
def test_a_conflict_names_its_flag_and_the_fix(values: dict[str, Any], conflict: Conflict) -> None:
    values["hicache_mem_layout"] = "page_first"
    values[conflict.name] = "something else"
    before = {name: value for name, value in values.items() if "memkv" not in name}
    with pytest.raises(ConfigError) as raised:
        prepare(values)
    assert str(raised.value).startswith("--" + conflict.name.replace("_", "-"))
    assert conflict.fix in str(raised.value)
    assert {name: value for name, value in values.items() if "memkv" not in name} == before


@pytest.mark.parametrize("extra", ["@file.json", "{", '["a list"]'])
def test_bad_extra_configurations_are_refused(values: dict[str, Any], extra: str) -> None:
    values.update(hicache_mem_layout="page_first", hicache_storage_backend_extra_config=extra)
    with pytest.raises(ConfigError, match="--hicache-storage-backend-extra-config"):
        prepare(values)


@pytest.mark.parametrize(
    ("token_bytes", "largest", "divides", "page_size"),
    [
        (4 * KIB, 256, [8192], 256),  # a tiny model: the largest page that is allowed
        (40 * KIB, 256, [8192], 64),  # a 70B model on eight ranks
        (320 * KIB, 256, [8192], 8),
        (3 * MIB, 256, [8192], 1),
        (4 * KIB, 256, [], 256),
        (4 * KIB, 256, [192], 64),
        (4 * KIB, 256, [1000], 8),
        (4 * KIB, 256, [8192, 96], 32),
        (4 * KIB, 128, [8192], 128),  # a model with a window of 128 tokens
        (4 * KIB, 100, [8192], 64),
        (4 * KIB, 1, [8192], 1),
    ],
)
def test_page_sizes(token_bytes: int, largest: int, divides: list[int], page_size: int) -> None:
    assert choose_page_size(token_bytes, largest, divides) == page_size

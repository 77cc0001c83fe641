"""An unsupported SGLang is noticed before a page is stored."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.mem_cache import utils
from sglang.srt.mem_cache.cpp_utils import native_hash
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

from memkv_sglang.page_hash import PythonPageHash
from memkv_sglang.plugin import attachment, hash_extension, versions
from memkv_sglang.plugin.attachment import UnsuitableServerError
from memkv_sglang.plugin.compatibility import differences
from tests.plugin.attached import storage_config
from tools.sglang_diff.wheels import fetch


def test_the_installed_version_has_no_differences() -> None:
    assert list(differences(storage_config())) == []


def refused(config: Any = None) -> str:
    with pytest.raises(UnsuitableServerError, match=r"^SGLang .* is not supported: ") as caught:
        attachment.check_version(config or storage_config())
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_other_page_hashes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = utils.get_native_hash
    monkeypatch.setattr(
        utils, "get_native_hash", lambda ids, prior, size: original(ids, prior or b"v2" * 16, size)
    )
    assert "page hashes differ" in refused()


def test_a_missing_attribute_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(MHATokenToKVPoolHost, "get_page_buffer_meta")
    assert "MHATokenToKVPoolHost has no get_page_buffer_meta" in refused()


def test_an_attribute_that_init_no_longer_sets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Any) -> None: ...

    monkeypatch.setattr(Req, "__init__", init)
    assert "Req has no lora_id" in refused()


def test_other_parameters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    monkeypatch.setattr(UnifiedRadixCache, "reset", lambda self, how: None)
    assert "reset takes (self, how), not (self)" in refused()


def test_an_update_that_raises_if_its_flush_is_refused_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        SchedulerWeightUpdaterManager,
        "flush_cache_after_weight_update",
        lambda self, recv_req: None,
    )
    assert "flush_cache_after_weight_update takes (self, recv_req), not" in refused()


def test_a_version_that_was_not_tested_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: versions.NEWEST)
    attachment.check_version(storage_config())
    assert "has not been tested" not in caplog.text
    monkeypatch.setattr(versions, "installed", lambda: "0.9.0")
    attachment.check_version(storage_config())
    assert "SGLang 0.9.0 has what the tier needs, but has not been tested" in caplog.text


ENABLED = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
arguments = prepare_server_args(["--model-path", "x", "--enable-memkv"])
print(arguments.enable_hierarchical_cache, arguments.hicache_storage_backend)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "missing"),
    [
        ("0.5.21", "HostKVCache has no storage_format_tag"),
        ("0.5.20", "begin_weight_update"),
    ],
)
def test_older_versions_are_refused_in_one_line_that_names_what_is_missing(
    version: str, missing: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(fetch(version)), "SGLANG_PLUGINS": "memkv"}
    done = subprocess.run(
        [sys.executable, "-c", ENABLED],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "None"]
    (line,) = (line for line in done.stderr.splitlines() if "memkv" in line)
    assert f"the server starts without the tier: SGLang {version} is not supported: " in line
    assert missing in line
    assert line.endswith(f"; install sglang=={versions.NEWEST}")


def test_an_unknown_field_that_is_set_is_refused() -> None:
    @dataclasses.dataclass
    class Newer(HiCacheStorageConfig):  # type: ignore[misc] # untyped
        kv_twist: int = 0

    values = dataclasses.asdict(storage_config())
    attachment.check_version(Newer(**values))
    assert "unknown field kv_twist=1" in refused(Newer(**values, kv_twist=1))


def test_hashes_are_computed_in_python_where_the_extension_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Any:
        raise RuntimeError("Failed to load") from OSError("no compiler\nmuch output")

    monkeypatch.setattr(native_hash, "_load_native_hash_module", fail)
    hash_extension.load_page_hash()
    assert isinstance(native_hash._load_native_hash_module(), PythonPageHash)
    assert list(differences(storage_config())) == []
    assert caplog.text.count("no compiler") == 1
    assert "much output" not in caplog.text

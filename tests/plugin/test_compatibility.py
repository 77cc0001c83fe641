"""An unsupported SGLang is noticed before a page is stored."""

import dataclasses
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache import utils
from sglang.srt.mem_cache.cpp_utils import native_hash
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

from memkv_sglang.page_hash import PythonPageHash
from memkv_sglang.plugin import attachment, hash_extension
from memkv_sglang.plugin.attachment import UnsuitableServerError
from memkv_sglang.plugin.compatibility import differences
from tests.plugin.attached import storage_config


def test_the_installed_version_has_no_differences() -> None:
    assert list(differences(storage_config())) == []


def refused(config: Any = None) -> str:
    with pytest.raises(UnsuitableServerError, match=r"differs from 0\.5\.23") as caught:
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

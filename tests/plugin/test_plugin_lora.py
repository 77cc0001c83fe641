"""An adapter's id in a request's key is its content."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memkv_sglang.plugin import lora
from memkv_sglang.plugin import state as running


@pytest.fixture(autouse=True)
def with_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_digests", {})
    monkeypatch.setattr(running, "wanted", lambda: True)


def adapter(path: Path, content: bytes = b"weights") -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"r": 8}))
    (path / "adapter_model.bin").write_bytes(content)
    return path


def load(adapter_id: str, path: Path | str) -> None:
    reference = SimpleNamespace(lora_id=adapter_id, lora_path=str(path))
    assert lora.load_adapter(lambda *_: "loaded", None, reference) == "loaded"


def key(adapter_id: str | None, extra: str = "") -> Any:
    """Return the extra key of a request, which SGLang ends with the adapter's id."""
    request = SimpleNamespace()

    def init(request: Any, lora_id: str | None) -> None:
        request.lora_id = lora_id
        request.extra_key = extra + lora_id if lora_id else extra or None

    lora.init_request(init, request, adapter_id)
    assert request.lora_id == adapter_id
    return request.extra_key


def test_the_same_content_has_one_key_whatever_its_id_and_path(tmp_path: Path) -> None:
    load("1" * 32, adapter(tmp_path / "here"))
    load("2" * 32, adapter(tmp_path / "there"))
    assert key("1" * 32) == key("2" * 32) != "1" * 32
    assert len(key("1" * 32)) == 32


def test_other_content_under_the_same_id_has_another_key(tmp_path: Path) -> None:
    load("1" * 32, adapter(tmp_path / "red"))
    before = key("1" * 32)
    load("1" * 32, adapter(tmp_path / "blue", b"WEIGHTS"))
    assert key("1" * 32) != before


def test_what_else_is_in_the_key_stays(tmp_path: Path) -> None:
    load("1" * 32, adapter(tmp_path / "here"))
    assert key("1" * 32, "tenant") == "tenant" + key("1" * 32)
    assert key(None, "tenant") == "tenant"
    assert key(None) is None


def test_an_adapter_without_a_fingerprint_shares_with_nobody(tmp_path: Path) -> None:
    load("1" * 32, tmp_path / "none")
    load("2" * 32, tmp_path / "none")
    assert len({"1" * 32, "2" * 32, key("1" * 32), key("2" * 32)}) == 4


def test_an_adapter_that_came_as_tensors_keeps_its_own_id() -> None:
    assert key("3" * 32) == "3" * 32


def test_without_the_tier_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "wanted", lambda: False)
    load("1" * 32, adapter(tmp_path / "here"))
    assert key("1" * 32) == "1" * 32

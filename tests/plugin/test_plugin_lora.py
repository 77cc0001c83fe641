"""A request's key identifies its LoRA adapter by content."""

import json
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from memkv_sglang.plugin import lora, state


@pytest.fixture(autouse=True)
def with_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "adapter_digests", {})
    monkeypatch.setattr(state, "wanted", lambda: True)


def adapter(path: Path, content: bytes = b"weights") -> Path:
    path.mkdir()
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter_model.bin").write_bytes(content)
    return path


class Manager(LoRAManager):  # type: ignore[misc] # untyped
    """SGLang's own LoRA manager, without a model to load weights into."""

    def __init__(self) -> None:
        self.base_hf_config = SimpleNamespace(vocab_size=8)
        self.configs: dict[str, object] = {}
        self.loras: dict[str, object] = {}
        self.lora_refs: dict[str, LoRARef] = {}
        self.attn_dp_enabled, self.num_pinned_loras, self.max_loras_per_batch = False, 0, 8

    def load_lora_weights(self, lora_ref: LoRARef) -> None:
        """Load nothing."""


def load(adapter_id: str, path: Path) -> None:
    name = str(path)
    reference = LoRARef(lora_id=adapter_id, lora_name=name, lora_path=name, pinned=False)
    result = lora.load_adapter(LoRAManager._load_lora_adapter, Manager(), reference)
    assert result.success == path.exists()


def key(adapter_id: str | None, extra: str | None = None) -> str | None:
    """Return a request's extra key, which SGLang ends with the adapter's id."""
    request = Req.__new__(Req)
    tokens, sampling = array("q", [1]), SamplingParams()
    lora.init_request(
        Req.__init__, request, "id", "", tokens, sampling, lora_id=adapter_id, extra_key=extra
    )
    assert request.lora_id == adapter_id
    found: str | None = request.extra_key
    return found


def test_equal_content_has_the_same_key_for_any_id_and_path(tmp_path: Path) -> None:
    load("1" * 32, adapter(tmp_path / "here"))
    load("2" * 32, adapter(tmp_path / "there"))
    assert key("1" * 32) == key("2" * 32) != "1" * 32
    assert len(key("1" * 32) or "") == 32


def test_different_content_under_the_same_id_has_another_key(tmp_path: Path) -> None:
    load("1" * 32, adapter(tmp_path / "red"))
    before = key("1" * 32)
    load("1" * 32, adapter(tmp_path / "blue", b"WEIGHTS"))
    assert key("1" * 32) != before


def test_rest_of_the_key_is_unchanged(tmp_path: Path) -> None:
    load("1" * 32, adapter(tmp_path / "here"))
    assert key("1" * 32, "tenant") == f"tenant{key('1' * 32)}"
    assert key(None, "tenant") == "tenant"
    assert key(None) is None


def test_adapter_without_fingerprint_is_not_shared(tmp_path: Path) -> None:
    load("1" * 32, tmp_path / "none")
    load("2" * 32, tmp_path / "none")
    assert len({"1" * 32, "2" * 32, key("1" * 32), key("2" * 32)}) == 4


def test_adapter_loaded_from_tensors_keeps_its_id() -> None:
    assert key("3" * 32) == "3" * 32


def test_without_the_tier_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "wanted", lambda: False)
    load("1" * 32, adapter(tmp_path / "here"))
    assert key("1" * 32) == "1" * 32

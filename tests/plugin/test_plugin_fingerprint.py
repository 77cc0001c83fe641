"""A model's fingerprint depends on its content only, and takes almost no time."""

import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest

from memkv_sglang.plugin.fingerprint import NoFingerprintError, fingerprint, tensor_names

GIB = 1 << 30


def write_weights(path: Path, tensors: dict[str, int], content: bytes | None = None) -> None:
    """Write a safetensors file with tensors of that many bytes; without content, a sparse file."""
    offsets, end = {}, 0
    for name, size in tensors.items():
        offsets[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(offsets).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + (content or b""))
        if content is None:
            file.truncate(8 + len(header) + end)


def change(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(b"x")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"layers": 2, "_name_or_path": "/here"}')
    write_weights(model / "model.safetensors", {"a": 5000, "b": 5000}, bytes(10000))
    return model


def test_neither_path_nor_formatting_matters(model: Path, tmp_path: Path) -> None:
    before = fingerprint(model)
    other = shutil.copytree(model, tmp_path / "elsewhere")
    (other / "config.json").write_text('{\n "_name_or_path": "/there",\n "layers": 2}')
    (other / "README.md").write_text("about")
    assert fingerprint(other) == before


def test_links_into_a_blob_store_count_as_files(model: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in model.iterdir():
        (linked / file.name).symlink_to(file)
    assert fingerprint(linked) == fingerprint(model)


@pytest.mark.parametrize("offset", [-1, -5000, -9999, -2500])
def test_a_changed_byte_of_a_small_file_counts(model: Path, offset: int) -> None:
    before = fingerprint(model)
    change(model / "model.safetensors", offset)
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"layers": 3}'),
        ("hf_quant_config.json", '{"bits": 4}'),
        ("modeling_own.py", "pass"),
        ("more.safetensors", ""),
    ],
)
def test_settings_that_change_computation_count(model: Path, file: str, content: str) -> None:
    before = fingerprint(model)
    if content:
        (model / file).write_text(content)
    else:
        write_weights(model / file, {"c": 10}, bytes(10))
    assert fingerprint(model) != before


def test_every_tensor_of_a_large_file_counts(model: Path) -> None:
    """Fine-tunes of one layer, or of the last rows of an embedding, have different fingerprints."""
    size = 40 << 20
    write_weights(model / "model.safetensors", {"a": size, "b": size, "c": size})
    before = fingerprint(model)
    for offset in (-1, -size // 2, -size - 1, -2 * size - 1, -3 * size):
        change(model / "model.safetensors", offset)
        after = fingerprint(model)
        assert after != before, offset
        before = after


@pytest.mark.parametrize("left", ["config.json", "model.safetensors"])
def test_half_a_model_has_no_fingerprint(model: Path, left: str) -> None:
    for file in model.iterdir():
        if file.name != left:
            file.unlink()
    with pytest.raises(NoFingerprintError, match="has no"):
        fingerprint(model)


@pytest.mark.parametrize("length", [0, 5, 20])
def test_a_file_cut_short_has_no_fingerprint(model: Path, length: int) -> None:
    os.truncate(model / "model.safetensors", length)
    with pytest.raises(NoFingerprintError, match="not a complete safetensors file"):
        fingerprint(model)


def test_140_gigabytes_take_less_than_five_seconds(model: Path) -> None:
    for shard in range(30):
        tensors = {f"layer.{shard}.{i}": 140 * GIB // 720 for i in range(24)}
        write_weights(model / f"model-{shard:05}.safetensors", tensors)
    begin = time.process_time()
    fingerprint(model)
    assert time.process_time() - begin < 5


def test_tensors_are_identified_across_files(model: Path) -> None:
    write_weights(model / "more.safetensors", {"c": 10, "__metadata__": 0})
    assert tensor_names(model) == {"a", "b", "c"}
    for file in model.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(NoFingerprintError, match="no safetensors files"):
        tensor_names(model)

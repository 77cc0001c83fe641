"""Identify a model by its content, quickly, and equally on every node and under every path.

Reads configuration, code and small weight files (adapters) completely. From larger weight files it
reads the length, the safetensors header and samples of every tensor. Two fine-tunes of the same
architecture differ in nearly every value they trained, so samples of each tensor distinguish them
even if only a few layers were trained. A 70B model has less than a thousand tensors.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple

CONFIG_NAMES = (
    "config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "adapter_config.json",
    "params.json",
)
"""Files other than weights that change what a model computes from the same tokens."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

SMALL_FILE = 64 << 20
"""Largest weight file that is read completely, in bytes."""

SAMPLE = 1024
"""Bytes per sample."""

SAMPLES_OF_TENSOR = 5
"""Samples per tensor, evenly spread from its first bytes on. One more sample reads its last bytes,
because the last rows of an embedding are the tokens that were added to the vocabulary."""

SAMPLES_OF_OTHERS = 256
"""Samples of a file whose tensors are not known, evenly spread."""

READERS = 16
"""Number of samples in flight. Each costs a seek, or a round trip on a network file system."""

MAX_HEADER = 256 << 20
"""Maximum bytes of a header. The format itself allows 100 MB."""


class NoFingerprintError(Exception):
    """The model cannot be identified by its files. The message says why and what to do."""


class _Range(NamedTuple):
    offset: int
    length: int


def model_files(model: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the files that identify a model: configurations, code and weights, each sorted.

    Raises `NoFingerprintError` if configuration or weights are missing, and `OSError`.
    """
    configs = [model / name for name in CONFIG_NAMES if (model / name).is_file()]
    code = sorted(path for path in model.glob("*.py") if path.is_file())
    weights = sorted(p for p in model.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    if not configs or not weights:
        raise NoFingerprintError(f"{model} has no configuration or no weights")
    return configs, code, weights


def fingerprint(model: Path) -> str:
    """Return a digest (hex) of the model in the directory `model`. Blocks; raises `OSError`.

    Raises `NoFingerprintError` if configuration or weights are missing.
    """
    configs, code, weights = model_files(model)
    digest = hashlib.sha256()
    for path in configs:
        _update(digest, path.name.encode(), _canonical(path))
    for path in code:
        _update(digest, path.name.encode(), path.read_bytes())
    with ThreadPoolExecutor(READERS) as readers:
        for path in weights:
            # look only once, because the directory may be on a network file system
            with path.open("rb", buffering=0) as file:
                head, samples = _plan(path, file)
                _update(digest, path.name.encode(), head)
                for content in readers.map(partial(_read, file.fileno()), samples):
                    digest.update(content)
    return digest.hexdigest()


def tensor_names(model: Path) -> frozenset[str]:
    """Return the names of all tensors in the directory's safetensors files. Raises `OSError`.

    Raises `NoFingerprintError` if there are none or a file is damaged.
    """
    names: set[str] = set()
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            names |= json.loads(_safetensors_header(path, file)).keys()
    if not names:
        raise NoFingerprintError(f"{model} has no safetensors files, so its tensors are not known")
    return frozenset(names - {"__metadata__"})


def _canonical(path: Path) -> bytes:
    """Return the content of a JSON file independently of formatting and key order."""
    content = path.read_bytes()
    try:
        values = json.loads(content)
    except ValueError:
        return content
    if isinstance(values, dict):
        values.pop("_name_or_path", None)  # the path that the model was saved from
    return json.dumps(values, sort_keys=True).encode()


def _update(digest: "hashlib._Hash", *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _plan(path: Path, file: FileIO) -> tuple[bytes, list[_Range]]:
    """Return the bytes of a weight file to hash now, and the ranges to read and hash later."""
    size = os.fstat(file.fileno()).st_size
    header = _safetensors_header(path, file) if path.suffix == ".safetensors" else b""
    if size <= SMALL_FILE:
        return header, [_Range(0, size)]
    if header:
        return header, [*_tensor_samples(path, header)]
    step = max(size // SAMPLES_OF_OTHERS, SAMPLE)
    samples = [_Range(offset, SAMPLE) for offset in range(0, size, step)]
    return size.to_bytes(8, "little"), samples


def _safetensors_header(path: Path, file: FileIO) -> bytes:
    """Return the JSON header; see https://github.com/huggingface/safetensors#format."""
    descriptor = file.fileno()
    size, prefix = os.fstat(descriptor).st_size, os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, MAX_HEADER):
        raise NoFingerprintError(f"{path} is not a complete safetensors file")
    return _read(descriptor, _Range(8, length))


def _tensor_samples(path: Path, header: bytes) -> Iterator[_Range]:
    base = 8 + len(header)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        extents = [tensors[name]["data_offsets"] for name in sorted(tensors)]
        for begin, end in extents:
            step = max(end - begin - SAMPLE, 0) // (SAMPLES_OF_TENSOR - 1)
            for offset in range(begin, begin + step * SAMPLES_OF_TENSOR, step or SAMPLE):
                yield _Range(base + offset, SAMPLE)
            yield _Range(base + max(end - SAMPLE, begin), min(SAMPLE, end - begin))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise NoFingerprintError(f"{path} has an invalid safetensors header: {error}") from None


def _read(descriptor: int, samples: _Range) -> bytes:
    """Read a range. Returns fewer bytes if the file ends within it."""
    offset, left = samples
    parts = []
    while left:
        part = os.pread(descriptor, left, offset)
        if not part:
            break
        parts.append(part)
        offset, left = offset + len(part), left - len(part)
    return b"".join(parts)

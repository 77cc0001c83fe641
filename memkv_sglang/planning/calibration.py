"""Read the measured numbers that simulations use, with their sources, from `calibration/*.toml`."""

import itertools
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from memkv_sglang.config.errors import ConfigError

FOLDER = Path(__file__).parent / "calibration"
PUBLISHED = FOLDER / "published.toml"
MEASURED = FOLDER / "epyc-2-cores.toml"
"""File with the measurements of the machine, unless one from `memkv bench --calibration` is given.
"""

_LARGEST_FILE = 1 << 20
Kind = TypeVar("Kind", "Published", "Measured")

Quantity = Annotated[float, Meta(ge=0, le=1e18)]
Positive = Annotated[float, Meta(ge=1e-12, le=1e18)]
Count = Annotated[int, Meta(ge=1, le=1 << 40)]


class Number(Struct, frozen=True, forbid_unknown_fields=True):
    """A number, and the name of its source, which the file's `sources` describes."""

    value: Quantity
    source: str


class PrefillRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A measured time to first token of a prompt on one replica, in seconds."""

    gpu: str
    new: Count
    cached: Annotated[int, Meta(ge=0, le=1 << 40)]
    seconds: Positive
    source: str


class StepRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A measured decode step, in seconds, of `batch` requests with `context` tokens each."""

    gpu: str
    batch: Count
    context: Count
    seconds: Positive
    source: str


class Gpu(Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers of one kind of GPU."""

    memory_bytes: Number
    memory_bytes_per_s: Number
    memory_fraction: Number
    host_to_device_bytes_per_s: Number


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """A model, and how many GPUs serve one replica."""

    name: str
    kv_bytes_per_token: Number
    weight_bytes: Number
    tensor_parallel: Number
    ranks: Number
    prefill: list[PrefillRow] = []
    step: list[StepRow] = []


class NodeNumbers(Struct, frozen=True, forbid_unknown_fields=True):
    """The hardware of a GPU node, without its GPUs."""

    cores: Number
    agent_cores: Number
    nic_bytes_per_s: Number
    host_pool_bytes: Number
    nvme_bytes: Number
    nvme_drives: Number
    drive_read_bytes_per_s: Number
    drive_write_bytes_per_s: Number
    drive_writes_per_day: Number
    link_share: Number


class ServerNumbers(Struct, frozen=True, forbid_unknown_fields=True):
    """The hardware of a storage server."""

    cores: Number
    nic_bytes_per_s: Number
    drives: Number
    drive_read_bytes_per_s: Number
    drive_write_bytes_per_s: Number
    drive_bytes: Number
    link_share: Number
    set_nodes: Number
    set_parity: Number
    published_get_bytes_per_s: Number


class Published(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `published.toml`."""

    sources: dict[str, str]
    gpus: dict[str, Gpu]
    models: dict[str, Model]
    node: NodeNumbers
    server: ServerNumbers


class CpuRow(Struct, frozen=True, forbid_unknown_fields=True):
    """CPU seconds per GB for objects of `bytes`."""

    bytes: Count
    cpu_s_per_gb: Annotated[float, Meta(ge=1e-6, le=1e6)]
    source: str


class DiskRow(Struct, frozen=True, forbid_unknown_fields=True):
    """Throughput of the node's disk for pages of `bytes`."""

    bytes: Count
    load_bytes_per_s: Positive
    spill_bytes_per_s: Positive
    source: str


class Machine(Struct, frozen=True, forbid_unknown_fields=True):
    """Where and when the file's numbers were measured."""

    name: str
    date: str
    version: str


class Calls(Struct, frozen=True, forbid_unknown_fields=True):
    """The cost of single calls."""

    head_server_cpu_s: Number
    head_client_cpu_s: Number
    lookup_rounds: Number
    heads_per_round: Number
    lookup_cold_s: Number
    lookup_warm_s: Number
    lookup_disk_s: Number
    calls_per_core_s: Number
    round_trip_s: Number


class Measured(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a file of measurements, as `memkv bench --calibration` writes it."""

    machine: Machine
    sources: dict[str, str]
    client_load: Annotated[list[CpuRow], Meta(min_length=1)]
    server_get: Annotated[list[CpuRow], Meta(min_length=1)]
    server_put: Annotated[list[CpuRow], Meta(min_length=1)]
    calls: Calls
    disk: list[DiskRow] = []


class LinearCpu(NamedTuple):
    """CPU time of an operation in seconds: `per_request` + `per_byte` x bytes."""

    per_request: float
    per_byte: float

    def per_byte_at(self, size: float) -> float:
        """Return CPU seconds per byte for objects of `size` bytes."""
        return self.per_request / size + self.per_byte


class PrefillCost(NamedTuple):
    """Prefill time in seconds: fixed + per_token x new + per_pair x new x (cached + new / 2)."""

    fixed: float
    per_token: float
    per_pair: float

    def seconds(self, new: float, cached: float) -> float:
        """Return the time to compute `new` tokens after `cached` ones."""
        return self.fixed + self.marginal(new, cached)

    def marginal(self, new: float, cached: float) -> float:
        """Return the time by which these tokens lengthen a batch."""
        return new * (self.per_token + self.per_pair * (cached + new / 2))


class StepCost(NamedTuple):
    """Time of a decode step in seconds: fixed + per_token x context tokens in the batch."""

    fixed: float
    per_token: float

    def seconds(self, tokens: float) -> float:
        """Return the time of a step over `tokens` tokens of context."""
        return self.fixed + self.per_token * tokens


def published() -> Published:
    """Read `published.toml`."""
    return _read(PUBLISHED, Published)


def measured(file: Path = MEASURED) -> Measured:
    """Read a file of measurements. Raises `ConfigError`."""
    return _read(file, Measured)


def _read(file: Path, kind: type[Kind]) -> Kind:
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{file}: larger than 1 MiB, so not a calibration")
        content = msgspec.convert(tomllib.loads(file.read_text("utf-8")), kind)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"{file}: not a calibration ({error}); `memkv bench --calibration FILE` writes one"
        ) from None
    for source in _sources(msgspec.to_builtins(content)):
        if source not in content.sources:
            raise ConfigError(f"{file}: [sources] does not describe {source!r}")
    return content


def _sources(value: Any) -> list[str]:
    if isinstance(value, list):
        return [source for item in value for source in _sources(item)]
    if not isinstance(value, dict):
        return []
    own = [value["source"]] if isinstance(value.get("source"), str) else []
    return own + [source for item in value.values() for source in _sources(item)]


def fit_cpu(rows: Sequence[CpuRow]) -> LinearCpu:
    """Fit the CPU cost per request and per byte to rows, minimizing squared relative errors.

    With only one row, the cost is proportional to the bytes.
    """
    seconds = np.array([row.cpu_s_per_gb * row.bytes / 1e9 for row in rows])
    sizes = np.array([float(row.bytes) for row in rows])
    if len(rows) == 1:
        return LinearCpu(0.0, float(seconds[0] / sizes[0]))
    return LinearCpu(*_fit(np.stack([np.ones(len(rows)), sizes], axis=1), seconds))


def fit_prefill(rows: Sequence[PrefillRow]) -> PrefillCost:
    """Fit the prefill cost to rows, minimizing squared relative errors.

    With fewer than three rows, the fixed cost is 0.
    """
    new = np.array([float(row.new) for row in rows])
    cached = np.array([float(row.cached) for row in rows])
    columns = [np.ones(len(rows)), new, new * (cached + new / 2)]
    seconds = np.array([row.seconds for row in rows])
    if len(rows) < len(columns):
        return PrefillCost(0.0, *_fit(np.stack(columns[1:], axis=1), seconds))
    return PrefillCost(*_fit(np.stack(columns, axis=1), seconds))


def _fit(columns: "np.ndarray[Any, Any]", values: "np.ndarray[Any, Any]") -> list[float]:
    """Return the non-negative coefficients with the least sum of squared relative errors.

    There are at most three coefficients, so trying every set of non-zero ones is simple and exact.
    """
    scaled = columns / values[:, None]
    best, least = np.zeros(columns.shape[1]), np.inf
    indices = range(columns.shape[1])
    for size in range(1, columns.shape[1] + 1):
        for chosen in itertools.combinations(indices, size):
            found, *_ = np.linalg.lstsq(scaled[:, chosen], np.ones(len(values)), rcond=None)
            error = float(((scaled[:, chosen] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(columns.shape[1]), error
                best[list(chosen)] = found
    return [float(value) for value in best]


def fit_step(model: Model, gpu_name: str, gpu: Gpu) -> StepCost:
    """Return the cost of decode steps: a fixed part, plus reading the context at memory bandwidth.

    The fixed part comes from a measured row for this GPU. Without one, it is the time to read the
    weights.
    """
    replica = model.tensor_parallel.value * gpu.memory_bytes_per_s.value
    per_token = model.kv_bytes_per_token.value / replica
    rows = [row for row in model.step if row.gpu == gpu_name]
    if not rows:
        return StepCost(model.weight_bytes.value / replica, per_token)
    row = rows[0]
    return StepCost(max(row.seconds - row.batch * row.context * per_token, 0.0), per_token)

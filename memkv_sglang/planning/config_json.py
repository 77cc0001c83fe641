"""Estimate a model's numbers from its `config.json`."""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.planning.calibration import Model, Number, PrefillRow, Published, fit_prefill

_LARGEST_FILE = 1 << 20
_REFERENCE = "llama-70b"
_REFERENCE_SHAPE = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "head_dim": 128,
}
_LENGTHS = (8192, 32768, 131072)
_SOURCE = "config.json"


class _Size(NamedTuple):
    """Sizes that follow from a model's shape."""

    parameters: float
    active: float
    """Number of parameters that a token uses."""
    kv_bytes_per_token: float
    attention: float
    """Number of multiply-adds of attention for each pair of tokens."""
    is_mla: bool


def read_config(file: Path, numbers: Published, gpu: str, gpus: int) -> Model:
    """Return a model, with times estimated from those of Llama 70B by the number of operations.

    Its tensor parallelism is the smallest number of GPUs, up to `gpus`, that leaves a third of
    their memory to KV. Raises `ConfigError`.
    """
    config = _load(file)
    try:
        size, reference = _size_of(config), _size_of(_REFERENCE_SHAPE)
    except KeyError as error:
        raise ConfigError(f"{file}: not a transformer's config.json ({error} is missing)") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not a transformer's config.json ({error})") from None
    bytes_each = 1 if config.get("quantization_config") else 2
    weights = size.parameters * bytes_each
    kind = numbers.gpus[gpu]
    parallel = 1
    while parallel < gpus and parallel * kind.memory_bytes.value * 0.57 < weights:
        parallel *= 2
    rows = [row for row in numbers.models[_REFERENCE].prefill if row.gpu == gpu]
    known = fit_prefill(rows)
    share = numbers.models[_REFERENCE].tensor_parallel.value / parallel * bytes_each
    linear = known.per_token * size.active / reference.active * share
    quadratic = known.per_pair * size.attention / reference.attention * share / bytes_each
    prefill = [
        PrefillRow(gpu, n, 0, known.fixed + n * (linear + quadratic * n / 2), _SOURCE)
        for n in _LENGTHS
    ]
    return Model(
        name=str(config.get("model_type", file.parent.name)),
        kv_bytes_per_token=Number(size.kv_bytes_per_token, _SOURCE),
        weight_bytes=Number(weights, _SOURCE),
        tensor_parallel=Number(parallel, _SOURCE),
        ranks=Number(1 if size.is_mla else parallel, _SOURCE),
        prefill=prefill,
    )


def _load(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{file}: larger than 1 MiB, so not a model's config.json")
        content = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{file}: not a model's config.json ({error})") from None
    text = content.get("text_config")  # multimodal models nest the text model's configuration
    return text if isinstance(text, dict) else content


def _size_of(config: dict[str, Any]) -> _Size:
    layers, hidden = _count(config, "num_hidden_layers"), _count(config, "hidden_size")
    heads = _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", heads)
    head = _count(config, "head_dim", hidden // heads)
    if not head:
        raise ValueError(f"{heads} attention heads are more than the hidden size of {hidden}")
    mlp = 3 * hidden * _count(config, "intermediate_size")
    experts = _count(config, "num_experts", 0) or _count(config, "n_routed_experts", 0)
    experts = experts or _count(config, "num_local_experts", 0)
    every, used = mlp, mlp
    if experts:
        width = _count(config, "moe_intermediate_size", _count(config, "intermediate_size"))
        one = 3 * hidden * width
        shared = one * _count(config, "n_shared_experts", 0)
        every = one * experts + shared
        used = one * _count(config, "num_experts_per_tok") + shared
    rank = _count(config, "kv_lora_rank", 0)
    attention_weights = hidden * head * (2 * heads + 2 * kv_heads)
    stored = 2 * kv_heads * head
    if rank:
        stored = rank + _count(config, "qk_rope_head_dim")
        query = _count(config, "q_lora_rank", 0) or hidden
        attention_weights = hidden * (query + stored) + heads * head * (query + 2 * rank + hidden)
    embeddings = 2 * hidden * _count(config, "vocab_size")
    return _Size(
        parameters=layers * (attention_weights + every) + embeddings,
        active=layers * (attention_weights + used) + embeddings / 2,
        kv_bytes_per_token=2 * layers * stored,
        attention=2 * layers * heads * head,
        is_mla=bool(rank),
    )


def _count(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return a number. It must be positive, unless it is optional with a default of 0."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise KeyError(key)
    least = 0 if default == 0 else 1
    if type(value) is not int or not least <= value < 1 << 31:
        raise ValueError(f"{key} is {str(value)[:60]!r}")
    return value

"""Derive the namespace of a host pool's pages from the model that SGLang has loaded."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from memkv_sglang.namespace import Namespace, Shard
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.fingerprint_cache import cached_fingerprint
from memkv_sglang.plugin.kv_arguments import describe_arguments, describe_environment
from memkv_sglang.plugin.kv_format import describe_format

KV_POOL = "kv"
MAMBA_POOL = "mamba"

LAYOUT_GENERATION = "1"
"""Version of what pages mean. Increase it when a release of SGLang gives their bytes another
meaning, or when KV that a faulty release stored must not be found any more."""

COORDINATES = {
    "schema_version": "details: sglang_schema",
    "model_id": "model, by content",
    "dtype": "details: kv_format",
    "page_size": "page_size",
    "rank_replicated": "shard: equal for all tensor-parallel ranks",
    "total_kv_heads": "heads, shard.tp_size",
    "head_group": "heads",
    "layer_partition": "layers",
    "object_layout": "layout, details: pool_class",
}
"""The part of this project's namespaces that covers each field of SGLang's `KVCacheNamespace`."""

STORAGE_CONFIG = {
    "tp_rank": "shard, unless the ranks' pages are equal",
    "tp_size": "shard, unless the ranks' pages are equal",
    "pp_rank": "shard",
    "pp_size": "shard",
    "attn_cp_rank": "shard, unless the ranks' pages are equal",
    "attn_cp_size": "shard, unless the ranks' pages are equal",
    "dcp_rank": "shard",
    "dcp_size": "shard",
    "logical_page_size": "page_size, shard.dcp_size",
    "is_mla_model": "decides whether the ranks' pages are equal, and so shard",
    "is_page_first_layout": "layout",
    "dp_rank": "not named: replicas compute the same",
    "model_name": "not named: models are identified by content",
    "enable_storage_metrics": "not named: only enables metrics",
    "tp_lcm_size": "not named: pages are not split by heads",
    "should_split_heads": "not named: pages are not split by heads",
    "extra_config": "not named: settings of the tier",
}
"""The part of the namespace that covers each field of SGLang's `HiCacheStorageConfig`, or why no
part does."""

SPLIT_OVER_CONTEXT_RANKS = ("arg.enable_kv_cache_sharding", "arg.enable_dsa_cache_layer_split")
"""Arguments with which a server's context-parallel ranks keep different KV."""

FOREIGN_WEIGHTS = ("remote_instance", "ipc_cache", "rdma", "private")
"""Values of `--load-format` whose weights do not come from the files under the model's path."""


class ModelIdentity(NamedTuple):
    """Identifies a loaded model. Models with equal identities compute equal KV."""

    fingerprint: str
    revision: str
    """Identity of weights that were set at run time; empty for weights from the files."""
    details: dict[str, str]
    """Settings that change KV, but no file."""


def identify_model(server_args: Any, salt: str = "") -> ModelIdentity:
    """Return the served model's identity.

    Reads the model's files. Raises `NoFingerprintError`. `salt` is `engine.namespace_salt`.
    """
    from sglang.srt.arg_groups.overrides import model_config_of

    model = model_config_of(server_args)
    _require_weights_from_files(server_args)
    cache = getattr(server_args, "download_dir", None)
    weights = identify_weights(model.model_path, server_args.revision, cache)
    details = _details(server_args, model) | _surroundings(server_args)
    if salt:
        details["salt"] = salt
    return ModelIdentity(weights, "", details)


def _require_weights_from_files(server_args: Any) -> None:
    load_format = str(getattr(server_args.load_format, "value", server_args.load_format))
    if load_format == "dummy":
        raise NoFingerprintError("dummy weights have no identity; drop --load-format dummy")
    if load_format in FOREIGN_WEIGHTS:
        raise NoFingerprintError(
            f"--load-format {load_format} loads weights that are not the model's files, so they "
            "have no identity; load the files"
        )
    if getattr(server_args, "weight_cache_mode", "off") == "client":
        raise NoFingerprintError(
            "--weight-cache-mode client uses weights that another process loaded earlier, so they "
            "have no identity; use --weight-cache-mode daemon or off"
        )


def _surroundings(server_args: Any) -> dict[str, str]:
    """Return what else changes pages: SGLang's layouts, arguments and environment variables."""
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.arg_groups.overrides import resolution_result
    from sglang.srt.environ import EnvField, envs

    fields = record_fields(type(server_args))
    values = {field.name: resolution_result(server_args, field.name) for field in fields}
    defaults = {field.name: _default(field) for field in fields}
    variables = sorted(n for n, field in vars(type(envs)).items() if isinstance(field, EnvField))
    return {
        "layout_generation": LAYOUT_GENERATION,
        "sglang_schema": _key_schema(),
        **describe_arguments(values, defaults),
        **describe_environment(os.environ, variables),
    }


def _key_schema() -> str:
    """Return the version of SGLang's key scheme, which SGLang has had since 0.5.23."""
    try:
        from sglang.srt.mem_cache import hicache_key_scheme
    except ImportError:
        return "none"
    return str(hicache_key_scheme._SCHEMA_VERSION)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def identify_weights(model_path: str, revision: str | None = None, cache: str | None = None) -> str:
    """Return the fingerprint of a model directory, or of a downloaded repository.

    Blocks. Raises `NoFingerprintError`. For the arguments, see `find_weights`.
    """
    return cached_fingerprint(find_weights(model_path, revision, cache))


def find_weights(model_path: str, revision: str | None = None, cache: str | None = None) -> Path:
    """Return the directory of a model on this machine.

    Args:
        model_path: the directory, or the repository's name on the hub.
        revision: branch, tag or commit of the repository; None for its main branch.
        cache: download directory; None for the hub's default.

    Raises `NoFingerprintError` if it is not on this machine.

    """
    path = Path(model_path)
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(
                snapshot_download(
                    model_path, revision=revision, cache_dir=cache, local_files_only=True
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
            raise NoFingerprintError(f"{model_path} is not a local model: {error}") from None
    return path


def _details(server_args: Any, model: Any) -> dict[str, str]:
    values = model.hf_config.to_dict()
    values.pop("_name_or_path", None)  # nodes may keep the same model under different paths
    config = json.dumps(values, sort_keys=True, default=str)
    details = {
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "overrides": str(server_args.json_model_override_args),
    }
    scales = getattr(server_args, "quantization_param_path", None)
    if scales:
        details["kv_scales"] = hashlib.sha256(Path(scales).read_bytes()).hexdigest()
    draft = getattr(server_args, "speculative_draft_model_path", None)
    if draft:
        revision = getattr(server_args, "speculative_draft_model_revision", None)
        cache = getattr(server_args, "download_dir", None)
        details["draft"] = identify_weights(draft, revision, cache)
    return details


def describe_pool(
    pool: str,
    host_pool: Any,
    device_pools: Sequence[Any],
    page_bytes: int,
    config: Any,
    model: ModelIdentity,
) -> Namespace:
    """Return the namespace of a pool's pages.

    Args:
        pool: SGLang's name of the pool.
        host_pool: the host pool.
        device_pools: the device pool that it mirrors, and the draft pools packed into its pages.
        page_bytes: size of a page.
        config: SGLang's `HiCacheStorageConfig`.
        model: the loaded model.

    """
    details = {
        **model.details,
        "pool_class": type(host_pool).__name__,
        "kv_format": describe_format(device_pools),
    }
    for name in ("storage_format_tag", "temporal_dtype", "conv_dtype"):
        if getattr(host_pool, name, None):
            details[name] = str(getattr(host_pool, name))
    shard = _shard(config)
    if not differs_by_rank(pool, host_pool, config):
        shard = msgspec.structs.replace(shard, tp_rank=0, tp_size=1)
        # Context-parallel ranks gather each other's KV, unless the server splits KV between them.
        if not any(name in model.details for name in SPLIT_OVER_CONTEXT_RANKS):
            shard = msgspec.structs.replace(shard, cp_rank=0, cp_size=1)
    return Namespace(
        model=model.fingerprint,
        revision=model.revision,
        pool=pool,
        kv_dtype=str(host_pool.dtype).removeprefix("torch."),
        layout=str(host_pool.layout),
        page_size=int(host_pool.page_size),
        page_bytes=page_bytes,
        layers=(int(getattr(host_pool, "start_layer", 0)), int(getattr(host_pool, "end_layer", 0))),
        heads=int(getattr(host_pool, "head_num", 0) or 0),
        head_size=int(getattr(host_pool, "head_dim", 0) or getattr(host_pool, "kv_cache_dim", 0)),
        shard=shard,
        details=details,
    )


def differs_by_rank(pool: str, host_pool: Any, config: Any) -> bool:
    """Return whether the pages of this pool differ between tensor-parallel ranks.

    The ranks of an MLA model hold equal KV and share a namespace. Only their Mamba states differ,
    and the heads of an MHA draft model. With DCP, each page is split between the DCP ranks, which
    are part of the shard.
    """
    if config.is_mla_model:
        return pool == MAMBA_POOL or bool(getattr(host_pool, "head_num", 0))
    return True


def _shard(config: Any) -> Shard:
    return Shard(
        tp_rank=config.tp_rank,
        tp_size=config.tp_size,
        pp_rank=config.pp_rank,
        pp_size=config.pp_size,
        cp_rank=config.attn_cp_rank,
        cp_size=config.attn_cp_size,
        # Before 0.5.23, SGLang did not store pages of a server with DCP.
        dcp_rank=getattr(config, "dcp_rank", 0),
        dcp_size=getattr(config, "dcp_size", 1),
    )

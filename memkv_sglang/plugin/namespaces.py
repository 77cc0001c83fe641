"""Derive the namespace of a host pool's pages from the model that SGLang has loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from memkv_sglang.namespace import Namespace, Shard
from memkv_sglang.plugin.fingerprint import NoFingerprintError, fingerprint

KV_POOL = "kv"
MAMBA_POOL = "mamba"


class ModelIdentity(NamedTuple):
    """Identifies a loaded model: equal identities compute equal KV."""

    fingerprint: str
    revision: str
    """Identity of weights set at run time; empty for weights from the files."""
    details: dict[str, str]
    """Settings that change KV but no file."""


def identify_model(server_args: Any) -> ModelIdentity:
    """Return the served model's identity. Reads its files; raises `NoFingerprintError`."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model = model_config_of(server_args)
    if str(server_args.load_format) == "dummy":
        raise NoFingerprintError("dummy weights have no identity; drop --load-format dummy")
    cache = getattr(server_args, "download_dir", None)
    weights = identify_weights(model.model_path, server_args.revision, cache)
    return ModelIdentity(weights, "", _details(server_args, model))


def identify_weights(model_path: str, revision: str | None = None, cache: str | None = None) -> str:
    """Return the fingerprint of a model directory or of a downloaded repository.

    Blocks; raises `NoFingerprintError`. For the arguments see `find_weights`.
    """
    return fingerprint(find_weights(model_path, revision, cache))


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
    values.pop("_name_or_path", None)  # nodes may keep a model under different paths
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
    pool: str, host_pool: Any, page_bytes: int, config: Any, model: ModelIdentity
) -> Namespace:
    """Return the namespace of a pool's pages. `config` is SGLang's `HiCacheStorageConfig`."""
    details = {**model.details, "pool_class": type(host_pool).__name__}
    for name in ("storage_format_tag", "temporal_dtype"):
        if getattr(host_pool, name, None):
            details[name] = str(getattr(host_pool, name))
    shard = _shard(config)
    if not differs_by_rank(pool, host_pool, config):
        shard = msgspec.structs.replace(shard, tp_rank=0, tp_size=1)
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

    The ranks of an MLA model hold equal KV and share a namespace, but their Mamba states and the
    heads of an MHA draft model differ. (With DCP a page is split between the DCP ranks, which are
    part of the shard.)
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
        dcp_rank=config.dcp_rank,
        dcp_size=config.dcp_size,
    )

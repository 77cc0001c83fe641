"""Which namespace a host pool's pages belong to, from what SGLang has loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from memkv_sglang.namespace import Namespace, Shard
from memkv_sglang.plugin.fingerprint import NoFingerprintError, fingerprint

KV_POOL = "kv"


class ModelIdentity(NamedTuple):
    """What was loaded."""

    fingerprint: str
    revision: str
    """Identity of weights that came at run time; empty for those of the files."""
    details: dict[str, str]
    """Settings that change KV without changing a file."""


def identify_model(server_args: Any) -> ModelIdentity:
    """Return who the served model is. Blocks for the fingerprint; raises `NoFingerprintError`."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model = model_config_of(server_args)
    if str(server_args.load_format) == "dummy":
        raise NoFingerprintError("dummy weights are nobody's; drop --load-format dummy")
    return ModelIdentity(identify_weights(model.model_path), "", _details(server_args, model))


def identify_weights(model_path: str) -> str:
    """Return the fingerprint of a directory, or of a repository in the local hub cache."""
    path = Path(model_path)
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(model_path, local_files_only=True))
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
            raise NoFingerprintError(f"{model_path} is no local model: {error}") from None
    return fingerprint(path)


def _details(server_args: Any, model: Any) -> dict[str, str]:
    config = json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str)
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
        details["draft"] = identify_weights(draft)
    return details


def describe_pool(pool: str, host_pool: Any, config: Any, model: ModelIdentity) -> Namespace:
    """Return the namespace of a pool's pages.

    `config` is SGLang's `HiCacheStorageConfig`. The ranks of an MLA model hold equal pages, and
    share one namespace.
    """
    details = dict(model.details)
    if host_pool.storage_format_tag:
        details["format"] = str(host_pool.storage_format_tag)
    return Namespace(
        model=model.fingerprint,
        revision=model.revision,
        pool=pool,
        kv_dtype=str(host_pool.dtype).removeprefix("torch."),
        layout=str(host_pool.layout),
        page_size=int(host_pool.page_size),
        page_bytes=int(host_pool.page_size) * int(host_pool.size_per_token),
        layers=(int(host_pool.start_layer), int(host_pool.end_layer)),
        heads=int(getattr(host_pool, "head_num", 0) or 0),
        head_size=int(getattr(host_pool, "head_dim", 0) or getattr(host_pool, "kv_cache_dim", 0)),
        shard=_shard(config),
        details=details,
    )


def _shard(config: Any) -> Shard:
    shard = Shard(
        tp_rank=config.tp_rank,
        tp_size=config.tp_size,
        pp_rank=config.pp_rank,
        pp_size=config.pp_size,
        cp_rank=config.attn_cp_rank,
        cp_size=config.attn_cp_size,
        dcp_rank=config.dcp_rank,
        dcp_size=config.dcp_size,
    )
    if config.is_mla_model and config.dcp_size == 1:
        return msgspec.structs.replace(shard, tp_rank=0, tp_size=1)
    return shard

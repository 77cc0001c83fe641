"""Say that SGLang cannot store pages of a model, before SGLang fails or says nothing."""

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from memkv_sglang.config.shards import has_minio
from memkv_sglang.plugin.attachment import read_config
from memkv_sglang.plugin.disaggregation import RADIX_FLAG
from memkv_sglang.plugin.launch import uses_memkv
from memkv_sglang.plugin.page_size import RESOLUTION_STEP

log = logging.getLogger(__name__)


def register_model_check() -> None:
    """Check the model when SGLang resolves its arguments."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook(RESOLUTION_STEP)(_check_model)


def _check_model(server_args: Any, previous: Callable[[Any], None]) -> None:
    previous(server_args)
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

    view, model = resolved_view(server_args), model_config_of(server_args)
    if not uses_memkv(view):
        return
    if has_only_windows(model):
        log.warning(
            "memkv: off, the server runs without the tier: all layers of this model have a sliding "
            "window, and SGLang has no host pool for such models"
        )
    if shares_over_nodes(model, view) and not _has_minio(view):
        log.warning(
            "memkv: the nodes of this server find no pages without MinIO: only the first rank "
            "stores the pages that all of them share; set --memkv-endpoint"
        )
    problem = unsuitable_model(model, view) if view.disaggregation_mode == "decode" else ""
    if problem:
        # SGLang resolves arguments outside of its parser, where an exception would print a
        # traceback.
        print(f"error: --enable-memkv: {problem}", file=sys.stderr)
        sys.exit(2)


def has_only_windows(model: Any) -> bool:
    """Return whether SGLang gives this model a `PureSWARadixCache`, which has no HiCache."""
    return bool(model.is_hybrid_swa and model.swa_attention_layer_ids) and not (
        model.full_attention_layer_ids
    )


def shares_over_nodes(model: Any, view: Any) -> bool:
    """Return whether ranks on several nodes load the pages that one of them stores.

    The ranks of a tensor-parallel group do so if the model has latent attention.
    """
    from sglang.srt.configs.model_config import AttentionArch

    group = int(view.tp_size) // (int(view.dp_size) if view.enable_dp_attention else 1)
    ranks_of_node = int(view.tp_size) * int(view.pp_size) // int(view.nnodes)
    return model.attention_arch == AttentionArch.MLA and group > ranks_of_node


def _has_minio(view: Any) -> bool:
    extra = json.loads(view.hicache_storage_backend_extra_config)
    return has_minio(read_config(extra).minio)


def unsuitable_model(model: Any, view: Any) -> str:
    """Return why SGLang cannot store this model's pages on a decode server; "" if it can.

    Sources: `validate_decode_radix_cache` and `DecodeKVCacheOffloadManager` of SGLang 0.5.23, which
    raise when the scheduler starts.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config

    radix_cache = view.disaggregation_decode_enable_radix_cache
    if model.is_hybrid_swa:
        return (
            "SGLang stores no pages of a sliding-window model on a decode server; drop "
            "--enable-memkv here and keep it on the prefill servers"
        )
    if mambaish_config(model) is not None and not radix_cache:
        return (
            "SGLang's decode offload stores no pages of a hybrid model; add "
            f"{RADIX_FLAG}, or drop --enable-memkv here and keep it on the prefill servers"
        )
    return ""

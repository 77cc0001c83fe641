"""The page size where the user gave none: such that a shard's page is worth a request."""

import json
import logging
from typing import Any

from memkv_sglang.plugin.launch import BACKEND

log = logging.getLogger(__name__)

WANTED_BYTES = 2 << 20
"""A page of 2 MiB reaches most of a MinIO's large-object rate; larger ones match less exactly."""

LARGEST_PAGE = 256
"""Tokens."""

STEP = "handle_attention_backend_compatibility"
"""SGLang's resolution step before its own default; later steps correct what a kernel demands."""


def register_page_size() -> None:
    """Let SGLang's argument resolution ask `choose_page_size`."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook(STEP)(_resolve)


def choose_page_size(token_bytes: int, chunk: int) -> int:
    """Return the smallest power of two, at most `LARGEST_PAGE`, whose page is large enough.

    It divides `chunk`, the tokens of a chunk of prefill, as SGLang demands; 0 or less: no chunks.
    """
    size = 1
    while size < LARGEST_PAGE and size * token_bytes < WANTED_BYTES:
        if chunk > 0 and chunk % (2 * size):
            break
        size *= 2
    return size


def _resolve(server_args: Any, previous: Any) -> None:
    previous(server_args)
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolved_view

    view = resolved_view(server_args)
    if not is_ours(view) or view.page_size is not None:
        return
    token_bytes = _token_bytes(model_config_of(server_args), view)
    if token_bytes is None:
        log.info("memkv: the page size of a hybrid model is left to SGLang")
        return
    page_size = choose_page_size(token_bytes, int(view.chunked_prefill_size or 0))
    declare_resolution(server_args, BACKEND, page_size=page_size)
    log.info(
        "memkv: page size %d, so that a shard's page has about %.2g MiB; --page-size overrides",
        page_size,
        page_size * token_bytes / (1 << 20),
    )


def is_ours(config: Any) -> bool:
    """Tell whether a server's arguments name this project's backend."""
    extra = config.hicache_storage_backend_extra_config
    try:
        return bool(extra) and json.loads(extra).get("backend_name") == BACKEND
    except (ValueError, AttributeError):
        return False


def _token_bytes(model: Any, view: Any) -> int | None:
    """Return the bytes that a token takes in one shard's pool; None if its layers differ.

    An estimate: a data type of `auto` counts as the model's.
    """
    from sglang.srt.configs.model_config import AttentionArch

    if getattr(model, "is_hybrid", False) or getattr(model, "is_hybrid_swa", False):
        return None
    element = 1 if "fp8" in str(view.kv_cache_dtype) else model.dtype.itemsize
    layers = -(-int(model.num_hidden_layers) // int(view.pp_size))
    if model.attention_arch == AttentionArch.MLA:
        width = int(model.kv_lora_rank) + int(model.qk_rope_head_dim)
    else:
        width = 2 * int(model.get_num_kv_heads(int(view.tp_size))) * int(model.head_dim)
    return layers * width * element

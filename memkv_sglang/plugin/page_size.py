"""Choose the page size, unless the user did: large enough to load pages efficiently."""

import logging
from typing import Any

from memkv_sglang.plugin.launch import BACKEND, uses_memkv

log = logging.getLogger(__name__)

TARGET_BYTES = 2 << 20
"""Pages of 2 MiB reach most of MinIO's large-object throughput; larger ones match less exactly."""

LARGEST_PAGE = 256
"""Tokens."""

RESOLUTION_STEP = "handle_attention_backend_compatibility"
"""SGLang's resolution step before its own default. Later steps apply what kernels require."""


def register_page_size() -> None:
    """Choose the page size when SGLang resolves its arguments."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook(RESOLUTION_STEP)(_resolve)


def choose_page_size(token_bytes: int, chunk: int) -> int:
    """Return a page size in tokens: a power of two, at most `LARGEST_PAGE`.

    Returns the smallest one whose page has `TARGET_BYTES`, or else the largest allowed.

    Args:
        token_bytes: bytes of a token in one shard's pool.
        chunk: tokens of a prefill chunk, which SGLang requires to be a multiple of the page size;
            0 or less for no chunks.

    """
    size = 1
    while size < LARGEST_PAGE and size * token_bytes < TARGET_BYTES:
        if chunk > 0 and chunk % (2 * size):
            break
        size *= 2
    return size


def _resolve(server_args: Any, previous: Any) -> None:
    previous(server_args)
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolved_view

    view = resolved_view(server_args)
    if not uses_memkv(view) or view.page_size is not None:
        return
    token_bytes = _token_bytes(model_config_of(server_args), view)
    if token_bytes is None:
        log.info("memkv: SGLang chooses the page size of this hybrid model")
        return
    page_size = choose_page_size(token_bytes, int(view.chunked_prefill_size or 0))
    declare_resolution(server_args, BACKEND, page_size=page_size)
    log.info(
        "memkv: page size %d, about %.2g MiB per page and shard; --page-size overrides it",
        page_size,
        page_size * token_bytes / (1 << 20),
    )


def _token_bytes(model: Any, view: Any) -> int | None:
    """Estimate the bytes of a token in one shard's pool; None if the layers differ.

    Assumes the model's data type for `--kv-cache-dtype auto`.
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

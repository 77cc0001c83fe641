"""Choose a page size that loads efficiently, unless the user has chosen one."""

import logging
from collections.abc import Sequence
from typing import Any

from memkv_sglang.plugin.launch import BACKEND, uses_memkv

log = logging.getLogger(__name__)

TARGET_BYTES = 2 << 20
"""Target size of a page. Pages of 2 MiB reach most of MinIO's throughput for large objects; larger
pages match less exactly."""

LARGEST_PAGE = 256
"""Tokens."""

PAGE_SIZE_1 = (
    "this model needs page size 1, because --mamba-radix-cache-strategy no_buffer keeps one state "
    "per sequence. Loads and spills of such small pages are several times slower than of 2 MiB "
    "pages, and each token is an object in the bucket"
)

RESOLUTION_STEP = "handle_attention_backend_compatibility"
"""The resolution step of SGLang before its own default. Later steps apply what kernels require."""


def register_page_size() -> None:
    """Choose the page size when SGLang resolves its arguments."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook(RESOLUTION_STEP)(_resolve)


def choose_page_size(
    token_bytes: int, largest: int = LARGEST_PAGE, divides: Sequence[int] = ()
) -> int:
    """Return a page size in tokens: a power of two, at most `largest`.

    Returns the smallest size whose page has `TARGET_BYTES`, or else the largest allowed size.

    Args:
        token_bytes: bytes of a token in one shard's KV pool.
        largest: the largest allowed size in tokens.
        divides: token counts that SGLang requires to be multiples of the page size.

    """
    size = 1
    while 2 * size <= largest and size * token_bytes < TARGET_BYTES:
        if any(count % (2 * size) for count in divides):
            break
        size *= 2
    return size


def _resolve(server_args: Any, previous: Any) -> None:
    previous(server_args)
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolved_view

    view, model = resolved_view(server_args), model_config_of(server_args)
    if not uses_memkv(view) or view.page_size is not None:
        return
    token_bytes = estimate_token_bytes(model, view)
    page_size = choose_page_size(token_bytes, _largest(model, view), _multiples(view))
    declare_resolution(server_args, BACKEND, page_size=page_size)
    log.log(
        logging.WARNING if page_size == 1 else logging.INFO,
        "memkv: page size %d, about %.3g KiB per page and shard; %s",
        page_size,
        page_size * token_bytes / 1024,
        PAGE_SIZE_1 if _needs_page_size_1(view) else "--page-size overrides it",
    )


def _needs_page_size_1(view: Any) -> bool:
    """Return whether SGLang keeps only the last state of a Mamba or linear-attention sequence.

    In that case, it asserts page size 1 (`MambaComponent` and `validate_mamba_no_buffer` of SGLang
    0.5.23).
    """
    return bool(view.uses_mamba_radix_cache) and view.mamba_radix_cache_strategy == "no_buffer"


def _largest(model: Any, view: Any) -> int:
    """Return the largest page size that suits the model.

    If a window were shorter than a page, SGLang would keep, store and load more than the window.
    """
    if _needs_page_size_1(view):
        return 1
    window = model.sliding_window_size if model.is_hybrid_swa else None
    return min(LARGEST_PAGE, window) if window and window > 0 else LARGEST_PAGE


def _multiples(view: Any) -> list[int]:
    """Return the token counts that SGLang requires to be multiples of the page size."""
    counts = [int(view.chunked_prefill_size or 0)]
    if view.uses_mamba_radix_cache:
        counts.append(int(view.mamba_track_interval))
    return [count for count in counts if count > 0]


def estimate_token_bytes(model: Any, view: Any) -> int:
    """Estimate the bytes of a token in one shard's KV pool.

    Leaves out side pools (windows, Mamba states). For `--kv-cache-dtype auto`, assumes the model's
    data type. PD servers of one model must agree on the page size even if their parallelism
    differs, so it is computed as for one rank.
    """
    from sglang.srt.configs.model_config import AttentionArch

    alone = view.disaggregation_mode != "null"
    stages, ranks = (1, 1) if alone else (int(view.pp_size), int(view.tp_size))
    element = 1 if "fp8" in str(view.kv_cache_dtype) else model.dtype.itemsize
    layers = -(-_kv_layers(model) // stages)
    if model.attention_arch == AttentionArch.MLA:
        width = int(model.kv_lora_rank) + int(model.qk_rope_head_dim)
    else:
        width = 2 * int(model.get_num_kv_heads(ranks)) * int(model.head_dim)
    return layers * width * element


def _kv_layers(model: Any) -> int:
    """Return the number of layers that keep KV of all tokens."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    hybrid = mambaish_config(model)
    full = getattr(hybrid, "full_attention_layer_ids", None) or model.full_attention_layer_ids
    return len(full) if full else int(model.num_hidden_layers)

"""Make host pools of SGLang's own classes from buffers; its constructors differ by version."""

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache import device_pool_info
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

Tensors = tuple[torch.Tensor, ...]

CPU = torch.device("cpu")

HAS_BUFFER_INFO = hasattr(device_pool_info, "MHABufferInfo")
"""Whether host pools are made from descriptions of buffers (since SGLang 0.5.23) or from pools."""


def make_mha(kind: Any, k: Tensors, v: Tensors, page_size: int, **sizes: Any) -> Any:
    """Return a pool of class `kind` for device buffers `[tokens, heads, width]`, one a layer."""
    (_, heads, width), v_width = k[0].shape, v[0].shape[-1]
    if not HAS_BUFFER_INFO:
        pool = _device_pool(
            k_buffer=k,
            v_buffer=v,
            k_data_ptrs=_pointers(k),
            v_data_ptrs=_pointers(v),
            head_num=heads,
            head_dim=width,
            v_head_dim=v_width,
            row_dim=heads * width,
            sizes=sizes,
        )
        return kind(pool, page_size=page_size, **sizes)
    info = device_pool_info.MHABufferInfo(
        buffers=device_pool_info.KVBuffers(
            k=k,
            v=v,
            k_data_ptrs=_pointers(k),
            v_data_ptrs=_pointers(v),
            layout=device_pool_info.KVBufferLayout.NHD,
        ),
        page_size=page_size,
        head_num=heads,
        head_dim=width,
        v_head_dim=v_width,
        dtype=k[0].dtype,
        device=CPU,
    )
    return kind(info, page_size=page_size, **sizes)


def make_mla(rows: Tensors, rope: int, page_size: int, **sizes: Any) -> Any:
    """Return a pool for device buffers `[tokens, 1, width]`; `rope` of the width is for RoPE."""
    width = rows[0].shape[-1]
    dims = {"kv_lora_rank": width - rope, "qk_rope_head_dim": rope}
    if not HAS_BUFFER_INFO:
        pool = _device_pool(kv_buffer=rows, data_ptrs=_pointers(rows), sizes=sizes, **dims)
        return MLATokenToKVPoolHost(pool, page_size=page_size, **sizes)
    info = device_pool_info.MLABufferInfo(
        buffers=rows,
        data_ptrs=_pointers(rows),
        layer_indices=tuple(range(len(rows))),
        device_layer_num=len(rows),
        page_size=page_size,
        kv_cache_dim=width,
        dtype=rows[0].dtype,
        device=CPU,
        **dims,
    )
    return MLATokenToKVPoolHost(info, page_size=page_size, target_layer_num=len(rows), **sizes)


def _device_pool(sizes: dict[str, Any], **buffers: Any) -> Any:
    """Return what host pools read of a device pool; takes its size and layers out of `sizes`."""
    first, last = sizes.pop("start_layer"), sizes.pop("end_layer")
    return SimpleNamespace(
        size=sizes.pop("device_capacity_tokens"),
        layer_num=last - first,
        start_layer=first,
        end_layer=last,
        device=CPU,
        store_dtype=torch.float32,
        layer_shard_enabled=False,
        **buffers,
    )


def _pointers(buffers: Tensors) -> torch.Tensor:
    return torch.tensor([b.data_ptr() for b in buffers], dtype=torch.uint64)

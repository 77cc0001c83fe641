"""Small host pools of SGLang's own classes in CPU memory, with a distinct content per page."""

from typing import Any

import torch
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool, LogicalHostPool
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

from tests.plugin.sglang_pools import make_mha, make_mla

PAGE = 16
"""Tokens per page."""

LAYERS, HEADS, WIDTH = 2, 2, 32
PAGES = 64
TOKENS = PAGES * PAGE


def _sizes(layout: str, shared: bool) -> dict[str, Any]:
    return {
        "host_to_device_ratio": 2.0,
        "host_size": 0,
        "page_size": PAGE,
        "layout": layout,
        "pin_memory": False,
        "allocator_type": "shm" if shared else "default",
        "device_capacity_tokens": TOKENS,
        "start_layer": 0,
        "end_layer": LAYERS,
    }


def mha(layout: str = "page_first", shared: bool = True, v_width: int = WIDTH) -> Any:
    k = tuple(torch.zeros(PAGE, HEADS, WIDTH) for _ in range(LAYERS))
    v = tuple(torch.zeros(PAGE, HEADS, v_width) for _ in range(LAYERS))
    kind = MHATokenToKVPoolHost if v_width == WIDTH else AsymmetricMHATokenToKVPoolHost
    return make_mha(kind, k, v, **_sizes(layout, shared))


def asymmetric(shared: bool = True) -> Any:
    """K and V in two memory files."""
    return mha(shared=shared, v_width=WIDTH // 2)


def mla(shared: bool = True) -> Any:
    rows = tuple(torch.zeros(PAGE, 1, WIDTH) for _ in range(LAYERS))
    return make_mla(rows, 8, **_sizes("page_first", shared))


def mamba(shared: bool = True, side_state: bool = False) -> Any:
    """A page is one state: a temporal one and two convolutions, in three memory files."""
    slots = 4
    info = MambaStateBufferInfo(
        temporal=torch.zeros(LAYERS, slots, 4, 8),
        conv=(
            torch.zeros(LAYERS, slots, 6, dtype=torch.bfloat16),
            torch.zeros(LAYERS, slots, 10, dtype=torch.bfloat16),
        ),
        extra_checkpoint_buffers=(torch.zeros(slots, 3),) if side_state else (),
    )
    return MambaPoolHost(
        info,
        PAGES / slots,
        0,
        device_capacity=slots,
        pin_memory=False,
        allocator_type="shm" if shared else "default",
        layout="page_first",
    )


def compressed(shared: bool = True) -> Any:
    """A side pool of DeepSeek V4, whose bytes per token are those of a layer's page."""
    return DeepSeekV4PagedHostPool(
        "deepseek_v4_c4",
        [torch.zeros(4, 640, dtype=torch.uint8) for _ in range(LAYERS)],
        640,
        PAGES,
        PAGE,
        layout="page_first",
        pin_memory=False,
        allocator_type="shm" if shared else "default",
    )


def logical() -> Any:
    return LogicalHostPool(TOKENS, PAGE)


def slots(pool: Any, pages: Any) -> torch.Tensor:
    """Return the token slots of the pool's pages with these numbers."""
    return torch.cat([torch.arange(p * pool.page_size, (p + 1) * pool.page_size) for p in pages])


def read(pool: Any, page: int) -> bytes:
    """Return a page's bytes."""
    return b"".join(
        bytes(part.contiguous().view(torch.uint8).numpy().tobytes()) for part in _parts(pool, page)
    )


def write(pool: Any, page: int, seed: int) -> bytes:
    """Fill a page and return its bytes."""
    generator = torch.Generator().manual_seed(seed)
    for part in _parts(pool, page):
        content = torch.randint(0, 255, (part.nbytes,), dtype=torch.uint8, generator=generator)
        part.copy_(content.view(part.dtype).view(part.shape))
    return read(pool, page)


def _parts(pool: Any, page: int) -> list[torch.Tensor]:
    """Return views of all parts of a page."""
    begin, end = page * pool.page_size, (page + 1) * pool.page_size
    if isinstance(pool, MambaPoolHost):
        return [buffer[page] for buffer in (pool.temporal_buffer, *pool.conv_buffer)]
    if isinstance(pool, DeepSeekV4PagedHostPool):
        return [pool.kv_buffer[page]]
    if isinstance(pool, AsymmetricMHATokenToKVPoolHost):
        return [pool.k_buffer[begin:end], pool.v_buffer[begin:end]]
    if isinstance(pool, MLATokenToKVPoolHost):
        return [pool.kv_buffer[begin:end]]
    if pool.layout == "page_first_direct":
        return [pool.kv_buffer[:, page]]
    if pool.layout == "layer_first":
        return [pool.kv_buffer[:, :, begin:end]]
    return [pool.kv_buffer[:, begin:end]]

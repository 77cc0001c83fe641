"""SGLang's host pools, allocated as the plugin does it, and the device memory they belong to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from sglang_cpu_platform import host_pools

from memkv_sglang.plugin import state
from memkv_sglang.plugin.host_memory import allocate_shared

PAGE_TOKENS = 64
DTYPE = torch.bfloat16
LAYOUTS = ("page_first", "page_first_direct")


class Kind(NamedTuple):
    """Shape of a model's KV on one rank."""

    layers: int
    width: int
    """Values per token, layer and buffer."""
    buffers: int
    """Two for keys and values, one for latent vectors."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.layers * self.width * self.buffers * DTYPE.itemsize * PAGE_TOKENS


KINDS = {
    "mha": Kind(layers=32, width=128, buffers=2),
    "mla": Kind(layers=61, width=576, buffers=1),
}
"""Llama 8B on one of eight ranks (1 MiB per page), and DeepSeek V3 (4.3 MiB)."""


class DevicePool:
    """The layers of a device pool."""

    def __init__(self, kind: Kind, tokens: int, device: str) -> None:
        """Allocate the memory without filling it."""
        shape = (tokens, 1, kind.width)
        self.buffers = [
            [torch.empty(shape, dtype=DTYPE, device=device) for _ in range(kind.layers)]
            for _ in range(kind.buffers)
        ]

    def fill(self) -> None:
        """Fill every buffer with random bytes."""
        for layer in self.layers():
            _bits(layer).random_(-(1 << 15), 1 << 15)

    def wipe(self) -> None:
        """Set everything to zero."""
        for layer in self.layers():
            layer.zero_()

    def copies(self) -> list[torch.Tensor]:
        """Return copies of the layers, on the device."""
        return [layer.clone() for layer in self.layers()]

    def differing(self, expected: Sequence[torch.Tensor]) -> int:
        """Return how many layers differ in any bit; compares on the device."""
        pairs = zip(self.layers(), expected, strict=True)
        return sum(not torch.equal(_bits(one), _bits(other)) for one, other in pairs)

    def layers(self) -> Iterator[torch.Tensor]:
        """Yield the layers of all buffers."""
        for buffers in self.buffers:
            yield from buffers


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)  # NaN differs from itself


@contextmanager
def host_pool(kind: str, layout: str, device_pool: DevicePool, tokens: int) -> Iterator[Any]:
    """Yield SGLang's own host pool, in shared memory in huge pages; registered with CUDA on a GPU.

    Unregisters it afterwards.
    """
    _use_plugin_memory()
    make = _make_mha if kind == "mha" else _make_mla
    first = device_pool.buffers[0][0]
    pool = make(
        device_pool,
        KINDS[kind],
        host_to_device_ratio=1.0,
        host_size=0,
        page_size=PAGE_TOKENS,
        layout=layout,
        pin_memory=first.is_cuda,
        allocator_type="shm",
        device_capacity_tokens=tokens,
        start_layer=0,
        end_layer=KINDS[kind].layers,
        host_token_capacity=tokens,
    )
    try:
        yield pool
    finally:
        pool.destroy()


def _use_plugin_memory() -> None:
    """Replace SGLang's allocation of shared memory, as the plugin's hook does."""
    from sglang.srt.mem_cache.storage import mmap

    if not isinstance(mmap.alloc_shm, partial):
        state.wanted = lambda: True  # it would ask for a server's arguments
        mmap.alloc_shm = partial(allocate_shared, mmap.alloc_shm)


def _make_mha(device_pool: DevicePool, kind: Kind, **arguments: Any) -> Any:
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    keys, values = device_pool.buffers
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=tuple(keys),
            v=tuple(values),
            k_data_ptrs=_pointers(keys),
            v_data_ptrs=_pointers(values),
            layout=KVBufferLayout.NHD,
        ),
        page_size=PAGE_TOKENS,
        head_num=1,
        head_dim=kind.width,
        v_head_dim=kind.width,
        dtype=DTYPE,
        device=keys[0].device,
    )
    return MHATokenToKVPoolHost(info, **arguments)


def _make_mla(device_pool: DevicePool, kind: Kind, **arguments: Any) -> Any:
    from sglang.srt.mem_cache.device_pool_info import MLABufferInfo
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    (layers,) = device_pool.buffers
    info = MLABufferInfo(
        buffers=tuple(layers),
        data_ptrs=_pointers(layers),
        layer_indices=tuple(range(kind.layers)),
        device_layer_num=kind.layers,
        page_size=PAGE_TOKENS,
        kv_lora_rank=kind.width - 64,
        qk_rope_head_dim=64,
        kv_cache_dim=kind.width,
        dtype=DTYPE,
        device=layers[0].device,
    )
    return MLATokenToKVPoolHost(info, target_layer_num=kind.layers, **arguments)


def _pointers(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    pointers = [layer.data_ptr() for layer in layers]
    return torch.tensor(pointers, dtype=torch.uint64, device=layers[0].device)


def back_up(kind: str, pool: Any, tokens: torch.Tensor) -> None:
    """Copy tokens from the device to the same tokens of the host pool.

    With torch, because SGLang's kernels are not there.
    """
    copy = host_pools.mha_back_up_layers if kind == "mha" else host_pools.mla_back_up_layers
    copy(pool, None, tokens, tokens, "direct")


def load(kind: str, pool: Any, tokens: torch.Tensor) -> None:
    """Copy tokens from the host pool to the same tokens of the device."""
    copy = host_pools.mha_load_layer if kind == "mha" else host_pools.mla_load_layer
    for layer in range(KINDS[kind].layers):
        copy(pool, None, tokens, tokens, layer, "direct")


def ranges(pool: Any) -> list[tuple[int, int]]:
    """Return address and length of each buffer of the host pool."""
    buffers = pool.kv_buffer if isinstance(pool.kv_buffer, list | tuple) else [pool.kv_buffer]
    return [(one.data_ptr(), one.numel() * one.element_size()) for one in buffers]


def registered(pool: Any) -> int:
    """Return how many bytes SGLang registered with CUDA."""
    buffers = pool.kv_buffer if isinstance(pool.kv_buffer, list | tuple) else [pool.kv_buffer]
    name = "_sglang_cuda_host_registered_ranges"
    return sum(size for one in buffers for _, size in getattr(one, name, []))

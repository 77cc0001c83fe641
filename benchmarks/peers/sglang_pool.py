"""The host pool and the other arguments that SGLang passes to its storage backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.pool import HostPool

if TYPE_CHECKING:
    import torch

    from memkv_sglang.page import Page


BUFFERS = 2
"""Parts of a page. An MHA pool keeps the keys and the values of a page apart."""


class SglangPool:
    """The parts of SGLang's `MHATokenToKVPoolHost` that backends use, over a `HostPool`.

    A page has one "token", in the layout `page_first`: the keys of all pages, then their values.
    """

    layout = "page_first"
    page_size = 1
    pin_memory = False

    def __init__(self, pool: HostPool) -> None:
        import torch

        self._pool = pool
        part = pool.page_bytes // BUFFERS
        flat = torch.frombuffer(pool.memory, dtype=torch.uint8, count=pool.length)
        self.kv_buffer = flat.reshape(BUFFERS, pool.pages, part)

    def indices(self, pages: Sequence[Page]) -> torch.Tensor:
        """Return the pages' indices, as SGLang's controller passes them to a backend."""
        import torch

        return torch.tensor([self._pool.index(page) for page in pages])

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return the address and length of each page's key and value, in order."""
        places = [b for page in self._pool.buffers(0, indices.tolist()) for b in page]
        return [self._pool.address + p.offset for p in places], [p.length for p in places]

    def is_stride_page_aligned(self, alignment: int) -> bool:
        """Return whether every page is aligned for direct I/O."""
        part = self._pool.page_bytes // BUFFERS
        return self._pool.address % alignment == part % alignment == 0

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Return memory for one page, into which SGLang's generic path reads."""
        import torch

        return torch.zeros(self._pool.page_bytes, dtype=torch.uint8)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """Return a contiguous copy of a page."""
        return self.kv_buffer[:, index].flatten()

    def set_from_flat_data_page(self, index: int, data: torch.Tensor) -> None:
        """Copy a contiguous page into the pool."""
        self.kv_buffer[:, index] = data.reshape(BUFFERS, -1)


def storage_config(**extra: object) -> Any:
    """Return SGLang's `HiCacheStorageConfig` for a single rank."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    return HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name="benchmark",
        extra_config=dict(extra),
    )

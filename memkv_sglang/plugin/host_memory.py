"""Allocate the host pool in huge pages, in sealed shared memory that the agent can map."""

import functools
import logging
import math
import mmap
import os
from collections.abc import Callable
from typing import Any

from memkv_sglang.plugin import state
from memkv_sglang.shared_memory import map_memory, populate

log = logging.getLogger(__name__)

GIB = 1 << 30


def allocate_shared(original: Callable[..., Any], dims: tuple[int, ...], dtype: Any) -> Any:
    """Replace SGLang's `alloc_shm`; return (tensor, descriptor, mapping).

    The memory file that SGLang would use cannot be sealed. The agent serves all servers of a node,
    so it only maps memory that cannot shrink. All pages are populated when this returns, because
    cudaHostRegister requires it, and pinned pages can no longer become huge. Servers without the
    tier get SGLang's own memory.
    """
    if not state.wanted():
        return original(dims, dtype)
    import torch

    _warn_about_huge_pages()
    count = math.prod(dims)
    size = -(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = os.memfd_create("memkv-host-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        memory = map_memory(descriptor, size)
        if not populate(memory, lambda done: _report(done, size)):
            log.info("memkv: the host pool has no huge pages, so loads from NVMe are slower")
    except BaseException:
        os.close(descriptor)
        raise
    tensor = torch.frombuffer(memory, dtype=dtype, count=count).reshape(dims)
    return tensor, descriptor, memory


def _report(done: int, size: int) -> None:
    log.info(
        "memkv: allocating the host pool: %.0f of %.0f GiB (%d %%)",
        done / GIB,
        size / GIB,
        100 * done // size,
    )


@functools.cache
def _warn_about_huge_pages() -> None:
    """Log once that SGLang's setting for hugetlb pages is ignored: agents refuse such memory."""
    if os.environ.get("SGLANG_HUGEPAGE_SIZE"):
        log.warning(
            "memkv: SGLANG_HUGEPAGE_SIZE is ignored; the host pool uses transparent huge pages "
            "of 2 MiB, which need no reservation"
        )

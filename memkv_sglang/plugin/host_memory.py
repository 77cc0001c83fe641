"""The host pool's memory: sealed against shrinking, so that the agent may map it; of huge pages."""

import logging
import math
import mmap
import os
from collections.abc import Callable
from typing import Any

from memkv_sglang.plugin import state
from memkv_sglang.shared_memory import map_memory, populate

log = logging.getLogger(__name__)


def allocate_shared(original: Callable[..., Any], dims: tuple[int, ...], dtype: Any) -> Any:
    """Stand in for SGLang's `alloc_shm`: return (tensor, descriptor, mapping).

    SGLang's own memory file cannot be sealed, and the agent, which serves all servers of a node,
    does not map what its owner could shrink under it. Every page is there on return, as
    cudaHostRegister demands, and in its final place: pinned pages cannot become huge any more.
    Servers without the tier get SGLang's own.
    """
    if not state.wanted():
        return original(dims, dtype)
    import torch

    count = math.prod(dims)
    size = -(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = os.memfd_create("memkv-host-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        memory = map_memory(descriptor, size)
        if not populate(memory):
            log.info("memkv: no huge pages for the host pool; loads from NVMe are slower")
    except BaseException:
        os.close(descriptor)
        raise
    tensor = torch.frombuffer(memory, dtype=dtype, count=count).reshape(dims)
    return tensor, descriptor, memory

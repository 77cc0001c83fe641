"""Copy between HiCache's device and host pools with PyTorch instead of CUDA kernels.

Replaces the two transfer methods of SGLang's MHA, MLA and Mamba host pools. Token `i` of a layer
lies at `host[i]` in `layer_first`, `host[i, layer]` in `page_first`, and
`host[i // page_size, layer, i % page_size]` in `page_first_direct`; layouts as in
`mem_cache/pool_host/mha.py` and `mla.py` of SGLang 0.5.22 and 0.5.23. State `i` of a Mamba layer
lies at `host[i, layer, 0]` in each of its buffers. Copies are synchronous.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def host_span(pool: Any, buffer: Tensor, layer: int, begin: int, count: int) -> Tensor:
    """Return a view of `count` tokens of a layer. They must be in one page if the layout has pages.

    Raises:
        ValueError: only a GPU or NPU supports this layout.

    """
    if pool.layout == "layer_first":
        return buffer[layer, begin : begin + count]
    if pool.layout == "page_first":
        return buffer[begin : begin + count, layer]
    if pool.layout == "page_first_direct":
        page, offset = divmod(begin, pool.page_size)
        return buffer[page, layer, offset : offset + count]
    raise ValueError(
        f"--hicache-mem-layout {pool.layout} does not work on a plain CPU: "
        "use page_first, page_first_direct or layer_first"
    )


def spans(pool: Any, host: Tensor, device: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield spans that are contiguous in both pools: first host token, first device token, count.

    Pages are contiguous, and so are pages that were allocated together. Copying spans takes a
    fraction of the time of copying by index.
    """
    breaks = (host[1:] - host[:-1] != 1) | (device[1:] - device[:-1] != 1)
    if pool.layout == "page_first_direct":
        breaks |= host[1:] % pool.page_size == 0
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
    ends = [*starts[1:], len(host)]
    for start, end in zip(starts, ends, strict=True):
        if end > start:
            yield int(host[start]), int(device[start]), end - start


def load(pool: Any, buffer: Tensor, layer: int, host: Tensor, device: Tensor, to: Tensor) -> None:
    """Copy a layer's tokens from slots `host` of the host buffer to slots `device` of `to`."""
    for source, target, count in spans(pool, host, device):
        to[target : target + count] = host_span(pool, buffer, layer, source, count)


def back_up(
    pool: Any, buffer: Tensor, layer: int, host: Tensor, device: Tensor, source: Tensor
) -> None:
    """Copy a layer's tokens from slots `device` of `source` to slots `host` of the host buffer."""
    for target, begin, count in spans(pool, host, device):
        host_span(pool, buffer, layer, target, count)[:] = source[begin : begin + count]


def mha_load_layer(
    self: Any,
    device_pool: Any,  # noqa: ARG001 (SGLang's signature)
    host_indices: Tensor,
    device_indices: Tensor,
    layer_id: int,
    io_backend: str,  # noqa: ARG001
    *,
    is_draft: bool = False,
) -> None:
    """Replace `MHATokenToKVPoolHost.load_to_device_per_layer`."""
    if not is_draft and not 0 <= layer_id < self.target_layer_num:
        return
    for host, device in (
        (self.k_buffer, self.device_k_buffers),
        (self.v_buffer, self.device_v_buffers),
    ):
        load(self, host, layer_id, host_indices, device_indices, device[layer_id])


def mha_back_up_layers(
    self: Any,
    device_pool: Any,  # noqa: ARG001
    host_indices: Tensor,
    device_indices: Tensor,
    io_backend: str,  # noqa: ARG001
) -> None:
    """Replace `MHATokenToKVPoolHost.backup_from_device_all_layer`."""
    for host, device in (
        (self.k_buffer, self.device_k_buffers),
        (self.v_buffer, self.device_v_buffers),
    ):
        for layer, source in enumerate(device):
            back_up(self, host, layer, host_indices, device_indices, source)


def mla_load_layer(
    self: Any,
    device_pool: Any,  # noqa: ARG001
    host_indices: Tensor,
    device_indices: Tensor,
    layer_id: int,
    io_backend: str,  # noqa: ARG001
    *,
    is_draft: bool = False,
) -> None:
    """Replace `MLATokenToKVPoolHost.load_to_device_per_layer`."""
    place = _mla_place(self, layer_id, is_draft=is_draft)
    if place is not None:
        layer, device = place
        load(self, self.kv_buffer, layer, host_indices, device_indices, device)


def _mla_place(pool: Any, layer_id: int, *, is_draft: bool) -> tuple[int, Tensor] | None:
    """Return a layer's host index and its device buffer; None if the layer is another rank's."""
    if not hasattr(pool, "_target_layer_indices"):  # before 0.5.23
        known = is_draft or 0 <= layer_id < pool.target_layer_num
        return (layer_id, pool.device_kv_buffers[layer_id]) if known else None
    if not is_draft and layer_id not in pool._target_layer_indices:
        return None
    device = pool.device_kv_buffers[pool._buffer_index_by_layer[layer_id]]
    return pool._host_layer_by_controller[layer_id], device


def mla_back_up_layers(
    self: Any,
    device_pool: Any,  # noqa: ARG001
    host_indices: Tensor,
    device_indices: Tensor,
    io_backend: str,  # noqa: ARG001
) -> None:
    """Replace `MLATokenToKVPoolHost.backup_from_device_all_layer`."""
    for layer, source in enumerate(self.device_kv_buffers):
        back_up(self, self.kv_buffer, layer, host_indices, device_indices, source)


def mamba_load_layer(
    self: Any,
    device_pool: Any,  # noqa: ARG001
    host_indices: Tensor,
    device_indices: Tensor,
    layer_id: int,
    io_backend: str = "kernel",  # noqa: ARG001
    *,
    is_draft: bool = False,  # noqa: ARG001
) -> None:
    """Replace `MambaPoolHost.load_to_device_per_layer`."""
    if layer_id == 0:  # parts that belong to no layer
        self._transfer_slot_states(host_indices, device_indices, to_device=True)
    for host, layers in _states(self):
        layers[layer_id][device_indices] = host[host_indices, layer_id, 0]


def mamba_back_up_layers(
    self: Any,
    device_pool: Any,  # noqa: ARG001
    host_indices: Tensor,
    device_indices: Tensor,
    io_backend: str = "kernel",  # noqa: ARG001
) -> None:
    """Replace `MambaPoolHost.backup_from_device_all_layer`."""
    self._transfer_slot_states(host_indices, device_indices, to_device=False)
    for host, layers in _states(self):
        for layer, source in enumerate(layers):
            host[host_indices, layer, 0] = source[device_indices]


def _states(pool: Any) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield the host buffer and the device layers of each kind of state."""
    if pool.temporal_state_elem_size:
        yield pool.temporal_buffer, pool.temporal_device_layers
    yield from zip(pool.conv_buffer, pool.conv_device_layers, strict=True)

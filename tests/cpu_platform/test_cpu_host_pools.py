"""Copies between the device pool and the host pool, with SGLang's own pool classes."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

import torch
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang_cpu_platform import host_pools

from tests.plugin.sglang_pools import make_mha, make_mla

LAYERS, PAGE, SLOTS, WIDTH = 3, 4, 32, 8
LAYOUTS = ["page_first", "page_first_direct", "layer_first"]
# Pages of the two pools; the last two are adjacent in both.
HOST = torch.cat([torch.arange(p * PAGE, (p + 1) * PAGE) for p in (5, 1, 2)])
DEVICE = torch.cat([torch.arange(p * PAGE, (p + 1) * PAGE) for p in (2, 6, 7)])


@pytest.fixture(autouse=True)
def _hooked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    load, back_up = "load_to_device_per_layer", "backup_from_device_all_layer"
    monkeypatch.setattr(MHATokenToKVPoolHost, load, host_pools.mha_load_layer)
    monkeypatch.setattr(MHATokenToKVPoolHost, back_up, host_pools.mha_back_up_layers)
    monkeypatch.setattr(MLATokenToKVPoolHost, load, host_pools.mla_load_layer)
    monkeypatch.setattr(MLATokenToKVPoolHost, back_up, host_pools.mla_back_up_layers)
    # The tests' pools have a few KiB and fit on any machine.
    monkeypatch.setattr("sglang.srt.mem_cache.pool_host.base.HICACHE_HOST_MEMORY_RESERVE_BYTES", 0)
    yield


def device_buffers(heads: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(SLOTS, heads, WIDTH) for _ in range(LAYERS))


def sizes(layout: str) -> dict[str, Any]:
    return {
        "host_to_device_ratio": 2.0,
        "host_size": 0,
        "page_size": PAGE,
        "layout": layout,
        "pin_memory": False,
        "device_capacity_tokens": SLOTS,
        "start_layer": 0,
        "end_layer": LAYERS,
    }


def mha_pool(layout: str) -> tuple[MHATokenToKVPoolHost, tuple[torch.Tensor, ...]]:
    k, v = device_buffers(2), device_buffers(2)
    return make_mha(MHATokenToKVPoolHost, k, v, **sizes(layout)), (*k, *v)


def mla_pool(layout: str) -> tuple[MLATokenToKVPoolHost, tuple[torch.Tensor, ...]]:
    rows = device_buffers(1)
    return make_mla(rows, 2, **sizes(layout)), rows


def page_of(pool: Any, first: int) -> torch.Tensor:
    """A page as SGLang's own reader returns it, with axes [part, layer, token, head, width]."""
    page = pool.get_data_page(first, flat=False)
    if isinstance(pool, MLATokenToKVPoolHost):
        page = page.unsqueeze(0)
    if pool.layout == "page_first":
        return page.transpose(1, 2)
    return page.squeeze(1) if pool.layout == "page_first_direct" else page


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [mha_pool, mla_pool])
def test_pages_land_where_sglang_reads_them(make: Any, layout: str) -> None:
    pool, device = make(layout)
    pool.backup_from_device_all_layer(None, HOST, DEVICE, "kernel")
    parts = torch.stack(device).unflatten(0, (-1, LAYERS))
    for host_first, device_first in zip(
        HOST[::PAGE].tolist(), DEVICE[::PAGE].tolist(), strict=True
    ):
        expected = parts[:, :, device_first : device_first + PAGE]
        torch.testing.assert_close(page_of(pool, host_first), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [mha_pool, mla_pool])
def test_pages_come_back_to_other_slots_layer_by_layer(make: Any, layout: str) -> None:
    pool, device = make(layout)
    before = [buffer.clone() for buffer in device]
    pool.backup_from_device_all_layer(None, HOST, DEVICE, "kernel")
    target = torch.arange(12, 12 + len(DEVICE))
    for buffer in device:
        buffer.zero_()
    for layer in range(LAYERS):
        pool.load_to_device_per_layer(None, HOST, target, layer, "kernel")
        others = [b for i, b in enumerate(device) if i % LAYERS > layer]
        assert not any(b.any() for b in others), "only the named layer is loaded"
    for buffer, old in zip(device, before, strict=True):
        torch.testing.assert_close(buffer[target], old[DEVICE], rtol=0, atol=0)


@pytest.mark.parametrize("make", [mha_pool, mla_pool])
def test_another_stages_layer_is_left_alone(make: Any) -> None:
    pool, device = make("page_first")
    before = [buffer.clone() for buffer in device]
    pool.load_to_device_per_layer(None, HOST, DEVICE, LAYERS, "kernel")
    assert all(torch.equal(a, b) for a, b in zip(device, before, strict=True))


def test_an_unknown_layout_is_refused_with_advice() -> None:
    pool, _ = mha_pool("page_head")
    with pytest.raises(ValueError, match=r"page_head does not work.*use page_first"):
        pool.backup_from_device_all_layer(None, HOST, DEVICE, "kernel")

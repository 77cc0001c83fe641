"""Attention over the paged cache equals a plain formula and SGLang's own attention."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang_cpu_platform import attention

HEADS, KV_HEADS, SLOTS = 4, 2, 200


def plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    new, length = len(query), len(keys)
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) / query.shape[-1] ** 0.5
    hidden = torch.ones(new, length, dtype=torch.bool).triu(length - new + 1)
    if window is not None:
        hidden |= torch.ones(new, length, dtype=torch.bool).tril(length - new - window - 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


@pytest.mark.parametrize("value_width", [16, 12])
@pytest.mark.parametrize(("new", "length"), [(1, 50), (50, 50), (7, 50), (20, 21)])
@pytest.mark.parametrize("window", [None, 0, 5, 49, 100])
def test_attends_to_its_window_up_to_itself(
    new: int, length: int, value_width: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", 8)
    torch.manual_seed(0)
    query = torch.randn(new, HEADS, 16)
    keys, values = torch.randn(length, KV_HEADS, 16), torch.randn(length, KV_HEADS, value_width)
    output = torch.empty(new, HEADS, value_width)
    attention.attend(query, keys, values, output, None, window)
    torch.testing.assert_close(output, plain(query, keys, values, window))


def arguments(prefixes: list[int], new: list[int], value_width: int) -> dict[str, Any]:
    torch.manual_seed(1)
    lengths = [p + n for p, n in zip(prefixes, new, strict=True)]
    req_to_token = torch.stack([torch.randperm(SLOTS) for _ in range(4)])
    return {
        "query": torch.randn(sum(new), HEADS, 16),
        "output": torch.zeros(sum(new), HEADS, value_width),
        "k_cache": torch.randn(SLOTS, KV_HEADS, 16),
        "v_cache": torch.randn(SLOTS, KV_HEADS, value_width),
        "req_to_token": req_to_token,
        "req_pool_indices": torch.tensor([3, 0, 2][: len(new)]),
        "seq_lens": torch.tensor(lengths),
        "scaling": 0.3,
        "enable_gqa": True,
    }


def unhooked(name: str) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(TorchNativeAttnBackend, name)
    return getattr(method, "__wrapped__", method)


@pytest.mark.parametrize("value_width", [16, 12])
@pytest.mark.parametrize("window", [None, -1, 5])
def test_extend_equals_sglangs(value_width: int, window: int | None) -> None:
    prefixes, new = [30, 0, 64], [5, 20, 1]
    original = unhooked("_run_sdpa_forward_extend")
    both = []
    for run in (original, lambda *a, **k: attention.extend(original, *a, **k)):
        call = arguments(prefixes, new, value_width) | {
            "extend_prefix_lens": torch.tensor(prefixes),
            "extend_seq_lens": torch.tensor(new),
            "causal": True,
            "sliding_window_size": window,
        }
        both.append(run(object.__new__(TorchNativeAttnBackend), **call))
    torch.testing.assert_close(both[0], both[1])


@pytest.mark.parametrize("value_width", [16, 12])
def test_decode_equals_sglangs(value_width: int) -> None:
    original = unhooked("_run_sdpa_forward_decode")
    both = []
    for run in (original, lambda *a, **k: attention.decode(original, *a, **k)):
        call = arguments([30, 1, 64], [1, 1, 1], value_width)
        both.append(run(object.__new__(TorchNativeAttnBackend), **call))
    torch.testing.assert_close(both[0], both[1])


class SlidingPool:
    """A separate pool for sliding-window layers, without the slots that left every window."""

    def __init__(self, live: torch.Tensor) -> None:
        self.mapping = torch.zeros(SLOTS, dtype=torch.long)
        self.mapping[live] = torch.randperm(SLOTS - 1)[: len(live)] + 1

    def translate_loc_from_full_to_swa(self, slots: torch.Tensor) -> torch.Tensor:
        return self.mapping[slots]


def test_a_layer_with_a_window_reads_its_own_pool() -> None:
    prefixes, new, window = [30, 0, 64], [5, 20, 1], 7
    call = arguments(prefixes, new, 16) | {
        "extend_prefix_lens": torch.tensor(prefixes),
        "extend_seq_lens": torch.tensor(new),
        "causal": True,
        "sliding_window_size": window,
    }
    original = unhooked("_run_sdpa_forward_extend")
    backend = object.__new__(TorchNativeAttnBackend)
    expected = original(backend, **call).clone()
    table = call["req_to_token"]
    live = [
        table[request, max(0, prefix - window) : prefix + n]
        for request, prefix, n in zip([3, 0, 2], prefixes, new, strict=True)
    ]
    backend.use_sliding_window_kv_pool = True
    for request, (slots, prefix, n) in enumerate(zip(live, prefixes, new, strict=True)):
        pool = SlidingPool(slots)
        backend.token_to_kv_pool = pool
        caches = {}
        for name in ("k_cache", "v_cache"):
            caches[name] = torch.full_like(call[name], float("nan"))
            caches[name][pool.mapping[slots]] = call[name][slots]
        rows = slice(sum(new[:request]), sum(new[: request + 1]))
        one = {
            **call,
            **caches,
            "query": call["query"][rows],
            "output": torch.zeros(n, HEADS, 16),
            "req_pool_indices": call["req_pool_indices"][request : request + 1],
            "seq_lens": torch.tensor([prefix + n]),
            "extend_prefix_lens": torch.tensor([prefix]),
            "extend_seq_lens": torch.tensor([n]),
        }
        actual = attention.extend(original, backend, **one)
        torch.testing.assert_close(actual, expected[rows])

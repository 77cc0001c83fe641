"""Attention over the paged KV cache with PyTorch's fused CPU kernel.

SGLang's `torch_native` backend computes attention for every token of the sequence, including the
cached prefix, and discards those rows, so a cache hit saves almost nothing. This module computes it
only for the new tokens, and a layer with a sliding window reads only the keys inside it. The fused
kernel does not support MLA's values, which are narrower than its keys; SGLang's own calls then take
PyTorch's slow path.

Layers with a sliding window may keep their KV in a pool of their own (`SWAKVPool`). `torch_native`
writes to that pool, but reads it with the slots of the other pool. This module translates the
slots.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

# Queries per kernel call. This bounds the mask, and the scores if they are materialized, to
# QUERY_ROWS x tokens. It also skips the keys after the last query.
QUERY_ROWS = 1024


def extend(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `TorchNativeAttnBackend._run_sdpa_forward_extend`."""
    call = _Call(original, self, args, kwargs)
    if not call.is_plain(causal=True):
        return original(self, *args, **kwargs)
    return call.attend(call["extend_seq_lens"].tolist())


def decode(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `TorchNativeAttnBackend._run_sdpa_forward_decode`, with one new token per request."""
    call = _Call(original, self, args, kwargs)
    if not call.is_plain(causal=False):
        return original(self, *args, **kwargs)
    return call.attend([1] * len(call["seq_lens"]))


class _Call:
    """The arguments of one call, by the names SGLang gives them.

    `query` and `output` are `[tokens, heads, width]` over all requests, `k_cache` and
    `v_cache` `[slots, kv_heads, width]`, `req_to_token` maps a request and a position to a
    slot, `seq_lens` counts each request's tokens, cached and new.
    """

    def __init__(
        self, original: Callable[..., Any], backend: Any, args: Any, kwargs: dict[str, Any]
    ) -> None:
        bound = inspect.signature(original).bind(backend, *args, **kwargs)
        bound.apply_defaults()
        self._arguments = bound.arguments

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def is_plain(self, *, causal: bool) -> bool:
        """Return whether this is self-attention over previous tokens only."""
        return (
            self["causal"] == causal and not self["is_cross_attn"] and self["encoder_lens"] is None
        )

    @property
    def window(self) -> int | None:
        """Number of tokens before its own that a query sees; None for all."""
        size = self["sliding_window_size"]
        return None if size is None or size < 0 else int(size)

    def attend(self, new_tokens: list[int]) -> torch.Tensor:
        """Compute and return the output of all requests."""
        query = self["query"]
        output: torch.Tensor = self["output"]
        requests = zip(
            self["req_pool_indices"].tolist(), self["seq_lens"].tolist(), new_tokens, strict=True
        )
        first, window = 0, self.window
        for request, length, new in requests:
            # Slots before the window may already hold another sequence.
            begin = 0 if window is None else max(0, length - new - window)
            slots = self._slots(self["req_to_token"][request, begin:length])
            rows = slice(first, first + new)
            keys = self["k_cache"][slots].to(query.dtype)
            values = self["v_cache"][slots].to(query.dtype)
            attend(query[rows], keys, values, output[rows], self["scaling"], window)
            first += new
        return output

    def _slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Return where the layer's pool keeps these tokens."""
        backend = self["self"]
        if self.window is None or not getattr(backend, "use_sliding_window_kv_pool", False):
            return slots
        translated: torch.Tensor = backend.token_to_kv_pool.translate_loc_from_full_to_swa(slots)
        return translated


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    scaling: float | None,
    window: int | None = None,
) -> None:
    """Write causal attention of a sequence's last tokens to `output`.

    Args:
        query: the last tokens, `[new, heads, head_dim]`.
        keys: all tokens, `[tokens, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        values: all tokens, `[tokens, kv_heads, v_head_dim]`.
        output: `[new, heads, v_head_dim]`.
        scaling: factor of the scores; None for 1 / sqrt(`head_dim`).
        window: number of tokens before its own that a query sees; None for all.

    """
    new, length, width = len(query), len(keys), values.shape[-1]
    if new == 1:
        first = 0 if window is None else max(0, length - 1 - window)
        keys, values = keys[first:], values[first:]
        output[0] = _attend_one(query[0], keys, values, scaling)
        return
    # The fused CPU kernel requires values as wide as keys (MLA's are narrower).
    values = pad(values, (0, keys.shape[-1] - width))
    query, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
    grouped = query.shape[1] != keys.shape[1]
    # Without a prefix, the kernel's own causal mode skips half of the work.
    whole = new == length and (window is None or length <= window + 1)
    rows = new if whole else QUERY_ROWS
    for begin in range(0, new, rows):
        end = min(begin + rows, new)
        visible = length - new + end
        first = 0 if window is None else max(0, visible - (end - begin) - window)
        part = scaled_dot_product_attention(
            query[:, :, begin:end],
            keys[:, :, first:visible],
            values[:, :, first:visible],
            attn_mask=None if whole else _lower_right(end - begin, visible - first, window),
            is_causal=whole,
            scale=scaling,
            enable_gqa=grouped,
        )
        output[begin:end] = part[0, :, :, :width].transpose(0, 1)


def _lower_right(queries: int, keys: int, window: int | None) -> torch.Tensor:
    """Return the causal mask of the last `queries` of `keys` tokens."""
    mask = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
    return mask if window is None else mask.triu_(keys - queries - window)


def _attend_one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Return the attention of one token, `[heads, v_head_dim]`.

    The fused kernel multiplies a vector by a matrix for each head. Computing all heads that share
    a matrix at once takes a quarter of the time.
    """
    heads, width = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(kv_heads, heads // kv_heads, width)
    factor = width**-0.5 if scaling is None else scaling
    weights = torch.bmm(grouped, keys.permute(1, 2, 0)).mul_(factor).softmax(-1)
    return torch.bmm(weights, values.transpose(0, 1)).view(heads, -1)

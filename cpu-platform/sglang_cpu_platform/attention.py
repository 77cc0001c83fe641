"""Attention over the paged KV cache with PyTorch's fused CPU kernel.

SGLang's `torch_native` backend computes a query for every token of the sequence, including the
cached prefix, and discards those rows, so a cache hit saves almost nothing. Here only the new
tokens are queries. The fused kernel does not support MLA's values, which are narrower than its
keys; SGLang's own calls then take PyTorch's slow path.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

# Queries per kernel call: bounds the mask (and the scores, if materialised) to QUERY_ROWS x
# tokens, and skips the keys after the last query.
QUERY_ROWS = 1024


def extend(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run around `TorchNativeAttnBackend._run_sdpa_forward_extend`."""
    call = _Call(original, self, args, kwargs)
    if not call.is_plain(causal=True):
        return original(self, *args, **kwargs)
    return call.attend(call["extend_seq_lens"].tolist())


def decode(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run around `TorchNativeAttnBackend._run_sdpa_forward_decode`: one new token per request."""
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
        """Return whether this is self-attention over all previous tokens, without a window."""
        window = self["sliding_window_size"]
        return (
            self["causal"] == causal
            and not self["is_cross_attn"]
            and self["encoder_lens"] is None
            and (window is None or window < 0)
        )

    def attend(self, new_tokens: list[int]) -> torch.Tensor:
        """Compute the output of all requests and return it."""
        query = self["query"]
        output: torch.Tensor = self["output"]
        requests = zip(
            self["req_pool_indices"].tolist(), self["seq_lens"].tolist(), new_tokens, strict=True
        )
        first = 0
        for request, length, new in requests:
            slots = self["req_to_token"][request, :length]
            rows = slice(first, first + new)
            keys = self["k_cache"][slots].to(query.dtype)
            values = self["v_cache"][slots].to(query.dtype)
            attend(query[rows], keys, values, output[rows], self["scaling"])
            first += new
        return output


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    scaling: float | None,
) -> None:
    """Write causal attention of a sequence's last tokens to `output`.

    Args:
        query: the last tokens, `[new, heads, head_dim]`.
        keys: all tokens, `[tokens, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        values: all tokens, `[tokens, kv_heads, v_head_dim]`.
        output: `[new, heads, v_head_dim]`.
        scaling: factor of the scores; None for one over the root of `head_dim`.

    """
    new, length, width = len(query), len(keys), values.shape[-1]
    if new == 1:
        output[0] = _attend_one(query[0], keys, values, scaling)
        return
    # The fused CPU kernel requires values as wide as keys (MLA's are narrower).
    values = pad(values, (0, keys.shape[-1] - width))
    query, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
    grouped = query.shape[1] != keys.shape[1]
    # Without a prefix the kernel's own causal mode skips half the work.
    whole = new == length
    rows = new if whole else QUERY_ROWS
    for begin in range(0, new, rows):
        end = min(begin + rows, new)
        visible = length - new + end
        part = scaled_dot_product_attention(
            query[:, :, begin:end],
            keys[:, :, :visible],
            values[:, :, :visible],
            attn_mask=None if whole else _lower_right(end - begin, visible),
            is_causal=whole,
            scale=scaling,
            enable_gqa=grouped,
        )
        output[begin:end] = part[0, :, :, :width].transpose(0, 1)


def _lower_right(queries: int, keys: int) -> torch.Tensor:
    """Return the causal mask of the last `queries` of `keys` tokens."""
    return torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)


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

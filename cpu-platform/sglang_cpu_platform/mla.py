"""Hooks for models with multi-head latent attention, in addition to `host_pools`."""

from collections.abc import Callable
from typing import Any


def handler(
    result: Callable[[Any, Any], Any],
    _registry: type,
    backend_name: str,
) -> Callable[[Any, Any], Any]:
    """Run after `AttentionBackendRegistry.get_handler`.

    The registry has no handler for `torch_native`, and would return the Triton backend's. That one
    mixes two forms of the attention, but `torch_native` computes only the absorbed form.
    """
    return _absorbed if backend_name == "torch_native" else result


def _absorbed(_attention: Any, _forward_batch: Any) -> Any:
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    return AttnForwardMethod.MLA


def rope(
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: int,
    is_neox_style: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    dtype: Any = None,
    partial_rotary_factor: float = 1.0,
    device: str | None = None,  # noqa: ARG001 (SGLang's signature)
) -> Any:
    """Replace `get_rope_wrapper`, which supports only one kind of scaling on the CPU."""
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    return get_rope(
        head_size,
        rotary_dim,
        max_position,
        base,
        is_neox_style,
        rope_scaling,
        dtype,
        partial_rotary_factor,
    )

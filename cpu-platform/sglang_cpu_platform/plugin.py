"""The two entry points: one for the platform, one for its hooks."""

import logging
import os
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from sglang_cpu_platform import forking

logger = logging.getLogger(__name__)

PLATFORM = "sglang_cpu_platform.platform.PlainCpuPlatform"

# Host memory that HiCache leaves free. SGLang's 10 GiB are too much for a laptop.
HOST_MEMORY_RESERVE_BYTES = 1 << 30


class Hook(NamedTuple):
    """A function of SGLang or PyTorch that this platform changes."""

    target: str
    name: str
    """Module and function of this package."""
    kind: str
    """Name of SGLang's `HookType`."""

    @property
    def function(self) -> Callable[..., Any]:
        """Return the function that runs around, before, after or instead of the target."""
        function: Callable[..., Any] = pkgutil.resolve_name(f"{__package__}.{self.name}")
        return function


_POOLS = "sglang.srt.mem_cache.pool_host"
_MHA = f"{_POOLS}.mha.MHATokenToKVPoolHost"
_MLA = f"{_POOLS}.mla.MLATokenToKVPoolHost"
_MAMBA = f"{_POOLS}.mamba.MambaPoolHost"
_LOAD, _BACK_UP = "load_to_device_per_layer", "backup_from_device_all_layer"
_ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_HANDLERS = "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry"
_ROPE = "sglang.srt.layers.rotary_embedding.factory.get_rope_wrapper"
_HASH = "sglang.srt.mem_cache.cpp_utils.native_hash._load_native_hash_module"

FORK = Hook("sglang.srt.entrypoints.engine._set_envs_and_config", "forking.fork_children", "AFTER")
"""Hooks that are registered only if the environment enables them."""

HOOKS = (
    FORK,
    Hook(f"{_POOLS}.base.HostKVCache.__init__", "pinning.not_pinned", "BEFORE"),
    Hook(f"{_MAMBA}.__init__", "pinning.not_pinned", "BEFORE"),
    # SGLang's LoRA creates pinned tensors with these.
    Hook("torch.tensor", "pinning.not_pinned", "BEFORE"),
    Hook("torch.zeros", "pinning.not_pinned", "BEFORE"),
    Hook("torch.Tensor.pin_memory", "pinning.unchanged", "REPLACE"),
    Hook(f"{_MHA}.{_LOAD}", "host_pools.mha_load_layer", "REPLACE"),
    Hook(f"{_MHA}.{_BACK_UP}", "host_pools.mha_back_up_layers", "REPLACE"),
    Hook(f"{_MLA}.{_LOAD}", "host_pools.mla_load_layer", "REPLACE"),
    Hook(f"{_MLA}.{_BACK_UP}", "host_pools.mla_back_up_layers", "REPLACE"),
    Hook(f"{_MAMBA}.{_LOAD}", "host_pools.mamba_load_layer", "REPLACE"),
    Hook(f"{_MAMBA}.{_BACK_UP}", "host_pools.mamba_back_up_layers", "REPLACE"),
    Hook(f"{_ATTENTION}._run_sdpa_forward_extend", "attention.extend", "AROUND"),
    Hook(f"{_ATTENTION}._run_sdpa_forward_decode", "attention.decode", "AROUND"),
    Hook(f"{_HANDLERS}.get_handler", "mla.handler", "AFTER"),
    Hook(_ROPE, "mla.rope", "REPLACE"),
    Hook("sglang.srt.disaggregation.utils.get_kv_class", "disaggregation.kv_class", "AFTER"),
    Hook(_HASH, "page_hash.load", "AROUND"),
)


def is_plain_cpu() -> bool:
    """Return whether there is no accelerator, and SGLang's CPU engine is not enabled."""
    import torch

    return not torch.accelerator.is_available() and os.getenv("SGLANG_USE_CPU_ENGINE") != "1"


def activate() -> str | None:
    """Return the platform's class path, or None if this machine does not need it."""
    return PLATFORM if is_plain_cpu() else None


def register_hooks() -> None:
    """Register all hooks, or none.

    Registers none if there is an accelerator. If this SGLang lacks a function that they replace, it
    registers none and logs one line.
    """
    if not is_plain_cpu():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = [hook for hook in HOOKS if hook is not FORK or forking.is_enabled()]
    missing = [hook.target for hook in hooks if not _exists(hook.target)]
    if missing:
        logger.error(
            "plain CPU platform disabled: this SGLang lacks %s; install sglang==0.5.23",
            ", ".join(missing),
        )
        return
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind])
    _adjust_sglang()


def _exists(target: str) -> bool:
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


def _adjust_sglang() -> None:
    """Set what hooks cannot set: constants, and a method that PyTorch lacks on the CPU."""
    import torch
    from sglang.srt.mem_cache.pool_host import base

    from sglang_cpu_platform import device

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = HOST_MEMORY_RESERVE_BYTES
    # This is not a hook, because hooks cannot wrap a cached function.
    torch.get_device_module = partial(device.module, torch.get_device_module)
    if not hasattr(torch.cpu.Stream, "synchronize"):
        # SGLang calls it when a transfer fails. Without it, an AttributeError hides the failure.
        torch.cpu.Stream.synchronize = lambda _stream: None

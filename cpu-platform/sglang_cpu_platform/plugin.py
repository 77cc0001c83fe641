"""The two entry points: the platform and its hooks."""

import logging
import os
import pkgutil
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

PLATFORM = "sglang_cpu_platform.platform.PlainCpuPlatform"

# HiCache leaves this much host memory free. SGLang's 10 GiB are too much for a laptop.
HOST_MEMORY_RESERVE_BYTES = 1 << 30


def is_plain_cpu() -> bool:
    """Return whether there is no accelerator and SGLang's CPU engine is not enabled."""
    import torch

    return not torch.accelerator.is_available() and os.getenv("SGLANG_USE_CPU_ENGINE") != "1"


def activate() -> str | None:
    """Return the platform's class path, or None if this machine does not need it."""
    return PLATFORM if is_plain_cpu() else None


def register_hooks() -> None:
    """Register all hooks or none.

    Registers none if there is an accelerator. Registers none and logs one line if this SGLang lacks
    a function that they replace.
    """
    if not is_plain_cpu():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = _hooks()
    missing = [target for target, _, _ in hooks if not _exists(target)]
    if missing:
        logger.error(
            "plain CPU platform disabled: this SGLang lacks %s; install sglang==0.5.23",
            ", ".join(missing),
        )
        return
    for target, hook, kind in hooks:
        HookRegistry.register(target, hook, kind)
    _adjust_sglang()


def _hooks() -> list[tuple[str, Callable[..., Any], Any]]:
    from sglang.srt.plugins.hook_registry import HookType

    from sglang_cpu_platform import (
        attention,
        disaggregation,
        forking,
        host_pools,
        mla,
        page_hash,
        pinning,
    )

    pools = "sglang.srt.mem_cache.pool_host"
    mha_pool = f"{pools}.mha.MHATokenToKVPoolHost"
    mamba_pool = f"{pools}.mamba.MambaPoolHost"
    mla_pool = f"{pools}.mla.MLATokenToKVPoolHost"
    load, back_up = "load_to_device_per_layer", "backup_from_device_all_layer"
    attention_backend = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    rope = "sglang.srt.layers.rotary_embedding.factory"
    native_hash = "sglang.srt.mem_cache.cpp_utils.native_hash"
    handlers = "sglang.srt.models.deepseek_common.attention_backend_handler"
    transfer = "sglang.srt.disaggregation.utils"
    set_up = "sglang.srt.entrypoints.engine._set_envs_and_config"
    return [
        *([(set_up, forking.fork_children, HookType.AFTER)] if forking.is_enabled() else []),
        (f"{pools}.base.HostKVCache.__init__", pinning.not_pinned, HookType.BEFORE),
        (f"{mamba_pool}.__init__", pinning.not_pinned, HookType.BEFORE),
        *((f"torch.{make}", pinning.not_pinned, HookType.BEFORE) for make in pinning.FACTORIES),
        ("torch.Tensor.pin_memory", pinning.unchanged, HookType.REPLACE),
        (f"{mha_pool}.{load}", host_pools.mha_load_layer, HookType.REPLACE),
        (f"{mha_pool}.{back_up}", host_pools.mha_back_up_layers, HookType.REPLACE),
        (f"{mla_pool}.{load}", host_pools.mla_load_layer, HookType.REPLACE),
        (f"{mla_pool}.{back_up}", host_pools.mla_back_up_layers, HookType.REPLACE),
        (f"{mamba_pool}.{load}", host_pools.mamba_load_layer, HookType.REPLACE),
        (f"{mamba_pool}.{back_up}", host_pools.mamba_back_up_layers, HookType.REPLACE),
        (f"{attention_backend}._run_sdpa_forward_extend", attention.extend, HookType.AROUND),
        (f"{attention_backend}._run_sdpa_forward_decode", attention.decode, HookType.AROUND),
        (f"{handlers}.AttentionBackendRegistry.get_handler", mla.handler, HookType.AFTER),
        (f"{rope}.get_rope_wrapper", mla.rope, HookType.REPLACE),
        (f"{transfer}.get_kv_class", disaggregation.kv_class, HookType.AFTER),
        (f"{native_hash}._load_native_hash_module", page_hash.load, HookType.AROUND),
    ]


def _exists(target: str) -> bool:
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


def _adjust_sglang() -> None:
    """Set what hooks cannot: constants, and a method that PyTorch lacks on the CPU."""
    import torch
    from sglang.srt.mem_cache.pool_host import base

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = HOST_MEMORY_RESERVE_BYTES
    if not hasattr(torch.cpu.Stream, "synchronize"):
        # Called when a transfer fails; without it the AttributeError hides the failure.
        torch.cpu.Stream.synchronize = lambda _stream: None

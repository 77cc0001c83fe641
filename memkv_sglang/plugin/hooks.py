"""The functions of SGLang that the tier wraps, and whether they are wrapped in this process."""

import logging
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class Hook(NamedTuple):
    """A function of SGLang and the function that wraps it."""

    target: str
    name: str
    """Name of the wrapper in this package. It is not the wrapper itself, because some wrappers call
    `missing_hooks`, and importing them here would be a cycle."""
    required: bool = True
    """Whether pages could be wrong without the hook. Without an optional hook, a server loses a
    metric, an event or some cache hits, or a decode server fails requests whose pages have gone."""

    @property
    def wrapper(self) -> Callable[..., Any]:
        """The wrapper, which is called as `wrapper(original, *args, **kwargs)`."""
        wrapper: Callable[..., Any] = pkgutil.resolve_name(f"{__package__}.{self.name}")
        return wrapper


SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
BASE_CONTROLLER = "sglang.srt.managers.cache_controller.HiCacheController"
CONTROLLER = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
DECODE_QUEUE = "sglang.srt.disaggregation.decode_hicache_mixin.DecodeHiCachePreallocMixin"
UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_tensor",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
    "begin_weight_update",
    "end_weight_update",
    "release_memory_occupation",
    "resume_memory_occupation",
)

COMMAND_LINE = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", "server_args.add_cli_args"),
    Hook("sglang.srt.server_args.ServerArgs.from_cli_args", "server_args.from_cli_args"),
)
"""Hooks that are installed even if other targets are missing, so that `--enable-memkv` can say so.
"""

RELEASE = Hook(f"{CONTROLLER}.append_host_mem_release", "storage_hooks.release", required=False)

HOOKS = (
    *COMMAND_LINE,
    Hook(
        "sglang.srt.mem_cache.storage.mmap.mmap_allocator.alloc_shm", "host_memory.allocate_shared"
    ),
    Hook(f"{BASE_CONTROLLER}.attach_storage_backend", "device_pools.attach"),
    Hook(f"{CONTROLLER}.register_host_pool_entry", "device_pools.register"),
    Hook(f"{TREE}.reset", "weights.reset_tree"),
    Hook("sglang.srt.managers.schedule_batch.Req.__init__", "lora.init_request"),
    Hook(
        "sglang.srt.managers.schedule_batch.MultimodalInputs.from_processor_output",
        "media.identify_media",
    ),
    Hook("sglang.srt.lora.lora_manager.LoRAManager._load_lora_adapter", "lora.load_adapter"),
    *(Hook(f"{UPDATER}.{name}", f"weights.{name}") for name in UPDATES),
    Hook(f"{CONTROLLER}._storage_hit_query", "storage_hooks.look_up", required=False),
    Hook(f"{CONTROLLER}._page_transfer", "storage_hooks.load", required=False),
    Hook(f"{CONTROLLER}._page_backup", "storage_hooks.back_up", required=False),
    Hook(f"{CONTROLLER}.should_backup", "storage_hooks.should_back_up", required=False),
    Hook(f"{CONTROLLER}.prefetch_rate_limited", "sizing.rate_limited", required=False),
    Hook(f"{TREE}.take_events", "storage_hooks.take_events", required=False),
    Hook(f"{SCHEDULER}.process_batch_result", "storage_hooks.process_result", required=False),
    Hook(
        f"{DECODE_QUEUE}._build_decode_prefix_match",
        "storage_hooks.match_on_decode",
        required=False,
    ),
    RELEASE,
)


def required_hooks() -> list[Hook]:
    """Return the hooks that correctness depends on."""
    return [hook for hook in HOOKS if hook.required]


def optional_hooks() -> list[Hook]:
    """Return the hooks that the tier works without."""
    return [hook for hook in HOOKS if not hook.required]


def register_hooks() -> None:
    """Register the required hooks with SGLang, which applies them after loading all plugins.

    If this SGLang lacks one of the targets, registers only the hooks of the command line.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in COMMAND_LINE if absent_targets() else required_hooks():
        if _exists(hook.target) and not is_patched_in(hook.target):
            HookRegistry.register(hook.target, hook.wrapper, HookType.AROUND)


def install_optional_hooks() -> None:
    """Install the optional hooks in this process. Idempotent. Never raises.

    Runs when the storage is created, so that a server with the plugin, a patched SGLang and a
    storage attached at run time all get the same hooks.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in optional_hooks():
        if hook.target not in HookRegistry._patched:
            HookRegistry.register(hook.target, hook.wrapper, HookType.AROUND)
    HookRegistry.apply_hooks()
    missing = [hook.target for hook in optional_hooks() if not is_installed(hook)]
    if missing:
        log.warning(
            "memkv: optional hooks not installed, another plugin or another SGLang version "
            "prevents it: %s",
            ", ".join(missing),
        )


def can_withhold() -> bool:
    """Return whether the release of host pages can be delayed."""
    return is_installed(RELEASE)


def absent_targets() -> list[str]:
    """Return the required targets that this SGLang does not have."""
    return [hook.target for hook in required_hooks() if not _exists(hook.target)]


def _exists(target: str) -> bool:
    try:
        pkgutil.resolve_name(target)
    except Exception:  # importing a module of another version may raise any exception
        return False
    return True


def is_patched_in(target: str) -> bool:
    """Return whether this SGLang is patched and calls the wrapper of this target itself."""
    return _exists(target) and getattr(pkgutil.resolve_name(target), "memkv_target", "") == target


def is_installed(hook: Hook) -> bool:
    """Return whether SGLang's hook registry has applied this hook in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    applied = (
        HookRegistry._hooks.get(hook.target, []) if hook.target in HookRegistry._patched else ()
    )
    return any(function is hook.wrapper for _, function, _ in applied)


def missing_hooks() -> list[str]:
    """Return the required targets that are not wrapped. SGLang only logs a failure to wrap."""
    return [
        hook.target
        for hook in required_hooks()
        if not (is_installed(hook) or is_patched_in(hook.target))
    ]

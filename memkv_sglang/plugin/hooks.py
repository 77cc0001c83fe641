"""Where the tier reaches into SGLang: each place by name, and whether it is in place."""

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple


class Hook(NamedTuple):
    """A function of SGLang and what is put around it."""

    target: str
    name: str
    """Of what is put around it, in this package. A name, because some of these functions ask here
    whether all are in place."""

    @property
    def around(self) -> Callable[..., Any]:
        """Called as `around(original, *args, **kwargs)`."""
        around: Callable[..., Any] = pkgutil.resolve_name(f"{__package__}.{self.name}")
        return around


CACHE = "sglang.srt.mem_cache"
UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_tensor",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
    "begin_weight_update",
    "end_weight_update",
)

COMMAND_LINE = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", "server_args.add_cli_args"),
    Hook("sglang.srt.server_args.ServerArgs.from_cli_args", "server_args.from_cli_args"),
)
"""In place also where others cannot be, to say so when the flag is given."""

HOOKS = (
    *COMMAND_LINE,
    Hook(
        "sglang.srt.mem_cache.storage.mmap.mmap_allocator.alloc_shm", "host_memory.allocate_shared"
    ),
    Hook("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.reset", "weights.reset_tree"),
    Hook("sglang.srt.managers.schedule_batch.Req.__init__", "lora.init_request"),
    Hook("sglang.srt.lora.lora_manager.LoRAManager._load_lora_adapter", "lora.load_adapter"),
    *(Hook(f"{UPDATER}.{name}", f"weights.{name}") for name in UPDATES),
)
"""Correctness needs every one of them."""


def register_hooks() -> None:
    """Put all hooks into SGLang's registry; it applies them when every plugin has registered.

    If one target is not there (another SGLang), only the command line is hooked.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in COMMAND_LINE if absent_targets() else HOOKS:
        if _exists(hook.target) and not is_called(hook.target):
            HookRegistry.register(hook.target, hook.around, HookType.AROUND)


def absent_targets() -> list[str]:
    """Return the targets that this SGLang does not have."""
    return [hook.target for hook in HOOKS if not _exists(hook.target)]


def _exists(target: str) -> bool:
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


def is_called(target: str) -> bool:
    """Tell whether SGLang itself calls what stands around the target: it is patched to."""
    return _exists(target) and getattr(pkgutil.resolve_name(target), "memkv_target", "") == target


def missing_hooks() -> list[str]:
    """Return the targets that are not hooked in this process; SGLang swallows such errors."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    arounds = {hook.around for hook in HOOKS}
    hooked = {
        target
        for target, registered in HookRegistry._hooks.items()
        if target in HookRegistry._patched
        for _, function, _ in registered
        if function in arounds
    }
    return [h.target for h in HOOKS if not (h.target in hooked or is_called(h.target))]

"""The entry points of a patched SGLang, whose `memkv_hook` looks up the wrappers here."""

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.plugin.flags import SETTINGS, take_settings
from memkv_sglang.plugin.hooks import missing_hooks, required_hooks
from memkv_sglang.plugin.launch import BACKEND, prepare, uses_memkv
from memkv_sglang.plugin.page_size import register_page_size

log = logging.getLogger(__name__)

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"


def counterparts() -> dict[str, Callable[..., Any]]:
    """Return the wrapper of each patched function, by the function's full name.

    Called as `wrapper(original, *args, **kwargs)`.
    """
    return {
        **{hook.target: hook.wrapper for hook in required_hooks()},
        f"{SERVER_ARGS}.from_cli_args": from_cli_args,
        f"{SERVER_ARGS}.resolve_once": resolve_once,
    }


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Wrap `ServerArgs.from_cli_args`. Invalid settings end the process with status 2.

    All settings that came from flags are kept in one field of the arguments.
    """
    setattr(args, SETTINGS, take_settings(vars(args)) or None)
    server_args = original(cls, args)
    try:
        _enable(server_args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return server_args


def resolve_once(original: Callable[..., Any], server_args: Any) -> None:
    """Wrap `ServerArgs.resolve_once`, which every server calls. Raises `ConfigError`."""
    _enable(server_args)
    original(server_args)


def _enable(server_args: Any) -> None:
    """Set the arguments that the tier needs, if the server uses it, before they are resolved."""
    from sglang.srt.arg_groups.arg_utils import record_fields

    selected = server_args.hicache_storage_backend == BACKEND
    if not (server_args.enable_memkv or selected) or uses_memkv(server_args):
        return
    given = {f.name: getattr(server_args, f.name) for f in record_fields(type(server_args))}
    if selected:
        given["hicache_storage_backend"] = None
    if missing := missing_hooks():
        log.error(
            "memkv: off, the server starts without the tier: the patch lacks %s; "
            "run `memkv patch revert`, then `memkv patch apply`",
            ", ".join(missing),
        )
        server_args.enable_memkv = False
        server_args.hicache_storage_backend = given["hicache_storage_backend"]
        return
    values = {name: value for name, value in given.items() if name != "dcp_size"}
    prepare(values)
    values["hicache_storage_backend"] = BACKEND
    for name, value in values.items():
        if value != given[name]:
            setattr(server_args, name, value)
    _choose_page_size()


@functools.cache
def _choose_page_size() -> None:
    register_page_size()

"""What a patched SGLang calls: see `patches/sglang-*/`, whose `memkv_hook` looks here."""

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.plugin.hooks import HOOKS, missing_hooks
from memkv_sglang.plugin.launch import BACKEND, prepare
from memkv_sglang.plugin.page_size import is_ours, register_page_size

log = logging.getLogger(__name__)

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"


def counterparts() -> dict[str, Callable[..., Any]]:
    """Return what stands around SGLang's functions, by the functions' names.

    Called as `around(original, *args, **kwargs)`.
    """
    return {
        **{hook.target: hook.around for hook in HOOKS},
        f"{SERVER_ARGS}.from_cli_args": from_cli_args,
        f"{SERVER_ARGS}.resolve_once": resolve_once,
    }


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Stand around `ServerArgs.from_cli_args`; ends the process for settings that cannot work."""
    server_args = original(cls, args)
    try:
        _enable(server_args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return server_args


def resolve_once(original: Callable[..., Any], server_args: Any) -> None:
    """Stand around `ServerArgs.resolve_once`, which every server calls. Raises `ConfigError`."""
    _enable(server_args)
    original(server_args)


def _enable(server_args: Any) -> None:
    """Set what the tier needs, if it is asked for: once, before the arguments are resolved."""
    from sglang.srt.arg_groups.arg_utils import record_fields

    named = server_args.hicache_storage_backend == BACKEND
    if not (server_args.enable_memkv or named) or is_ours(server_args):
        return
    given = {f.name: getattr(server_args, f.name) for f in record_fields(type(server_args))}
    if named:
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

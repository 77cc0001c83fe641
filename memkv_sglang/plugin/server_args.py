"""The tier's flags on SGLang's command lines and as arguments of `sglang.Engine`."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.plugin.compatibility import obstacle
from memkv_sglang.plugin.flags import add_flags, is_enabled, take_flags
from memkv_sglang.plugin.launch import prepare

log = logging.getLogger(__name__)


def add_cli_args(original: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """Wrap `ServerArgs.add_cli_args`: add the tier's flags."""
    original(parser)
    add_flags(parser)


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Wrap `ServerArgs.from_cli_args`. Invalid settings end the process with status 2."""
    values = vars(args)
    if is_enabled(values):
        try:
            _enable(values)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    return original(cls, args)


def make_engine_args(**values: Any) -> Any:
    """Replace `Engine.server_args_class`. Raises `ConfigError`."""
    from sglang.srt.server_args import ServerArgs

    if is_enabled(values):
        _enable(values)
    take_flags(values)
    return ServerArgs(**values)


def _enable(values: dict[str, Any]) -> None:
    if reason := obstacle():
        log.error("memkv: off, the server starts without the tier: %s", reason)
        return
    prepare(values)

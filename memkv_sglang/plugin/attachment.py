"""Checks and waits when the storage is created, at a server's start or attached at run time."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memkv_sglang.client.client import AgentClient
from memkv_sglang.client.reconnector import CONNECTING
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import Config
from memkv_sglang.plugin.compatibility import differences
from memkv_sglang.plugin.hooks import missing_hooks
from memkv_sglang.plugin.launch import uses_memkv

log = logging.getLogger(__name__)

AGENT_SECONDS = 30.0
"""How long to wait for an agent; without one the server starts and every lookup misses."""

POLL_SECONDS = 0.1


class UnsuitableServerError(Exception):
    """The storage cannot work in this server. The text says why and what to do."""


def read_config(extra: Mapping[str, Any]) -> Config:
    """Return the agent's settings from the backend's extra configuration and the environment.

    The optional entry `memkv` may have a `file` and `settings` by key. A storage attached at run
    time has no such entry and is configured by variables. Raises `ConfigError`.
    """
    entry = extra.get("memkv") or {}
    file = entry.get("file")
    return load_config(Path(file) if file else None, os.environ, entry.get("settings") or {})


def check_version(storage_config: Any) -> None:
    """Raise `UnsuitableServerError` if SGLang is not what the hooks were written for."""
    found = next(differences(storage_config), None)
    if found is not None:
        raise UnsuitableServerError(f"this SGLang differs from 0.5.23: {found}")


def check_server(extra: Mapping[str, Any], server_args: Any) -> None:
    """Raise `UnsuitableServerError` if the storage would serve wrong pages or none."""
    missing = missing_hooks()
    if missing:
        raise UnsuitableServerError(f"this SGLang lacks {', '.join(missing)}")
    if extra.get("class_name") and not extra.get("interface_v1"):
        raise UnsuitableServerError('the extra config lacks "interface_v1": 1')
    if getattr(server_args, "enable_lora", False) and not uses_memkv(server_args):
        raise UnsuitableServerError(
            "LoRA adapters were loaded before the storage was attached, so their content is not "
            "known; start the server with --enable-memkv"
        )


def wait_for_agent(client: AgentClient) -> None:
    """Wait until the client is connected or its first attempt has failed.

    The client keeps retrying in the background.
    """
    deadline = time.monotonic() + AGENT_SECONDS
    while not client.wait(POLL_SECONDS):
        if client.problem not in ("", CONNECTING):  # the client has logged it
            return
        if time.monotonic() > deadline:
            log.warning("memkv: no agent after %.0f s; still retrying", AGENT_SECONDS)
            return

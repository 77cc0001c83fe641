"""What must hold where the storage is made, at a server's start or by SGLang's endpoint later."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import Config
from memkv_sglang.plugin.hooks import missing_hooks
from memkv_sglang.plugin.launch import uses_memkv

log = logging.getLogger(__name__)

AGENT_SECONDS = 30.0
"""How long to wait for an agent at most; a server without one goes on all the same."""

GLANCE_SECONDS = 0.1


class UnsuitableServerError(Exception):
    """A server that the storage cannot serve. The text says why and what to do."""


def read_config(extra: Mapping[str, Any]) -> Config:
    """Return the agent's settings from the backend's extra configuration and the environment.

    The entry `memkv` may name a `file` and hold `settings` by key; without it, as where the
    storage is attached at run time, the environment is enough. Raises `ConfigError`.
    """
    entry = extra.get("memkv") or {}
    file = entry.get("file")
    return load_config(Path(file) if file else None, os.environ, entry.get("settings") or {})


def check_server(extra: Mapping[str, Any], server_args: Any) -> None:
    """Raise `UnsuitableServerError` where the storage would be wrong, or of no use."""
    missing = missing_hooks()
    if missing:
        raise UnsuitableServerError(f"this SGLang lacks {', '.join(missing)}")
    if extra.get("class_name") and not extra.get("interface_v1"):
        raise UnsuitableServerError('the extra config lacks "interface_v1": 1')
    if getattr(server_args, "enable_lora", False) and not uses_memkv(server_args):
        raise UnsuitableServerError(
            "adapters were loaded before the storage was attached, so that their content has no "
            "name; start the server with --enable-memkv"
        )


def load_page_hash() -> None:
    """Have SGLang's page hashes compiled, which may take many seconds, before a request needs them.

    SGLang would compile them in the thread of its lookups, at the first one: a flush or a detach
    waits 10 s for that thread, and the server ends if it is not enough.
    """
    from sglang.srt.mem_cache.cpp_utils import native_hash

    try:
        native_hash._load_native_hash_module()
    except Exception as error:
        log.warning("memkv: SGLang cannot compile its page hashes: %s", error.__cause__ or error)


def wait_for_agent(client: AgentClient) -> None:
    """Wait until there is an agent, or the first attempt to find or start one has failed.

    Further attempts are made behind.
    """
    deadline, beginning = time.monotonic() + AGENT_SECONDS, client.problem
    while not client.wait(GLANCE_SECONDS):
        if client.problem not in ("", beginning):  # the client has logged it
            return
        if time.monotonic() > deadline:
            log.warning("memkv: no agent after %.0f s; trying on", AGENT_SECONDS)
            return

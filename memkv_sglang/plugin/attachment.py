"""Checks and waits for when the storage is created, at a server's start or later."""

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
from memkv_sglang.plugin import media, versions
from memkv_sglang.plugin.compatibility import differences, obstacle
from memkv_sglang.plugin.launch import uses_memkv

log = logging.getLogger(__name__)

AGENT_SECONDS = 30.0
"""Seconds to wait for an agent. Without one, the server starts, and every lookup misses."""

POLL_SECONDS = 0.1


class UnsuitableServerError(Exception):
    """The storage cannot work in this server. The message says why and what to do."""


def read_config(extra: Mapping[str, Any]) -> Config:
    """Return the agent's settings from the backend's extra configuration and the environment.

    The configuration may have an entry `memkv` with a `file` and with `settings` by key. A storage
    that is attached at run time has no such entry, and is configured by variables. Raises
    `ConfigError`.
    """
    entry = extra.get("memkv") or {}
    file = entry.get("file")
    return load_config(Path(file) if file else None, os.environ, entry.get("settings") or {})


def check_version(storage_config: Any) -> None:
    """Raise `UnsuitableServerError` if the hooks do not fit this SGLang.

    Logs a warning if they fit, but the version has not passed the end-to-end tests.
    """
    found = next(differences(storage_config), None)
    if found is not None:
        raise UnsuitableServerError(versions.refusal(found))
    if versions.installed() not in versions.RUN_END_TO_END:
        log.warning(
            "memkv: SGLang %s has what the tier needs, but has not been tested end to end; "
            "tested: %s",
            versions.installed(),
            ", ".join(versions.RUN_END_TO_END),
        )


def check_server(extra: Mapping[str, Any], server_args: Any) -> None:
    """Raise `UnsuitableServerError` if the storage would serve wrong pages or none."""
    if reason := obstacle():
        raise UnsuitableServerError(reason)
    if extra.get("class_name") and not extra.get("interface_v1"):
        raise UnsuitableServerError('the extra config lacks "interface_v1": 1')
    if getattr(server_args, "enable_lora", False) and not uses_memkv(server_args):
        raise UnsuitableServerError(
            "LoRA adapters were loaded before the storage was attached, so their content is not "
            "known; start the server with --enable-memkv"
        )
    if takes_media(server_args) and not media.can_identify():
        raise UnsuitableServerError(
            f"SGLang {versions.installed()} identifies images, audio and video by 30 bits, so two "
            f"of them could share pages; install sglang=={versions.NEWEST}"
        )
    if int(getattr(server_args, "dcp_size", 1) or 1) > 1 and not names_dcp_ranks():
        raise UnsuitableServerError(
            f"SGLang {versions.installed()} does not tell storages about DCP ranks, whose pages "
            f"differ; drop --dcp-size, or install sglang=={versions.NEWEST}"
        )


def takes_media(server_args: Any) -> bool:
    """Return whether requests to this server's model may contain images, audio or video."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model = model_config_of(server_args)
    return bool(model.is_multimodal or model.is_audio_model)


def names_dcp_ranks() -> bool:
    """Return whether SGLang's storage configuration has the rank in a DCP group, as from 0.5.23."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    return "dcp_rank" in HiCacheStorageConfig.__dataclass_fields__


def wait_for_agent(client: AgentClient) -> None:
    """Wait until the client is connected or its first attempt has failed.

    The client keeps retrying in the background.
    """
    deadline = time.monotonic() + AGENT_SECONDS
    while not client.wait(POLL_SECONDS):
        if client.problem not in ("", CONNECTING):  # the client has already logged it
            return
        if time.monotonic() > deadline:
            log.warning("memkv: no agent after %.0f s; still retrying", AGENT_SECONDS)
            return

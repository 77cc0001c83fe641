"""Turn `--enable-memkv` into HiCache arguments, and refuse arguments that conflict with it."""

import json
import logging
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load_config
from memkv_sglang.plugin import disaggregation
from memkv_sglang.plugin.flags import take_flags

log = logging.getLogger(__name__)

BACKEND = "memkv"
"""Name of the backend in SGLang's logs and endpoints."""

WHOLE_PAGE_LAYOUTS = ("page_first", "page_first_direct", "page_head")
"""Layouts that store a page in one or two pieces. `layer_first` needs two pieces per layer."""

PREFETCH_TIMEOUT = {"prefetch_timeout_base": 2.0, "prefetch_timeout_per_ki_token": 0.1}
"""Seconds after which SGLang stops waiting for a load and uses the pages that have arrived. A
healthy tier needs far less, and a slow tier must not hold up the answer."""


class Conflict(NamedTuple):
    """A server argument with which the tier cannot work."""

    name: str
    works: tuple[Any, ...]
    """Values with which it can."""
    fix: str


CONFLICTS = (
    Conflict("disable_radix_cache", (False, None), "drop --disable-radix-cache"),
    Conflict("enable_lmcache", (False, None), "drop --enable-lmcache"),
    Conflict("enable_flexkv", (False, None), "drop --enable-flexkv"),
    Conflict("radix_cache_backend", (None,), "drop --radix-cache-backend"),
    Conflict(
        "enable_unified_cache_external_linker",
        (False, None),
        "drop --enable-unified-cache-external-linker",
    ),
    Conflict(
        "hicache_storage_backend",
        (None, "dynamic"),
        "drop --hicache-storage-backend; --enable-memkv sets it",
    ),
    Conflict(
        "hicache_mem_layout",
        WHOLE_PAGE_LAYOUTS,
        f"use --hicache-mem-layout {WHOLE_PAGE_LAYOUTS[0]}",
    ),
    Conflict(
        "dcp_size", (1, None), "drop --dcp-size; SGLang supports it for built-in backends only"
    ),
)


def prepare(values: MutableMapping[str, Any]) -> None:
    """Change a server's arguments in place so that it runs with the tier.

    `values` are the arguments by name. Removes the tier's own. Logs one line with what it set.
    Raises `ConfigError` for settings that cannot work, before it changes any of SGLang's arguments.
    """
    file, settings = take_flags(values)
    load_config(Path(file) if file else None, os.environ, settings)
    _refuse_conflicts(values)
    extra = _extra_config(values, file, settings)
    wanted = {
        **disaggregation.cache_arguments(values),
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps(extra),
    }
    changed = {name: value for name, value in wanted.items() if values.get(name) != value}
    values.update(changed)
    log.info(
        "memkv: set %s; write policy %s, prefetch policy %s",
        ", ".join(sorted(changed)),
        values.get("hicache_write_policy", "write_through"),
        values.get("hicache_storage_prefetch_policy", "timeout"),
    )


def uses_memkv(server_args: Any) -> bool:
    """Return whether a server's arguments name this backend, in any form."""
    extra = server_args.hicache_storage_backend_extra_config
    try:
        return bool(extra) and json.loads(extra).get("backend_name") == BACKEND
    except (ValueError, AttributeError):
        return False


def _refuse_conflicts(values: Mapping[str, Any]) -> None:
    disaggregation.refuse_conflicts(values)
    for conflict in CONFLICTS:
        if conflict.name == "disable_radix_cache" and disaggregation.is_decode(values):
            continue  # SGLang only looks at --disaggregation-decode-enable-radix-cache
        if conflict.name in values and values[conflict.name] not in conflict.works:
            flag = "--" + conflict.name.replace("_", "-")
            raise ConfigError(f"{flag}: does not work with --enable-memkv; {conflict.fix}")


def _extra_config(
    values: Mapping[str, Any], file: str | None, settings: Mapping[str, str]
) -> dict[str, Any]:
    """Return the backend's extra configuration, with the user's own. It contains no secrets."""
    given = values.get("hicache_storage_backend_extra_config")
    if given and str(given).startswith("@"):
        raise ConfigError(
            "--hicache-storage-backend-extra-config: SGLang ignores the shared-memory allocator "
            "in a file; give inline JSON"
        )
    try:
        user = json.loads(given) if given else {}
    except ValueError as error:
        raise ConfigError(f"--hicache-storage-backend-extra-config: not JSON: {error}") from None
    if not isinstance(user, dict):
        raise ConfigError("--hicache-storage-backend-extra-config: not a JSON object; give one")
    return {
        **PREFETCH_TIMEOUT,
        **user,
        "backend_name": BACKEND,
        "module_path": "memkv_sglang.plugin.storage",
        "class_name": "MemKVStorage",
        "interface_v1": 1,
        "allocator": "shm",
        "hicache_storage_pass_prefix_keys": True,
        "memkv": {"file": str(Path(file).resolve()) if file else None, "settings": dict(settings)},
    }

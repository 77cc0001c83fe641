"""The arguments of decode servers in prefill/decode disaggregation (PD).

A decode server without a radix cache, SGLang's default, cannot run HiCache. It gets SGLang's decode
offload instead, which stores what the server generates. With
`--disaggregation-decode-enable-radix-cache` it runs HiCache and stores prompts too.
"""

from collections.abc import Mapping
from typing import Any

from memkv_sglang.config.errors import ConfigError

MODE = "disaggregation_mode"
RADIX_CACHE = "disaggregation_decode_enable_radix_cache"
OFFLOAD = "disaggregation_decode_enable_offload_kvcache"
RETRACTION = "disaggregation_decode_retraction_backup"
HOST_RECEIVE = "disaggregation_decode_host_receive_threshold"
RADIX_FLAG = "--disaggregation-decode-enable-radix-cache"
ROLE_SWITCH = "enable_pd_role_switch"


def is_decode(values: Mapping[str, Any]) -> bool:
    """Return whether these are the arguments of a decode server."""
    return values.get(MODE) == "decode"


def only_offloads(values: Mapping[str, Any]) -> bool:
    """Return whether this decode server keeps no radix cache and only stores what it generates."""
    return is_decode(values) and not values.get(RADIX_CACHE)


def cache_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that make a server of this role use a storage backend."""
    return {OFFLOAD: True} if only_offloads(values) else {"enable_hierarchical_cache": True}


def refuse_conflicts(values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for arguments of a PD server that the tier cannot work with."""
    if values.get(ROLE_SWITCH) and not values.get(RADIX_CACHE):
        # In the decode role, SGLang would not finish any backup, and could never switch back.
        raise ConfigError(
            "--enable-pd-role-switch: in the decode role, a server without a radix cache cannot "
            f"run HiCache; add {RADIX_FLAG}"
        )
    if not is_decode(values):
        return
    threshold = values.get(HOST_RECEIVE)
    if threshold is not None and threshold < 1:
        raise ConfigError(
            "--disaggregation-decode-host-receive-threshold: its host pool has no whole pages, so "
            "it does not work with --enable-memkv; drop one of them"
        )
    if not only_offloads(values):
        if values.get(OFFLOAD):
            raise ConfigError(
                "--disaggregation-decode-enable-offload-kvcache: a decode server with a radix "
                f"cache stores through HiCache; drop this flag or {RADIX_FLAG}"
            )
        return
    if values.get("enable_hierarchical_cache"):
        raise ConfigError(
            "--enable-hierarchical-cache: a decode server without a radix cache cannot run "
            f"HiCache; add {RADIX_FLAG}"
        )
    if values.get("enable_unified_memory"):
        raise ConfigError(
            "--enable-unified-memory: SGLang's decode offload supports it with its file "
            f"storage only; add {RADIX_FLAG}, or drop one of the flags"
        )
    if values.get(RETRACTION) == "host_pool":
        raise ConfigError(
            "--disaggregation-decode-retraction-backup host_pool: the tier has a host pool on this "
            "decode server already; drop this flag"
        )

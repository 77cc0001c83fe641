"""Check whether the hooks fit the installed SGLang."""

import dataclasses
import dis
import inspect
import pkgutil
from array import array
from collections.abc import Iterator
from typing import Any

from memkv_sglang.page_hash import chain_seed, page_hashes
from memkv_sglang.plugin.hooks import absent_targets, missing_hooks
from memkv_sglang.plugin.namespaces import STORAGE_CONFIG
from memkv_sglang.plugin.versions import refusal

CACHE = "sglang.srt.mem_cache"
CONTROLLER = f"{CACHE}.hybrid_cache.hybrid_cache_controller.HybridCacheController"
BATCH = "sglang.srt.managers.schedule_batch"
UPDATER = "sglang.srt.managers.scheduler_components.weight_updater"

ATTRIBUTES = {
    f"{CACHE}.pool_host.base.HostKVCache": "page_size size_per_token allocator dtype layout "
    "start_layer end_layer get_dummy_flat_data_page size device_capacity_tokens "
    "storage_format_tag",
    f"{CACHE}.pool_host.mha.MHATokenToKVPoolHost": "get_page_buffer_meta head_num head_dim",
    f"{CACHE}.pool_host.mla.MLATokenToKVPoolHost": "get_page_buffer_meta kv_cache_dim",
    f"{CACHE}.pool_host.group.PoolEntry": "name host_pool device_pool",
    f"{CACHE}.pool_host.group.HostPoolGroup": "entries",
    f"{CACHE}.memory_pool.KVCache": "dtype store_dtype",
    f"{CACHE}.hicache_storage.PoolTransfer": "name host_indices keys hit_policy",
    f"{CACHE}.hicache_storage.PoolTransferResult": "kv_hit_pages extra_pool_hit_pages "
    "restorable_prefix_pages",
    f"{CACHE}.hicache_storage.HiCacheStorageExtraInfo": "prefix_keys",
    f"{CACHE}.unified_radix_cache.UnifiedRadixCache": "ongoing_backup ongoing_write_through "
    "ongoing_load_back check_hicache_events",
    f"{UPDATER}.SchedulerWeightUpdaterManager": "_session tp_cpu_group scheduler flush_cache "
    "offload_tags memory_saver_adapter",
    f"{BATCH}.Req": "lora_id extra_key",
    f"{BATCH}.MultimodalDataItem": "hash modality format feature precomputed_embeddings "
    "model_specific_data",
    f"{BATCH}.MultimodalInputs": "mm_items padded_input_ids",
    "sglang.srt.lora.lora_registry.LoRARef": "lora_id lora_path",
}
"""Attributes that the hooks and the storage use, by class of SGLang. Before 0.5.22, pools had no
`storage_format_tag`, so pages of different formats had the same name."""

STORAGE_FIELDS = (
    "tp_rank tp_size pp_rank pp_size attn_cp_rank attn_cp_size is_mla_model "
    "enable_storage_metrics extra_config"
)
"""Fields of `HiCacheStorageConfig` that the storage needs."""

SIGNATURES = {
    f"{CACHE}.storage.mmap.mmap_allocator.alloc_shm": "dims dtype",
    f"{CONTROLLER}.register_host_pool_entry": "self entry",
    f"{CACHE}.unified_radix_cache.UnifiedRadixCache.reset": "self",
    f"{CACHE}.utils.get_storage_hash_str": "key prior_hash page_size",
    "sglang.srt.lora.lora_manager.LoRAManager._load_lora_adapter": "self lora_ref",
    **{
        f"{UPDATER}.SchedulerWeightUpdaterManager.{name}": "self recv_req"
        for name in (
            "update_weights_from_disk",
            "update_weights_from_tensor",
            "update_weights_from_distributed",
            "update_weights_from_ipc",
            "begin_weight_update",
            "end_weight_update",
            "release_memory_occupation",
            "resume_memory_occupation",
        )
    },
    # Before 0.5.22, an update whose flush was refused raised an exception instead of reporting it.
    f"{UPDATER}.SchedulerWeightUpdaterManager.flush_cache_after_weight_update": "self recv_req "
    "success message",
}
"""Parameters of those functions of SGLang that are wrapped or called."""

PAGE = 4


def obstacle() -> str:
    """Return why the tier cannot run in this SGLang, in one line; "" if it can.

    Needs no server. `differences` also checks what only the storage of a server can.
    """
    absent = absent_targets()
    found = f"no {', '.join(absent)}" if absent else next(code_differences(), "")
    if found:
        return refusal(found)
    missing = missing_hooks()
    return f"another plugin prevents the hooks on {', '.join(missing)}" if missing else ""


def differences(config: Any) -> Iterator[str]:
    """Yield how SGLang differs from the supported versions. The most informative one is the first.

    `config` is SGLang's `HiCacheStorageConfig`. Compiles SGLang's page hashes if necessary.
    """
    yield from code_differences()
    yield from storage_fields(config)
    yield from page_hash_differences()


def code_differences() -> Iterator[str]:
    """Yield the attributes and parameters that differ."""
    for name, attributes in ATTRIBUTES.items():
        yield from _missing(name, attributes.split())
    for target, parameters in SIGNATURES.items():
        yield from _changed(target, parameters.split())


def _missing(name: str, attributes: list[str]) -> Iterator[str]:
    try:
        cls = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        yield f"no {name}"
        return
    known = _attributes(cls)
    for attribute in attributes:
        if attribute not in known:
            yield f"{cls.__name__} has no {attribute}"


def _attributes(cls: type) -> set[str]:
    """Return the attributes of a class's instances: fields, methods, and what methods set."""
    known = set(dir(cls))
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", ()))
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            steps = dis.get_instructions(code) if code is not None else ()
            known |= {str(step.argval) for step in steps if step.opname == "STORE_ATTR"}
    return known


def _changed(target: str, wanted: list[str]) -> Iterator[str]:
    try:
        parameters = inspect.signature(pkgutil.resolve_name(target)).parameters
    except (ImportError, AttributeError, ValueError) as error:
        yield f"no {target}: {error}"
        return
    found = list(parameters)
    others = [parameters[name] for name in found[len(wanted) :]]
    if found[: len(wanted)] != wanted or any(p.default is p.empty for p in others):
        yield f"{target.rpartition('.')[2]} takes ({', '.join(found)}), not ({', '.join(wanted)})"


def storage_fields(config: Any) -> Iterator[str]:
    """Yield differences between SGLang's storage configuration and the supported one.

    An unknown field may change pages, unless it has its default value.
    """
    for name in STORAGE_FIELDS.split():
        if not hasattr(config, name):
            yield f"HiCacheStorageConfig has no {name}"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in STORAGE_CONFIG and value != field.default:
            yield f"HiCacheStorageConfig has an unknown field {field.name}={value!r}"


PROMPTS = (
    (range(4 * PAGE), None, None),
    (range(4 * PAGE), "adapter", "salt"),
    ((7, 1 << 40, *range(2 * PAGE)), None, None),
)
"""Token ids, extra key and salt of the test prompts. One id needs more than 32 bits. Before 0.5.23,
SGLang hashed no such ids: they stand for media, for which it had ids of 30 bits."""


def page_hash_differences() -> Iterator[str]:
    """Yield a difference if SGLang computes other page hashes than this project."""
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    for tokens, extra_key, salt in PROMPTS:
        hashes = page_hashes(list(tokens), PAGE, chain_seed(extra_key, salt))
        ours = [digest.hex() for digest in hashes]
        key = RadixKey(array("q", tokens), extra_key=extra_key, cache_salt=salt)
        try:
            theirs = get_storage_hash_str(key, page_size=PAGE)
        except IndexError:
            if max(tokens) >= 1 << 32:
                continue
            raise
        if list(theirs)[: len(ours)] != ours:
            yield "its page hashes differ from this project's"
            return

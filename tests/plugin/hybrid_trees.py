"""SGLang's radix tree, cache controller and pools for a hybrid model, without a model.

Built with the fixtures of SGLang's own tests (`sglang.test.kits.unified_radix_cache`), which leave
out what runs the model. The tree is SGLang's in Python: the one in Rust cannot be inspected without
compiling it.
"""

import itertools
import json
import unittest
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle, InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.kits.unified_radix_cache.config import CacheConfig
from sglang.test.kits.unified_radix_cache.fixtures import (
    build_fixture,
    drop_hicache_atexit_pin,
    match_prefix,
    node_children,
    node_device_value,
)
from sglang.test.kits.unified_radix_cache.storage import UnifiedRadixCacheStorageFixtures

LIMIT = 60.0
"""Seconds after which a test gives up waiting."""

THRESHOLD = 1
"""SGLang asks the storage for prompts of at least this many tokens."""


class Tree(UnifiedRadixCacheStorageFixtures, unittest.TestCase):  # type: ignore[misc]
    """A tree with a storage; its requests are sequences of tokens and states of known content."""

    def __init__(self, config: CacheConfig) -> None:
        super().__init__()
        self.cfg = config
        self.cache, self._allocator, self._requests = build_fixture(
            config, tree_core_backend="python"
        )
        self._asked = 0

    def runTest(self) -> None:  # noqa: N802 (unittest's name)
        raise AssertionError

    def attach(self, settings: dict[str, str]) -> None:
        """Start HiCache with a storage. `doCleanups` stops it."""
        parallel = get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
        parallel.__enter__()
        self.addCleanup(parallel.__exit__, None, None, None)
        extra = {
            "backend_name": "memkv",
            "module_path": "memkv_sglang.plugin.storage",
            "class_name": "MemKVStorage",
            "interface_v1": 1,
            "allocator": "shm",
            "hicache_storage_pass_prefix_keys": True,
            "prefetch_threshold": THRESHOLD,
            "memkv": {"settings": settings},
        }
        server_args = ServerArgs(
            model_path="dummy",
            page_size=self.cfg.page_size,
            hicache_io_backend="kernel",
            hicache_mem_layout="page_first",
            hicache_write_policy="write_through",
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=json.dumps(extra),
            hicache_storage_prefetch_policy="wait_complete",
        )
        server_args._mamba_cache_chunk_size = max(64, self.cfg.page_size)
        set_global_server_args_for_scheduler(server_args)
        self.cache.init_hicache(server_args, self.cache.cache_init_params)
        self.addCleanup(drop_hicache_atexit_pin, self.cache)
        self.addCleanup(self.cache.release_host_resources)
        controller = self.cache.cache_controller
        self.addCleanup(controller.storage_backend.close)
        self.addCleanup(controller._stop_storage_threads)
        self.cache.load_back_threshold = 0
        # The pools of these trees are as large on the host as on the device, which leaves nothing.
        controller.prefetch_capacity_limit = controller.mem_pool_host.size

    def compute(self, tokens: list[int]) -> None:
        """Insert a sequence as if it had been computed: its content depends on its tokens."""
        slots = self._alloc(self._allocator, len(tokens))
        for slot, content in zip(slots.tolist(), self._kv_of(tokens), strict=True):
            self._write_kv(slot, content)
        params = InsertParams(key=RadixKey(array("q", tokens)), value=slots)
        if self.cfg.has_mamba:
            request = self._make_req(self._requests)
            params.mamba_value = request.kv.mamba_pool_idx.unsqueeze(0)
            for part in self._state(int(params.mamba_value)):
                part.copy_(_random(part, "state", tokens))
        self.cache.insert(params)

    def store(self) -> None:
        """Back up the whole tree to the host and to storage."""
        self._backup_tree(self.cache)
        for node in self._nodes():
            self.cache.write_backup_storage(node)
        self._flush_l3_backups(self.cache, LIMIT)

    def load(self, tokens: list[int]) -> int:
        """Load the longest stored prefix to the device and return its tokens.

        Asserts that it holds what `compute` would have written.
        """
        self._asked += 1
        handle = CacheRequestHandle(f"request {self._asked}", 0)
        root = self.cache.root_node_handle()
        self.cache.prefetch_from_storage(handle, root, array("q", tokens), None, None)
        self._run_prefetch_to_completion(self.cache, handle, LIMIT)
        self.cache.pop_prefetch_loaded_tokens(handle)
        request = self._load_back_through_admission(self.cache, self._requests, tokens)
        if request.host_hit_length:
            self._finish_pending_loads(self.cache)
        match = match_prefix(self.cache, tokens)
        length = int(match.device_prefix_len)
        if length:
            self._assert_content(tokens[:length], match.last_device_node)
        return length

    def _assert_content(self, tokens: list[int], node: Any) -> None:
        slots = self.cache.path_device_indices(node).tolist()
        for slot, content in zip(slots, self._kv_of(tokens), strict=True):
            for part in self._kv(slot):
                assert torch.equal(part, content.expand_as(part).to(part.dtype))
        if self.cfg.has_mamba:
            state = node_device_value(self.cache, node, ComponentType.MAMBA)
            for part in self._state(int(state)):
                assert torch.equal(part, _random(part, "state", tokens))

    def _nodes(self) -> Iterator[Any]:
        """Yield all nodes but the root, parents first."""
        waiting = list(node_children(self.cache, self.cache.root_node_handle()))
        while waiting:
            node = waiting.pop(0)
            yield node
            waiting += node_children(self.cache, node)

    def _kv_of(self, tokens: list[int]) -> list[torch.Tensor]:
        """Return what each token's KV is filled with; it depends on all tokens up to it."""
        sums = itertools.accumulate(tokens, lambda total, token: (31 * total + token) % 65_521)
        return [torch.tensor(float(total)) for total in sums]

    def _write_kv(self, slot: int, content: torch.Tensor) -> None:
        for part in self._kv(slot):
            part.fill_(content)

    def _kv(self, slot: int) -> Iterator[torch.Tensor]:
        """Yield a slot's keys and values in all layers of the pool of full attention."""
        pool = self._get_full_kv_pool(self._allocator)
        for keys, values in zip(pool.k_buffer, pool.v_buffer, strict=True):
            yield keys[slot]
            yield values[slot]

    def _state(self, index: int) -> list[torch.Tensor]:
        """Return the parts of a Mamba state."""
        states = self._requests.mamba_pool.mamba_cache
        return [part[:, index] for part in (states.temporal, *states.conv)]


def _random(like: torch.Tensor, kind: str, tokens: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr((kind, tokens)).encode()))
    return torch.rand(like.shape, generator=generator).to(like.dtype)


@contextmanager
def hybrid_tree(config: CacheConfig, settings: dict[str, str]) -> Iterator[Tree]:
    """Yield a tree whose storage uses an agent with these settings."""
    made = Tree(config)
    try:
        made.attach(settings)
        yield made
    finally:
        made.doCleanups()

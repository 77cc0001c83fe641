"""A storage with its host pools, like that of one rank of a server."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from memkv_testbed.processes import ending, stalled
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import MIB, MinioConfig
from memkv_sglang.plugin import device_pools, events, hooks, host_memory, pools, state
from memkv_sglang.plugin import storage as storage_module
from memkv_sglang.plugin.namespaces import ModelIdentity
from memkv_sglang.plugin.storage import MemKVStorage
from memkv_sglang.testing.pages import make_hashes
from tests.plugin import host_pools
from tests.sglang_versions import IS_NEWEST

MODEL = ModelIdentity("model", "", {})
LIMIT = 30.0
"""Seconds after which a test gives up waiting."""


def prepare_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide what only a running server has: its arguments and its hooks."""
    base = "sglang.srt.mem_cache"
    monkeypatch.setattr(f"{base}.pool_host.base.HICACHE_HOST_MEMORY_RESERVE_BYTES", 0)
    monkeypatch.setattr(state, "wanted", lambda: True)
    monkeypatch.setattr(state, "write_policy", lambda: "write_through")
    monkeypatch.setattr(state, "unfinished_clears", set())
    monkeypatch.setattr(state, "device_pools", {})
    monkeypatch.setattr(
        f"{base}.storage.mmap.alloc_shm",
        lambda dims, dtype: host_memory.allocate_shared(_unused, dims, dtype),
    )
    monkeypatch.setattr("sglang.srt.runtime_context.get_server_args", lambda: None)
    monkeypatch.setattr(storage_module, "check_server", lambda extra, server_args: None)
    monkeypatch.setattr(storage_module, "identify_model", lambda server_args, salt: MODEL)
    monkeypatch.setattr(hooks, "install_optional_hooks", lambda: None)
    monkeypatch.setattr(events, "are_published", lambda: False)
    monkeypatch.setattr(pools, "START_SECONDS", LIMIT)


def _unused(*_: Any) -> Any:
    raise AssertionError


def storage_config(extra: dict[str, Any] | None = None, **fields: Any) -> HiCacheStorageConfig:
    values: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": True,
        "model_name": "tiny",
        **fields,
    }
    return HiCacheStorageConfig(extra_config=extra, **values)


def note_device_pools(pools: dict[str, Any]) -> None:
    """Let the hook see the controller of a server with these host pools."""
    entries = [
        SimpleNamespace(name=name, host_pool=pool, device_pool=SimpleNamespace(dtype="float32"))
        for name, pool in pools.items()
    ]
    controller = SimpleNamespace(mem_pool_host=SimpleNamespace(entries=entries))
    device_pools.attach(lambda controller: None, controller)


class Node:
    """An agent's settings, and storages that use it."""

    def __init__(self, home: Path, minio: MinioConfig | None, *, nvme: bool = True) -> None:
        self.settings = {
            "agent.socket": str(home / "run" / "agent.sock"),
            "agent.idle_timeout": "60",
            "agent.drain_timeout": "1",
            "engine.lookup_budget": "4s",  # however busy the machine is
        }
        if nvme:
            pages = {"nvme.directory": str(home / "pages"), "nvme.capacity": str(128 * MIB)}
            self.settings |= pages
        if minio is not None:
            self.settings |= {"minio.endpoint": minio.endpoint, "minio.bucket": minio.bucket}
        self._storages: list[MemKVStorage] = []

    def attach(self, pools: dict[str, Any], **fields: Any) -> MemKVStorage:
        """Register the host pools with a backend, like SGLang's controller does."""
        config = storage_config({"memkv": {"settings": self.settings}}, **fields)
        note_device_pools(pools)
        storage = MemKVStorage(config, {})
        self._storages.append(storage)
        storage.register_mem_pool_host(pools["kv"])
        for name, pool in pools.items():
            storage.register_mem_host_pool_v2(pool, name)
        if IS_NEWEST:
            storage.on_host_pools_registered()
        return storage

    @contextmanager
    def client(self) -> Iterator[AgentClient]:
        client = AgentClient(load_config(None, os.environ, self.settings), start=False)
        try:
            assert client.wait(LIMIT), client.problem
            yield client
        finally:
            client.close()

    def stalled_agent(self) -> AbstractContextManager[None]:
        with self.client() as client:
            return stalled(_pid(client))

    def upload(self) -> None:
        """Wait until all stored pages are in the shared tier."""
        with self.client() as client:
            assert client.flush(LIMIT)

    def pools(self) -> int:
        """Return how many pools the agent has mapped."""
        with self.client() as client:
            report = client.status()
        assert report is not None
        return report.agent.pools

    def close(self) -> None:
        for storage in self._storages:
            storage.close()
        if not Path(self.settings["agent.socket"]).exists():
            return
        with suppress(AssertionError):
            self.stop_agent()

    def stop_agent(self) -> None:
        """Stop the agent and wait until it has ended."""
        with self.client() as client, ending(_pid(client)):
            client.shutdown()


def _pid(agent: AgentClient) -> int:
    report = agent.status()
    assert report is not None
    return report.agent.pid


def keys(count: int, seed: str = "") -> list[str]:
    return [page.hex() for page in make_hashes(count, seed)]


def after(prefix: list[str]) -> HiCacheStorageExtraInfo:
    """Return SGLang's extra information for pages that follow others."""
    return HiCacheStorageExtraInfo(prefix_keys=prefix)


def store(storage: MemKVStorage, pool: Any, pages: list[str]) -> list[bytes]:
    """Write and store a page for each key, from the start of the pool; return the contents."""
    contents = [host_pools.write(pool, i, int(page[:8], 16)) for i, page in enumerate(pages)]
    slots = host_pools.slots(pool, range(len(pages)))
    assert storage.batch_set_v1(pages, slots, after([])) == [True] * len(pages)
    return contents


def eventually(condition: Callable[[], object], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)

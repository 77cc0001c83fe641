"""The agent builds engines from its settings."""

import errno
import os
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import msgspec
import pytest
from memkv_testbed.minio_server import MinioServer
from prometheus_client import CollectorRegistry

from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import (
    MIB,
    Config,
    EngineConfig,
    MinioConfig,
    NvmeConfig,
    ShardConfig,
)
from memkv_sglang.page import Chain
from memkv_sglang.testing.conformance import spill
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.nvme import NvmeTier
from tests.engine.engines import wait_until

CHAIN = make_chain(make_namespace(), 3)
BROKEN = "disk does not work, its pages count as missing"


def test_uploads_are_cancelled_without_a_bucket(tmp_path: Path) -> None:
    """If the bucket is removed from the settings, pages waiting for upload must not block the
    disk.
    """
    config = Config(nvme=NvmeConfig(directory=str(tmp_path / "nvme"), capacity=MIB))
    keys = make_chain(make_namespace(), 200).keys()
    before = NvmeTier(config.nvme)
    spill(before, keys)
    before.mark_pending(keys)
    assert spill(before, keys)[-1] is SpillResult.REFUSED
    before.close()
    engine = build_engine(config, CollectorRegistry())
    new = make_chain(make_namespace(), 3, "new").keys()
    pages = [make_page(key, (4096, 4096), filled=True) for key in new]
    assert engine.spill(pages) == [SpillResult.STORED] * 3
    engine.close(drain=0)
    again = NvmeTier(config.nvme)
    assert list(again.pending()) == []
    again.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV, errno.EROFS, errno.EUCLEAN])
@pytest.mark.parametrize("call", ["directory.fcntl.flock", "tier.recover"])
def test_node_with_a_broken_disk_uses_minio(
    code: int,
    call: str,
    tmp_path: Path,
    minio_config: MinioConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(f"memkv_sglang.tiers.nvme.{call}", fail)
    nvme = NvmeConfig(directory=str(tmp_path / "nvme"), capacity=MIB)
    registry = CollectorRegistry()
    engine = build_engine(Config(nvme=nvme, minio=minio_config), registry)
    pages = [make_page(key, (4096, 4096), filled=True) for key in CHAIN.keys()]
    assert engine.spill(pages) == [SpillResult.STORED] * 3
    assert engine.lookup(CHAIN).length == 3
    engine.close(drain=0)
    assert [record.message for record in caplog.records].count(BROKEN) == 1
    labels = {"tier": "nvme", "operation": "open"}
    assert registry.get_sample_value("memkv_call_errors_total", labels) == 1
    with pytest.raises(ConfigError, match=r"nvme\.directory: cannot use .*; "):
        build_engine(Config(nvme=nvme), CollectorRegistry())


def test_wrong_directory_is_refused_even_with_minio(
    tmp_path: Path, minio_config: MinioConfig
) -> None:
    (tmp_path / "file").touch()
    nvme = NvmeConfig(directory=str(tmp_path / "file" / "nvme"), capacity=MIB)
    with pytest.raises(ConfigError, match=r"nvme\.directory"):
        build_engine(Config(nvme=nvme, minio=minio_config), CollectorRegistry())


def test_read_only_file_system_counts_as_a_broken_disk(
    tmp_path: Path,
    minio_config: MinioConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_only = SimpleNamespace(f_flag=os.ST_RDONLY, f_frsize=4096, f_blocks=1 << 30)
    monkeypatch.setattr("memkv_sglang.config.environment.os.statvfs", lambda _: read_only)
    config = Config(
        nvme=NvmeConfig(directory=str(tmp_path), capacity=MIB),
        minio=minio_config,
    )
    check_environment(LoadedConfig(config, {}))
    build_engine(config, CollectorRegistry()).close(drain=0)
    assert [record.message for record in caplog.records].count(BROKEN) == 1


def test_faults_of_minio_are_counted_by_kind(minio_config: MinioConfig) -> None:
    nobody = msgspec.structs.replace(minio_config, secret_key="not the secret")
    registry = CollectorRegistry()
    engine = build_engine(Config(minio=nobody), registry)
    pages = [make_page(key, (4096, 4096), filled=False) for key in CHAIN.keys()]
    assert engine.load(pages)[0].result is not LoadResult.LOADED
    labels = {"tier": "minio", "event": "is_not_usable"}
    count = registry.get_sample_value("memkv_tier_events_total", labels)
    assert count is not None
    assert count >= 1
    engine.close(drain=0)


def test_pages_survive_the_death_and_return_of_a_shard(minio_server: MinioServer) -> None:
    """An agent without a disk: what the dead shard had is stored in the other one."""
    chain, later = make_chain(make_namespace(), 40), make_chain(make_namespace(), 40, "later")
    registry = CollectorRegistry()

    def works(shard: str) -> bool:
        engine.status()
        return registry.get_sample_value("memkv_shard_works", {"shard": shard}) == 1

    def load(chain: Chain = chain) -> int:
        pages = [make_page(key, (4096, 4096), filled=False) for key in chain.keys()]
        loads = engine.load(pages)
        loaded = [page for page, one in zip(pages, loads, strict=True) if one.tier == "minio"]
        assert all(map(holds_content, loaded))
        return len(loaded)

    def is_stored(chain: Chain = chain) -> bool:
        pages = [make_page(key, (4096, 4096), filled=True) for key in chain.keys()]
        return set(engine.spill(pages)) <= {SpillResult.STORED, SpillResult.PRESENT}

    def is_found(chain: Chain = chain) -> bool:
        return engine.lookup(chain) == (40, True)

    def recovers() -> bool:
        engine.probe(5.0)
        return is_stored(later) and load(later) == 40 and works("two")

    with MinioServer() as second:
        shards = tuple(
            ShardConfig(
                name=name,
                endpoint=server.endpoint,
                access_key=server.access_key,
                secret_key=server.secret_key,
            )
            for name, server in (("one", minio_server), ("two", second))
        )
        minio = MinioConfig(bucket=f"test-{uuid.uuid4().hex}", shards=shards, negative_ttl=0.0)
        engine_config = EngineConfig(breaker_cooldown=0.2, lookup_budget=4.0)
        engine = build_engine(Config(minio=minio, engine=engine_config), registry)
        try:
            assert is_stored() and is_found() and load() == 40
            second.kill()
            wait_until(lambda: load() < 40 and engine.lookup(chain).length < 40)
            wait_until(is_stored)
            wait_until(is_found)
            assert load() == 40
            assert works("one") and not works("two")
            second.start()
            wait_until(recovers)
            assert is_found() and load() == 40
        finally:
            engine.close(drain=0)
    labels = {"operation": "load", "result": "loaded"}
    by_tier = registry.get_sample_value("memkv_pages_total", {"tier": "minio", **labels})
    by_shard = [
        registry.get_sample_value("memkv_shard_pages_total", {"shard": name, **labels})
        for name in ("one", "two")
    ]
    assert all(by_shard)
    assert sum(filter(None, by_shard)) == by_tier

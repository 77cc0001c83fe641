"""The agent builds engines from its settings."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import MIB, Config, MinioConfig, NvmeConfig
from memkv_sglang.testing.conformance import spill
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.nvme import NvmeTier

CHAIN = make_chain(make_namespace(), 3)


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
    assert [record.message for record in caplog.records].count("nvme tier disabled") == 1
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
    assert [record.message for record in caplog.records].count("nvme tier disabled") == 1


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

"""Metrics follow Prometheus conventions, and docs/metrics.md lists all of them."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang import __version__
from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.config.schema import MIB, CollectorConfig, Config, MinioConfig, NvmeConfig
from memkv_sglang.metrics_document import agent_metrics, document, exposed_name, server_metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_is_generated_from_the_code() -> None:
    assert PAGE.read_text() == document(), (
        "run `python -m memkv_sglang.metrics_document > docs/metrics.md`"
    )


def test_the_page_lists_every_metric_of_a_node(tmp_path: Path, minio_config: MinioConfig) -> None:
    nvme = NvmeConfig(directory=str(tmp_path / "nvme"), capacity=MIB)
    registry = CollectorRegistry()
    config = Config(nvme=nvme, minio=minio_config, collector=CollectorConfig(use_period=86400.0))
    engine = build_engine(config, registry)
    try:
        page = PAGE.read_text()
        for metric in registry.collect():
            assert f"| `{exposed_name(metric)}` |" in page
    finally:
        engine.close(drain=0)


def test_names_follow_the_conventions() -> None:
    for metric in [*agent_metrics(), *server_metrics()]:
        assert re.fullmatch(r"memkv(_[a-z]+)+", metric.name)
        assert not re.search(r"_(ms|kib|mib|gb|count|percent)$", metric.name)
        if metric.type == "histogram" or "duration" in metric.name:
            assert metric.name.endswith("_seconds")
        if metric.type == "gauge":
            assert not metric.name.endswith("_total")
        assert metric.documentation
        assert not metric.documentation.endswith(".")  # docs/metrics.md adds the full stop


def test_known_series_exist_before_the_first_event(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    engine = build_engine(
        Config(nvme=NvmeConfig(directory=str(tmp_path / "nvme"), capacity=MIB)), registry
    )
    try:
        value = registry.get_sample_value
        for operation, result in [("lookup", "found"), ("load", "corrupt"), ("spill", "failed")]:
            labels = {"tier": "nvme", "operation": operation, "result": result}
            assert value("memkv_pages_total", labels) == 0
        assert value("memkv_call_errors_total", {"tier": "nvme", "operation": "load"}) == 0
        assert value("memkv_upload_dropped_pages_total", {"reason": "backlog"}) == 0
        assert value("memkv_collections_total", {"result": "failed"}) == 0
        assert value("memkv_tier_evicted_pages_total", {"tier": "nvme"}) == 0
        assert value("memkv_build_info", {"version": __version__}) == 1
    finally:
        engine.close(drain=0)


def test_fill_can_be_computed(tmp_path: Path, minio_config: MinioConfig) -> None:
    registry = CollectorRegistry()
    nvme = NvmeConfig(directory=str(tmp_path / "nvme"), capacity=MIB)
    engine = build_engine(Config(nvme=nvme, minio=minio_config), registry)
    try:
        value = registry.get_sample_value
        assert value("memkv_tier_capacity_bytes", {"tier": "nvme"}) == MIB
        assert value("memkv_tier_bytes", {"tier": "nvme"}) is not None
        assert value("memkv_tier_capacity_bytes", {"tier": "minio"}) is None
        assert value("memkv_upload_queue_capacity_bytes") == Config().engine.upload_backlog
    finally:
        engine.close(drain=0)


@pytest.mark.parametrize("state", ["closed", "half_open", "open"])
def test_the_breaker_is_a_state_set(state: str, tmp_path: Path, minio_config: MinioConfig) -> None:
    registry = CollectorRegistry()
    engine = build_engine(Config(minio=minio_config), registry)
    try:
        labels = {"tier": "minio", "memkv_breaker_state": state}
        assert registry.get_sample_value("memkv_breaker_state", labels) == (state == "closed")
    finally:
        engine.close(drain=0)

"""Engines as the agent makes them of its settings."""

from pathlib import Path

from prometheus_client import CollectorRegistry

from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.config.schema import MIB, Config, NvmeConfig
from memkv_sglang.testing.conformance import spill
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.nvme import NvmeTier


def test_without_a_bucket_no_page_waits_for_upload(tmp_path: Path) -> None:
    """A node whose bucket was taken from its settings must not end with a disk that is stuck."""
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

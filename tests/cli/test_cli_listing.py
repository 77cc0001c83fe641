"""`inspect` lists the pages of a running agent's tier correctly."""

import random
import time
from pathlib import Path

from memkv_sglang.cli.listing.nvme import NvmeListing
from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.nvme import NvmeTier


def test_the_listing_follows_spills_and_removals(tmp_path: Path) -> None:
    config = NvmeConfig(directory=str(tmp_path / "nvme"), capacity=4 * MIB, segment_size=MIB)
    namespace, choice = make_namespace(8192), random.Random(7)
    keys = make_chain(namespace, 120).keys()
    tier = NvmeTier(config)
    try:
        tier.describe(namespace)
        for _ in range(30):
            some = choice.sample(keys, 12)
            pages = [make_page(key, (8192,), filled=True) for key in some]
            tier.spill(pages, time.monotonic() + 30)
            tier.remove(choice.sample(keys, 5))
        expected = {key for key in keys if tier.present([key], 0) == [True]}
        listing = NvmeListing(Path(config.directory))
        assert expected
        assert {page.key for page in listing.pages(namespace.digest)} == expected
        assert listing.namespaces() == {namespace.digest: namespace}
        assert {key for key in keys if listing.find(key)} == expected
    finally:
        tier.close()
    assert {page.key for page in NvmeListing(Path(config.directory)).pages(namespace.digest)} == (
        expected
    )


def test_a_missing_directory_holds_nothing(tmp_path: Path) -> None:
    listing = NvmeListing(tmp_path / "none")
    assert listing.namespaces() == {}
    assert not (tmp_path / "none").exists()

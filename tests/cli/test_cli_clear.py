"""`memkv clear --bucket` deletes what all nodes have stored, after it has been confirmed."""

import io
import sys

import pytest

from memkv_sglang.cli.listing.minio import open_minio
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Page, PageKey
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.minio import MinioTier
from tests.cli.cli_node import Run

NAMESPACES = [make_namespace(page_bytes=4096, pool=pool) for pool in ("kv", "mamba")]
LIMIT = 1e9


@pytest.fixture
def keys(minio_config: MinioConfig) -> list[PageKey]:
    """Pages of two namespaces, one of which has no description."""
    tier = MinioTier(minio_config)
    try:
        tier.describe(NAMESPACES[0])
        keys = [key for space in NAMESPACES for key in make_chain(space, 3).keys()]
        pages = [Page(key, (memoryview(bytearray(4096)),)) for key in keys]
        assert set(tier.spill(pages, LIMIT)) == {SpillResult.STORED}
    finally:
        tier.close()
    return keys


def present(config: MinioConfig, keys: list[PageKey]) -> list[bool]:
    with open_minio(config) as tier:
        return tier.present(keys, LIMIT)


def test_every_page_is_deleted(run: Run, minio_config: MinioConfig, keys: list[PageKey]) -> None:
    outcome = run("clear", "--bucket", "--yes")
    assert (outcome.status, outcome.out) == (0, "removed: 6 pages of 2 namespaces\n")
    assert not any(present(minio_config, keys))


def test_without_the_flag_nothing_is_deleted(
    run: Run, minio_config: MinioConfig, keys: list[PageKey]
) -> None:
    outcome = run("clear", "--yes")
    assert outcome.status == 2
    assert "confirm that with --bucket" in outcome.err
    assert all(present(minio_config, keys))


@pytest.mark.parametrize(("answer", "kept"), [("n\n", True), ("", True), ("y\n", False)])
def test_it_asks_first(
    run: Run,
    minio_config: MinioConfig,
    keys: list[PageKey],
    answer: str,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    outcome = run("clear", "--bucket")
    assert f"Delete every page of all nodes from {minio_config.bucket}" in outcome.out + outcome.err
    assert (outcome.status == 0) == (not kept)
    assert all(present(minio_config, keys)) == kept

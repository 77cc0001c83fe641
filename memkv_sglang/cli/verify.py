"""`memkv verify`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import human_size, make_progress
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import MIB, Config, NvmeConfig
from memkv_sglang.page import Page
from memkv_sglang.tiers.base import LoadResult, Tier, TierError

if TYPE_CHECKING:
    from rich.progress import Progress

    from memkv_sglang.cli.listing.base import Listing, StoredPage

BATCH = 64 * MIB
"""Bytes that are read at a time."""

CALL_LIMIT = 60.0
"""Seconds for a batch; nobody waits for it as a server would."""

_OUTCOMES = {
    LoadResult.CORRUPT: "corrupt, set aside",
    LoadResult.MISSING: "listed, but not there",
    LoadResult.FAILED: "could not be read",
}


@click.command(
    cls=SettingsCommand,
    shown=("nvme", "minio"),
    short_help="Read every page, check every checksum, compare the index with the disk.",
)
@click.option("--repair", is_flag=True, help="Make a new index from the disk if it is wrong.")
def verify(loaded: LoadedConfig, repair: bool) -> int:
    """Read every page of both tiers, check every checksum, compare the index with the disk.

    A corrupt copy is set aside, as it is whenever one is loaded: it then counts as missing. The
    directory must not be in use: stop the agent first. Exit status 1 if anything was wrong.
    """
    check_environment(loaded)
    problems: list[str] = []
    totals: list[str] = []
    try:
        with make_progress() as progress:
            for tier, listing in _tiers(loaded.config, problems, repair=repair):
                totals.append(_check_pages(tier, listing, progress, problems))
    finally:  # also after Ctrl-C
        for line in (*problems, *totals):
            click.echo(line)
    return 1 if problems else 0


def _tiers(
    config: Config, problems: list[str], *, repair: bool
) -> "Iterator[tuple[Tier, Listing]]":
    """Yield each tier that there is, open until the next one is asked for."""
    from memkv_sglang.cli.listing.minio import MinioListing, open_minio
    from memkv_sglang.cli.listing.nvme import NvmeListing

    if config.nvme.directory and Path(config.nvme.directory).exists():
        _check_index(config.nvme, problems, repair=repair)
        with _open_nvme(config.nvme) as tier:
            yield tier, NvmeListing(Path(config.nvme.directory))
    if config.minio.endpoint:
        with open_minio(config.minio) as shared:
            yield shared, MinioListing(config.minio, shared)


@contextmanager
def _open_nvme(config: NvmeConfig) -> Iterator[Tier]:
    """Open the tier; raises `ConfigError` while an agent holds the directory."""
    from memkv_sglang.tiers.nvme import NvmeTier

    tier = NvmeTier(config)
    try:
        yield tier
    finally:
        tier.close()


def _check_index(config: NvmeConfig, problems: list[str], *, repair: bool) -> None:
    """Compare the tier's structures; without its journal, it makes them from the disk."""
    with _open_nvme(config) as tier:
        found = tier.check_integrity()
    problems += [f"nvme: {problem}" for problem in found]
    if found and repair:
        (Path(config.directory) / "journal").unlink()
        problems.append("nvme: a new index was made from the pages' footers")
    elif found:
        problems.append("nvme: `memkv verify --repair` makes a new index from the pages' footers")


def _check_pages(tier: Tier, listing: "Listing", progress: "Progress", problems: list[str]) -> str:
    """Read and check every page; returns a line about them all."""
    try:
        pages = [page for digest in listing.namespaces() for page in listing.pages(digest)]
    except TierError as error:
        problems.append(f"{tier.name}: cannot be checked: {error}")
        return f"{tier.name}: not checked"
    task = progress.add_task(tier.name, total=len(pages))
    intact = 0
    for batch in _batches(pages):
        for page, result in zip(batch, _load(tier, batch), strict=True):
            if result == LoadResult.LOADED:
                intact += 1
            else:
                problems.append(f"{tier.name}: {_OUTCOMES[result]}: {_name(page)}")
        progress.advance(task, len(batch))
    size = human_size(sum(page.length for page in pages))
    return f"{tier.name}: {intact} of {len(pages)} pages ({size}) intact"


def _name(page: "StoredPage") -> str:
    return f"{page.key.namespace.hex()} {page.key.hash.hex()} ({page.place})"


def _batches(pages: "Sequence[StoredPage]") -> "Iterator[list[StoredPage]]":
    batch: list[StoredPage] = []
    size = 0
    for page in pages:
        if batch and size + page.length > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(page)
        size += page.length
    if batch:
        yield batch


def _load(tier: Tier, batch: "Sequence[StoredPage]") -> list[LoadResult]:
    """Read pages and check them; one result a page, each of them tried."""
    results: list[LoadResult] = []
    while len(results) < len(batch):
        pages = [
            Page(page.key, (memoryview(bytearray(page.length)),)) for page in batch[len(results) :]
        ]
        answers = tier.load(pages, time.monotonic() + CALL_LIMIT)
        results += takewhile(lambda answer: answer != LoadResult.SKIPPED, answers)
    return results

"""`memkv verify`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import human_size, make_progress, print_line
from memkv_sglang.cli.shards import bucket_configs, shard_option, tier_name
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import MIB, MinioConfig, NvmeConfig
from memkv_sglang.config.shards import has_minio
from memkv_sglang.page import Page, PageKey
from memkv_sglang.tiers.base import LoadResult, Tier, TierError

if TYPE_CHECKING:
    from rich.progress import Progress

    from memkv_sglang.cli.listing.base import StoredPage
    from memkv_sglang.tiers.nvme import NvmeTier, VerifyReport

BATCH = 64 * MIB
"""Bytes of pages read from the shared tier per call."""

CALL_LIMIT = 60.0
"""Seconds for a batch. No request waits for it, so it may take longer than a server's loads."""

_OUTCOMES = {
    LoadResult.CORRUPT: "corrupt, quarantined",
    LoadResult.MISSING: "listed, but removed or not a valid page",
    LoadResult.FAILED: "could not be read",
}


class _Findings(NamedTuple):
    """Lines to print. Each begins with the name of its tier."""

    problems: list[str]
    notes: list[str]
    """Harmless findings and totals."""


@click.command(
    cls=SettingsCommand,
    shown=("nvme", "minio"),
    short_help="Check every checksum, and the index against the disk.",
)
@click.option(
    "--repair",
    is_flag=True,
    help="Remove bad pages from the directory, and rebuild its index if it is wrong.",
)
@shard_option
def verify(loaded: LoadedConfig, repair: bool, shard: str | None) -> int:
    """Read every page of both tiers, check its checksum, and compare the index with the disk.

    Corrupt pages in MinIO are quarantined, as in every load. Corrupt pages on the disk are
    quarantined only with --repair. Stop the agent first, because the directory must not be in use.
    The exit status is 1 if anything was wrong, whether or not it was repaired.
    """
    check_environment(loaded)
    nvme, minio = loaded.config.nvme, loaded.config.minio
    buckets = bucket_configs(minio, shard) if has_minio(minio) or shard else {}
    findings = _Findings([], [])
    try:
        with make_progress() as progress:
            disks = nvme.for_each_directory()
            for disk in disks:
                if Path(disk.directory).exists():
                    label = "nvme" if len(disks) == 1 else f"nvme: {disk.directory}"
                    _verify_nvme(disk, label, progress, findings, repair=repair)
            for name, bucket in buckets.items():
                _verify_minio(bucket, tier_name(name), progress, findings)
    finally:  # also when Ctrl-C ends the progress
        for line in (*findings.problems, *findings.notes):
            print_line(line)
    return 1 if findings.problems else 0


def _verify_nvme(
    config: NvmeConfig, label: str, progress: "Progress", findings: _Findings, *, repair: bool
) -> None:
    """Verify one directory. Each line begins with `label`."""
    task = progress.add_task(label, total=None)
    try:
        with _open_nvme(config) as tier:
            report = tier.verify(
                repair, lambda done, total: progress.update(task, completed=done, total=total)
            )
            if report.disagreements and repair:
                tier.discard_journal()
    except TierError as error:
        findings.problems.append(f"{label}: cannot be checked: {error}")
        return
    findings.problems.extend(f"{label}: {line}" for line in _problems(report))
    findings.notes.extend(f"{label}: {line}" for line in _notes(report))
    if report.disagreements and repair:
        with _open_nvme(config):
            findings.notes.append(f"{label}: rebuilt the index from the pages' footers")
    elif not report.is_clean and not repair:
        findings.notes.append(
            f"{label}: `memkv verify --repair` removes bad pages and repairs the index"
        )


@contextmanager
def _open_nvme(config: NvmeConfig) -> "Iterator[NvmeTier]":
    """Open the tier without changing it. Raises `ConfigError` while an agent uses the directory."""
    from memkv_sglang.tiers.nvme import NvmeTier

    tier = NvmeTier(config, maintain=False)
    try:
        yield tier
    finally:
        tier.close()


def _problems(report: "VerifyReport") -> Iterator[str]:
    from memkv_sglang.cli.listing.nvme import slot_name

    yield from report.disagreements
    for state, pages in (("corrupt", report.corrupt), ("unreadable", report.unreadable)):
        for page in pages:
            yield f"{state}: {_name(page.key, slot_name(page.segment, page.slot))}"


def _notes(report: "VerifyReport") -> Iterator[str]:
    for file in report.orphans:
        yield f"segments/{file} is not a valid segment: it takes up space and is not used"
    for digest in report.undescribed:
        yield f"namespace {digest.hex()} has pages but no description"
    if report.repaired:
        yield f"{report.repaired} bad pages were quarantined and freed"
    intact = report.pages - len(report.corrupt) - len(report.unreadable)
    yield f"{intact} of {report.pages} pages ({human_size(report.read_bytes)}) intact"


def _verify_minio(
    config: MinioConfig, name: str, progress: "Progress", findings: _Findings
) -> None:
    from memkv_sglang.cli.listing.minio import MinioListing, open_minio

    with open_minio(config) as tier:
        try:
            listing = MinioListing(config, tier, name)
            pages = [page for digest in listing.namespaces() for page in listing.pages(digest)]
        except TierError as error:
            findings.problems.append(f"{name}: cannot be checked: {error}")
            return
        task = progress.add_task(name, total=len(pages))
        intact = 0
        for batch in _batches(pages):
            for page, result in zip(batch, _load(tier, batch), strict=True):
                if result == LoadResult.LOADED:
                    intact += 1
                else:
                    where = _name(page.key, page.place)
                    findings.problems.append(f"{name}: {_OUTCOMES[result]}: {where}")
            progress.advance(task, len(batch))
    size = human_size(sum(page.length for page in pages))
    findings.notes.append(f"{name}: {intact} of {len(pages)} pages ({size}) intact")


def _name(key: PageKey, place: str) -> str:
    return f"{key.namespace.hex()} {key.hash.hex()} ({place})"


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
    """Load and check every page; returns one result per page."""
    results: list[LoadResult] = []
    while len(results) < len(batch):
        pages = [
            Page(page.key, (memoryview(bytearray(page.length)),)) for page in batch[len(results) :]
        ]
        answers = tier.load(pages, time.monotonic() + CALL_LIMIT)
        results += takewhile(lambda answer: answer != LoadResult.SKIPPED, answers)
    return results

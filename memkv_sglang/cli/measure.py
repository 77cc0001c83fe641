"""Benchmark tiers: throughput with many pages per call, latency with one page per call."""

import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from rich.progress import Progress, TaskID

from memkv_sglang.cli.output import human_size
from memkv_sglang.config.environment import existing_part
from memkv_sglang.config.schema import MIB, Config, MinioConfig, NvmeConfig
from memkv_sglang.config.shards import has_minio, shard_configs
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, Page, PageKey
from memkv_sglang.tiers.base import LoadResult, SpillResult, Tier, TierError

BATCH = 64 * MIB
"""Bytes per call. The pages of a call are transferred in parallel."""

SINGLE_LOADS = 100
"""Number of loads of a single page, which measure the latency."""

CALL_LIMIT = 60.0
"""Seconds for a call. A benchmark can wait longer than a server."""

_CAPACITY_FACTOR = 2
"""Capacity relative to the size of all pages, so that none is evicted."""


class Measurement(NamedTuple):
    """The results of one tier at one page size. GB are 10^9 bytes."""

    tier: str
    page_bytes: int
    spill_gb_s: float
    load_gb_s: float
    load_p50_s: float
    load_p99_s: float
    load_cpu_s_per_gb: float
    """CPU time of this process during the loads, per GB."""


def measure(
    config: Config, page_sizes: Sequence[int], volume: int, progress: Progress
) -> list[Measurement]:
    """Benchmark every configured tier and clean up. Raises `click.ClickException`."""
    results = []
    if config.nvme.directory:
        with _temporary_nvme(config.nvme, volume * len(page_sizes)) as tier:
            results += [_measure_tier(tier, size, volume, progress) for size in page_sizes]
    if has_minio(config.minio):
        with _temporary_minio(config.minio) as tier:
            results += [_measure_tier(tier, size, volume, progress) for size in page_sizes]
    return results


@contextmanager
def _temporary_nvme(config: NvmeConfig, volume: int) -> Iterator[Tier]:
    """Open a tier in temporary directories on the same disks."""
    disks = config.for_each_directory()
    capacity = _CAPACITY_FACTOR * volume // len(disks) + config.segment_size
    with ExitStack() as stack:
        directories = []
        for disk in disks:
            place = existing_part(Path(disk.directory))
            if shutil.disk_usage(place).free < capacity:
                raise click.ClickException(
                    f"{place} does not have {human_size(capacity)} free; lower --volume"
                )
            directory = tempfile.TemporaryDirectory(prefix="memkv-bench-", dir=place)
            directories.append(stack.enter_context(directory))
        tier = _open_nvme(
            msgspec.structs.replace(config, directory=",".join(directories), capacity=capacity)
        )
        stack.callback(tier.close)
        yield tier


def _open_nvme(config: NvmeConfig) -> Tier:
    from memkv_sglang.tiers.disks import StripedTier
    from memkv_sglang.tiers.nvme import NvmeTier

    several = len(config.for_each_directory()) > 1
    return StripedTier(config) if several else NvmeTier(config)


@contextmanager
def _temporary_minio(config: MinioConfig) -> Iterator[Tier]:
    """Open a tier with a temporary prefix in the same bucket, or in the bucket of each shard."""
    from memkv_sglang.tiers.minio import MinioTier
    from memkv_sglang.tiers.shards import Shard, ShardedTier

    folder = f"memkv-bench-{os.urandom(8).hex()}"
    tiers = {}
    for name, one in shard_configs(config).items():
        prefix = "/".join(filter(None, (one.prefix, folder)))
        tiers[name] = MinioTier(msgspec.structs.replace(one, prefix=prefix))
    whole: Tier = (
        ShardedTier("minio", [Shard(*named) for named in tiers.items()], replicas=config.replicas)
        if config.shards
        else tiers[""]
    )
    try:
        yield whole
    finally:
        for tier in tiers.values():
            # the bucket could not be opened, so there is nothing to remove
            with suppress(TierError):
                bucket, _, names = tier.access.control()
                bucket.remove(item.name for item in bucket.objects(names.root))
        whole.close()


def _measure_tier(tier: Tier, page_size: int, volume: int, progress: Progress) -> Measurement:
    namespace = os.urandom(NAMESPACE_DIGEST_SIZE)
    keys = [PageKey(namespace, os.urandom(PAGE_HASH_SIZE)) for _ in range(volume // page_size)]
    singles = keys[:SINGLE_LOADS]
    moved = page_size * len(keys)
    task = progress.add_task(
        f"{tier.name}, {human_size(page_size)}", total=2 * len(keys) + len(singles)
    )
    memory = _memory(min(BATCH, moved))
    batches = list(_batches(keys, memory, page_size))
    pages = [Page(key, (memory[:page_size],)) for key in singles]
    spill = partial(_timed, tier, tier.spill, SpillResult.STORED, progress, task)
    load = partial(_timed, tier, tier.load, LoadResult.LOADED, progress, task)
    try:
        spilling = sum(map(spill, batches))
        cpu = time.process_time()
        loading = sum(map(load, batches))
        cpu = time.process_time() - cpu
        times = [load([page]) for page in pages]
    finally:
        tier.clear(namespace)
    return Measurement(
        tier.name,
        page_size,
        spill_gb_s=moved / spilling / 1e9,
        load_gb_s=moved / loading / 1e9,
        load_p50_s=statistics.median(times),
        load_p99_s=sorted(times)[int(0.99 * (len(times) - 1))],
        load_cpu_s_per_gb=cpu / moved * 1e9,
    )


def _memory(length: int) -> memoryview:
    """Return memory that is already allocated, in huge pages if possible."""
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, length, MIB):
        memory[offset : offset + MIB] = os.urandom(len(memory[offset : offset + MIB]))
    return memoryview(memory)


def _batches(keys: Sequence[PageKey], memory: memoryview, page_size: int) -> Iterator[list[Page]]:
    count = len(memory) // page_size
    buffers = [memory[i * page_size : (i + 1) * page_size] for i in range(count)]
    for first in range(0, len(keys), count):
        batch = keys[first : first + count]
        yield [Page(key, (buffer,)) for key, buffer in zip(batch, buffers, strict=False)]


def _timed(
    tier: Tier,
    call: Callable[[Sequence[Page], float], Sequence[IntEnum]],
    wanted: IntEnum,
    progress: Progress,
    task: TaskID,
    pages: Sequence[Page],
) -> float:
    """Spill or load pages; return the call's duration in seconds."""
    begin = time.perf_counter()
    results = call(pages, time.monotonic() + CALL_LIMIT)
    seconds = time.perf_counter() - begin
    _check_results(tier, results, wanted)
    progress.advance(task, len(pages))
    return seconds


def _check_results(tier: Tier, results: Sequence[IntEnum], wanted: IntEnum) -> None:
    for result in results:
        if result != wanted:
            raise click.ClickException(
                f"{tier.name}: a page was {result.name.lower()}, not {wanted.name.lower()}; "
                "run `memkv doctor`"
            )

"""The steps of the trial. Each returns what it found, or raises."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

Found = Mapping[str, Any]

GIB = 1 << 30
CALL = 128
"""Pages in one of SGLang's calls."""

LEAST_PAGES = 64
"""Pages of a host pool at least: SGLang takes a page's index for a layer's in one of its views."""


class Setting(NamedTuple):
    """Where and how much to measure."""

    device: str
    """Of torch; `cpu` only to test the trial itself."""
    directory: Path
    """On the disk to measure."""
    sglang: Path
    """Folder with SGLang's sources."""
    quick: bool

    @property
    def pool_bytes(self) -> int:
        """Size of a host pool."""
        return GIB // 4 if self.quick else 4 * GIB


def environment(setting: Setting) -> Found:
    """Describe the machine."""
    import torch

    from benchmarks.machine import machine, versions

    found = {**machine(), "versions": versions(), "torch": torch.__version__}
    if setting.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_gib"] = torch.cuda.get_device_properties(0).total_memory / GIB
        found["cuda"] = torch.version.cuda
    huge = Path("/sys/kernel/mm/transparent_hugepage")
    for name in ("enabled", "shmem_enabled"):
        if (huge / name).exists():
            found[f"huge_pages_{name}"] = (huge / name).read_text().strip()
    return found


def pools(setting: Setting) -> Found:
    """Allocate SGLang's host pools in huge pages, register them with CUDA, copy through them."""
    from tools.gpu_trial.stubs import import_host_pools

    import_host_pools(setting.sglang)
    from tools.gpu_trial.pools import KINDS, LAYOUTS

    cases = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
    return {f"{kind} {layout}": _pool(setting, kind, layout) for kind, layout in cases}


def _pool(setting: Setting, kind: str, layout: str) -> Found:
    from benchmarks.pool import huge_bytes
    from tools.gpu_trial.pools import back_up, load, ranges, registered

    began = time.perf_counter()
    with _both_pools(setting, kind, layout) as (device, pool, tokens):
        seconds = time.perf_counter() - began
        places = ranges(pool)
        total = sum(length for _, length in places)
        if setting.device == "cuda" and registered(pool) != total:
            raise AssertionError(f"SGLang registered {registered(pool)} of {total} bytes with CUDA")
        device.fill()
        expected = device.copies()
        back_up(kind, pool, tokens)
        device.wipe()
        load(kind, pool, tokens)
        _demand_equal(device.differing(expected), "after a copy to the host pool and back")
        pinned = (
            all(one.is_pinned() for one in _buffers(pool)) if setting.device == "cuda" else None
        )
        return {
            "bytes": total,
            "registered_bytes": registered(pool),
            "pinned": pinned,
            "huge_page_share": sum(huge_bytes(*place) for place in places) / total,
            "allocate_and_register_seconds": seconds,
            "layers_compared_on_the_device": len(expected),
            **_bandwidth(setting, pool),
        }


def _bandwidth(setting: Setting, pool: Any) -> Found:
    """Compare copies from the host pool to the device with copies from ordinary memory."""
    import torch

    source = _buffers(pool)[0].view(torch.uint8).flatten()
    target = torch.empty_like(source, device=setting.device)
    ordinary = torch.ones_like(source)

    def rate(memory: torch.Tensor) -> float:
        began = time.perf_counter()
        target.copy_(memory, non_blocking=True)
        if setting.device == "cuda":
            torch.cuda.synchronize()
        return len(source) / (time.perf_counter() - began) / 1e9

    rate(source)
    measured = [(rate(source), rate(ordinary)) for _ in range(3 if setting.quick else 7)]
    if not torch.equal(target.cpu(), ordinary):
        raise AssertionError("a copy to the device changed bytes")
    from_pool, from_ordinary = zip(*measured, strict=True)
    return {"to_device_gb_s": from_pool, "to_device_from_ordinary_memory_gb_s": from_ordinary}


def transfers(setting: Setting) -> Found:
    """Move pages from NVMe and MinIO through the host pool to the device; compare them there."""
    from tools.gpu_trial.stubs import import_host_pools

    import_host_pools(setting.sglang)
    from tools.gpu_trial.pools import KINDS

    found = {}
    for tier in ("nvme", "minio"):
        for kind in KINDS:
            with ExitStack() as stack:
                client = stack.enter_context(_agent(setting, tier))
                found[f"{tier} {kind}"] = _transfer(setting, client, tier, kind)
    return found


def _transfer(setting: Setting, client: Any, tier: str, kind: str) -> Found:
    from memkv_sglang.plugin.pools import SharedPool
    from memkv_sglang.testing.pages import make_chain, make_namespace
    from memkv_sglang.tiers.base import LoadResult, SpillResult
    from tools.gpu_trial.pools import PAGE_TOKENS, back_up, load

    with _both_pools(setting, kind, "page_first") as (device, pool, tokens):
        shared = SharedPool(pool, client)
        pages = len(tokens) // PAGE_TOKENS
        namespace = make_namespace(page_bytes=shared.page_bytes, model=f"trial-{kind}")
        client.describe(namespace)
        chain = make_chain(namespace, pages)
        device.fill()
        expected = device.copies()
        back_up(kind, pool, tokens)
        _demand_all(_in_calls(shared.spill, chain, tokens, ()), SpillResult.STORED, "spill")
        if not client.flush(120.0):
            raise AssertionError("the pages were not uploaded in time")
        loads, totals = [], []
        for _ in range(1 if setting.quick else 5):
            for buffer in _buffers(pool):
                buffer.zero_()
            device.wipe()
            began = time.perf_counter()
            loaded = _in_calls(shared.load, chain, tokens)
            loads.append(pages * shared.page_bytes / (time.perf_counter() - began) / 1e9)
            _demand_all([one.result for one in loaded], LoadResult.LOADED, "load")
            if {one.tier for one in loaded} != {tier}:
                raise AssertionError(f"pages came from {sorted({one.tier for one in loaded})}")
            load(kind, pool, tokens)
            _synchronize(setting)
            totals.append(pages * shared.page_bytes / (time.perf_counter() - began) / 1e9)
            _demand_equal(device.differing(expected), f"after a load from {tier}")
        return {
            "pages": pages,
            "page_bytes": shared.page_bytes,
            "load_gb_s": loads,
            "load_and_copy_by_layer_gb_s": totals,
            "layers_compared_on_the_device": len(expected),
        }


def _in_calls(move: Callable[..., Sequence[Any]], chain: Any, tokens: Any, *rest: Any) -> list[Any]:
    """Move the pages in calls of SGLang's size."""
    from memkv_sglang.page import Chain
    from tools.gpu_trial.pools import PAGE_TOKENS

    results: list[Any] = []
    for begin in range(0, len(chain.hashes), CALL):
        part = Chain(chain.namespace, chain.hashes[begin : begin + CALL])
        slots = tokens[begin * PAGE_TOKENS : (begin + len(part.hashes)) * PAGE_TOKENS]
        results += move(part, slots, *rest, until=time.monotonic() + 60.0)
    return results


@contextmanager
def _agent(setting: Setting, tier: str) -> Iterator[Any]:
    from benchmarks.servers import agent, minio
    from memkv_sglang.config.schema import NvmeConfig

    with ExitStack() as stack:
        if tier == "nvme":
            scratch = tempfile.TemporaryDirectory(dir=setting.directory, prefix="memkv-trial-")
            pages = str(Path(stack.enter_context(scratch)) / "pages")
            config = NvmeConfig(directory=pages, capacity=2 * setting.pool_bytes)
            yield stack.enter_context(agent(nvme=config)).client
        else:
            server = stack.enter_context(minio(setting.directory))
            yield stack.enter_context(agent(minio=server.config("trial"))).client


@contextmanager
def _both_pools(setting: Setting, kind: str, layout: str) -> Iterator[tuple[Any, Any, Any]]:
    """Yield device pool, host pool, and the tokens of both."""
    import torch

    from tools.gpu_trial.pools import KINDS, PAGE_TOKENS, DevicePool, host_pool

    pages = max(setting.pool_bytes // KINDS[kind].page_bytes, LEAST_PAGES)
    count = pages * PAGE_TOKENS
    device = DevicePool(KINDS[kind], count, setting.device)
    with host_pool(kind, layout, device, count) as pool:
        yield device, pool, torch.arange(count)
        _synchronize(setting)


def _buffers(pool: Any) -> list[Any]:
    return list(pool.kv_buffer) if isinstance(pool.kv_buffer, list | tuple) else [pool.kv_buffer]


def _synchronize(setting: Setting) -> None:
    import torch

    if setting.device == "cuda":
        torch.cuda.synchronize()


def _demand_all(results: Sequence[Any], expected: Any, what: str) -> None:
    if set(results) != {expected}:
        raise AssertionError(f"{what}: {sorted(set(results))}")


def _demand_equal(differing: int, when: str) -> None:
    if differing:
        raise AssertionError(f"{differing} layers on the device differ {when}")


def gpu(setting: Setting) -> Found:
    """Run `benchmarks gpu`: loads that overlap with copies to the device, next to fio."""
    from benchmarks import gpu as benchmark
    from benchmarks.report import Report

    report = Report("gpu", "GB/s")
    benchmark.measure(report, _options(setting), setting.device, setting.pool_bytes // 4)
    return _document(report)


def node(setting: Setting) -> Found:
    """Run `benchmarks node`."""
    from benchmarks.node.run import run

    return _document(run(_options(setting)))


def _options(setting: Setting) -> Any:
    from benchmarks.base import Options

    return Options(setting.directory, 1 if setting.quick else 3, setting.quick)


def _document(report: Any) -> Found:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "report.json"
        report.write(file)
        document = json.loads(file.read_text())
    return {name: document[name] for name in ("figures", "runs", "left_out", "notes")}


STEPS: Mapping[str, Callable[[Setting], Found]] = {
    "environment": environment,
    "pools": pools,
    "transfers": transfers,
    "gpu": gpu,
    "node": node,
}
"""In the order in which they run."""


def sglang_sources() -> Path:
    """Return the folder with SGLang's sources, in the archive or installed."""
    packed = os.environ.get("MEMKV_TRIAL_SGLANG")
    if packed:
        return Path(packed)
    from importlib.util import find_spec

    found = find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("SGLang's sources are missing; run the trial from its archive")
    return Path(found.submodule_search_locations[0]).parent

"""fio: what this disk gives with the same block size, depth and kind of memory."""

import json
import os
import subprocess
from pathlib import Path

from benchmarks.base import tool
from memkv_sglang.shared_memory import HUGE_PAGE

HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Has malloc ask for huge pages by madvise: fio's own ways need pages reserved by root."""


def fio(file: Path, mode: str, block: int, total: int, depth: int, *, huge: bool) -> float:
    """Return GB/s of `mode` (read, write) over a file that is there, in blocks of `block` bytes.

    One process, io_uring, O_DIRECT, overwriting in place. `huge`: its buffers lie in transparent
    huge pages, which takes memory aligned to them; else in shared memory of 4 KiB pages, as a memfd
    has. Raises `MissingToolError`.
    """
    memory = ["--iomem=malloc", f"--iomem_align={HUGE_PAGE}"] if huge else ["--iomem=mmapshared"]
    command = [
        tool("fio"),
        "--name=limit",
        f"--filename={file}",
        f"--rw={mode}",
        f"--bs={block}",
        f"--size={total}",
        f"--iodepth={depth}",
        *memory,
        "--ioengine=io_uring",
        "--direct=1",
        "--overwrite=1",
        "--output-format=json",
    ]
    environment = {**os.environ, **(HUGE if huge else {})}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job[mode]["bw_bytes"]) / 1e9

"""fio: the disk's throughput with the same block size, depth and kind of memory."""

import json
import os
import subprocess
from pathlib import Path

from benchmarks.base import tool
from memkv_sglang.shared_memory import HUGE_PAGE

HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Makes malloc ask for huge pages by madvise. fio's own options need pages that root has reserved.
"""


def fio(file: Path, mode: str, block: int, total: int, depth: int, *, huge: bool) -> float:
    """Return the GB/s of `mode` (read, write) on an existing file, in blocks of `block` bytes.

    fio runs as one process with io_uring and O_DIRECT, and overwrites in place. With `huge`, its
    buffers are in transparent huge pages; otherwise in shared memory with pages of 4 KiB, like a
    memfd. Raises `MissingToolError`.
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

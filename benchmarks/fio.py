"""fio: what this disk gives with the same block size, depth and kind of memory."""

import json
import shutil
import subprocess
from pathlib import Path


class MissingToolError(Exception):
    """A program that the benchmark compares with is not installed."""


def fio(file: Path, mode: str, block: int, total: int, depth: int, *, huge: bool) -> float:
    """Return GB/s of `mode` (read, write) over a file that is there, in blocks of `block` bytes."""
    command = [
        tool("fio"),
        "--name=limit",
        f"--filename={file}",
        f"--rw={mode}",
        f"--bs={block}",
        f"--size={total}",
        f"--iodepth={depth}",
        f"--iomem={'mmap' if huge else 'mmapshared'}",
        "--ioengine=io_uring",
        "--direct=1",
        "--overwrite=1",
        "--output-format=json",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    job = json.loads(output[output.index("{") :])["jobs"][0]
    return float(job[mode]["bw_bytes"]) / 1e9


def tool(name: str) -> str:
    """Return the path of a program. Raises `MissingToolError`."""
    path = shutil.which(name)
    if path is None:
        raise MissingToolError(f"{name} is missing; install it: apt-get install {name}")
    return path

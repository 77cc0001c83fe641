"""An agent that counts its CPU time with and without the GIL held, started like a real agent."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

from benchmarks.node.compiled import library
from memkv_sglang.agent.launched import run_launched

COUNTS = "BENCHMARK_LOCK_COUNTS"
"""Environment variable with the path of the file that holds the counts."""

PERIOD = 1000
"""Requested microseconds of CPU time between two samples. The kernel's tick is the lower limit."""


def start_counting(file: Path) -> None:
    """Count all samples, and those with the GIL held, in a file of two longs."""
    with file.open("r+b") as opened:
        memory = mmap.mmap(opened.fileno(), mmap.PAGESIZE)
    counts = (ctypes.c_long * 2).from_buffer(memory)
    if library("lock").start_counting(counts, ctypes.c_long(PERIOD)):
        raise OSError("the kernel has no timer for CPU time")
    start_counting.keep = counts  # type: ignore[attr-defined]  # as long as the process


if __name__ == "__main__":
    text = sys.stdin.buffer.read()
    if os.fork():  # Become a daemon: the starter waits only for this process.
        os._exit(0)
    start_counting(Path(os.environ[COUNTS]))
    sys.exit(run_launched(text, int(sys.argv[1])))

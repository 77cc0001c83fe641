import subprocess
import sys
import uuid
from pathlib import Path

import pytest

pytest.importorskip("sglang_cpu_platform", reason="needs the distribution in cpu-platform/")

from memkv_sglang.demo.server import shared_memory_of

MAP_A_FILE = """
import mmap, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_shared_memory_of_a_group_is_found() -> None:
    path = Path(f"/dev/shm/memkv-test-{uuid.uuid4().hex}")
    process = subprocess.Popen(
        [sys.executable, "-c", MAP_A_FILE, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "mapped\n"
            assert shared_memory_of(process.pid) == {path}
            assert process.stdin is not None
            process.stdin.close()
        assert shared_memory_of(process.pid) == set()
    finally:
        path.unlink(missing_ok=True)

"""The agent raises the limits that it may raise, and names the others."""

import subprocess
import sys
from pathlib import Path

import pytest

from memkv_sglang.agent.limits import DESCRIPTORS, missing_disk_requests

PROGRAM = """
import os, resource
from memkv_sglang.agent.limits import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)  # root may exceed the limit
print(raise_descriptor_limit())
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def raised(hard: int) -> list[str]:
    program = PROGRAM.format(hard=hard)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_open_files_are_raised_to_what_the_system_allows() -> None:
    problem, limits = raised(1000)
    assert limits == "1000 1000"
    assert "allows 1000 open files" in problem
    assert "ulimit -n" in problem


def test_enough_open_files_are_no_problem() -> None:
    assert raised(DESCRIPTORS) == ["", f"{DESCRIPTORS} {DESCRIPTORS}"]


@pytest.mark.parametrize(("used", "is_low"), [(0, False), (65_000, True)])
def test_few_disk_requests_left_are_reported(tmp_path: Path, used: int, is_low: bool) -> None:
    (tmp_path / "aio-max-nr").write_text("65536\n")
    (tmp_path / "aio-nr").write_text(f"{used}\n")
    problem = missing_disk_requests(tmp_path)
    assert ("536 of 65536" in problem and "sysctl" in problem) if is_low else problem == ""


def test_a_system_without_aio_is_no_problem(tmp_path: Path) -> None:
    assert missing_disk_requests(tmp_path) == ""

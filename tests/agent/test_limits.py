"""The agent raises the limits that it may raise, and names the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memkv_sglang.agent.limits import (
    DESCRIPTORS,
    missing_cpus,
    missing_disk_requests,
    raise_disk_request_limit,
)

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


def test_the_limit_of_disk_requests_is_raised_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "aio-max-nr").write_text("65536\n")
    (tmp_path / "aio-nr").write_text("65000\n")
    assert raise_disk_request_limit(tmp_path) == ""
    assert (tmp_path / "aio-max-nr").read_text() == f"{1 << 20}\n"


def test_enough_disk_requests_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "aio-max-nr").write_text("65536\n")
    (tmp_path / "aio-nr").write_text("0\n")
    assert raise_disk_request_limit(tmp_path) == ""
    assert (tmp_path / "aio-max-nr").read_text() == "65536\n"


UNPRIVILEGED = """
import os
from memkv_sglang.agent import limits
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
limits.REQUESTS = 1 << 60  # more than any system has
print(limits.raise_disk_request_limit())
"""


def test_a_limit_that_this_user_cannot_raise_is_reported() -> None:
    before = Path("/proc/sys/fs/aio-max-nr").read_text()
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED], capture_output=True, text=True, check=True
    )
    assert "sysctl -w fs.aio-max-nr=" in done.stdout
    assert Path("/proc/sys/fs/aio-max-nr").read_text() == before


def cpu_limit(folder: Path, outer: str, inner: str) -> str:
    """Return the warning of a process in a cgroup within another."""
    (folder / "cgroup").write_text("1:cpu:/old\n0::/outer/inner\n")
    (folder / "outer" / "inner").mkdir(parents=True)
    (folder / "outer" / "cpu.max").write_text(outer)
    (folder / "outer" / "inner" / "cpu.max").write_text(inner)
    return missing_cpus(folder, folder)


@pytest.mark.parametrize("limits", [("50000 100000", "max 100000"), ("max 100000", "50000 100000")])
def test_the_smallest_cpu_quota_around_the_process_is_reported(
    tmp_path: Path, limits: tuple[str, str]
) -> None:
    assert f"allows 0.5 of {os.cpu_count()} CPUs" in cpu_limit(tmp_path, *limits)


def test_cpus_that_the_process_may_not_use_are_reported(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        problem = missing_cpus(tmp_path, tmp_path)
    finally:
        os.sched_setaffinity(0, allowed)
    count = os.cpu_count()
    assert (f"allows 1 of {count} CPUs" in problem) == (count != 1)


def test_without_a_limit_nothing_is_reported(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) == os.cpu_count():
        assert cpu_limit(tmp_path, "max 100000", "max 100000") == ""

"""Fixtures that several folders of tests use, and how the suite is split between workers.

Three workers run the suite (`make test`), on two cores, because tests often wait. The tests of
`tests/serving` share SGLang servers, so they all run in one worker, from the start; any other
module runs as a whole in one worker.
"""

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from memkv_testbed.minio_server import MinioServer
from sglang_cpu_platform.fork_server import ForkServers
from typing_extensions import override

from memkv_sglang.agent import paths
from memkv_sglang.config import load
from memkv_sglang.config.schema import MinioConfig

# No test depends on timing, and the machine may be busy.
settings.register_profile("memkv", deadline=None)
settings.load_profile("memkv")

# Neither this process nor those it starts read this machine's configuration files.
os.environ["MEMKV_CONFIG"] = ""
load.SYSTEM_FILE = Path("/nonexistent/memkv/config.toml")
paths.SERVICE_DIRECTORY = Path("/nonexistent/memkv")

# A script's background job and its children ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def minio_server() -> Iterator[MinioServer]:
    """A real MinIO for the whole run; tests that stop or kill a server start their own.

    It gets hundreds of buckets, which its scanner would visit again and again.
    """
    with MinioServer(env={"MINIO_SCANNER_SPEED": "slowest"}) as server:
        yield server


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServers]:
    """Start SGLang servers as forks; most tests are not about how a server starts."""
    forks = ForkServers()
    yield forks
    forks.close()


@pytest.fixture
def minio_config(minio_server: MinioServer) -> MinioConfig:
    """Settings for a bucket of the test's own, which does not exist yet."""
    return MinioConfig(
        endpoint=minio_server.endpoint,
        bucket=f"test-{uuid.uuid4().hex}",
        access_key=minio_server.access_key,
        secret_key=minio_server.secret_key,
    )


ONE_GROUP = {
    "serving": "servers",
    "cpu_platform/test_cpu_server.py": "servers",
    "plugin/test_storage_server.py": "servers",
    "packaging": "packaging",
}
"""Folders and modules whose tests run in one worker, because they share SGLang servers or built
archives, which take long to make. Two sets of SGLang servers would not fit into the memory."""

FIRST = ("serving", "demo", "cpu_platform")
"""Folders with the longest modules. If one of them came last, one worker would wait for the other.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if a test is skipped")


@pytest.hookimpl(tryfirst=True)  # before pytest selects tests by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _folder(item) == "serving":
            item.add_marker(pytest.mark.serving)
    rank = {folder: place for place, folder in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(_folder(item), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule by group. xdist 3.8 ignores its own marker for that with pytest 9."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        @override
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0].removeprefix("tests/")
            return ONE_GROUP.get(module) or ONE_GROUP.get(module.partition("/")[0]) or module

    return ByGroup(config, log)


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter and reporter.stats.get("skipped"):
        reporter.write_line("skipped tests count as failures here (--no-skips)", red=True)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

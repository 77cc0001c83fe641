"""Servers that the tests of this folder share, because starting one takes most of a minute."""

import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from memkv_testbed.minio_server import MinioServer
from sglang_cpu_platform import tiny_model
from sglang_cpu_platform.fork_server import ForkServers
from sglang_cpu_platform.server import CpuServer

from memkv_sglang.config.schema import MinioConfig
from tests.patching.patched_copy import environment_of, make_patched_copy, sglang_under_test
from tests.serving.node import DEVICE_TOKENS, NEW_TOKENS, Node, Tokens, libraries, start_all


class Recompute(Protocol):
    """Asks a server that has no cache of any kind."""

    def __call__(self, tokens: Tokens, new_tokens: int = ...) -> list[int]: ...


class Models(NamedTuple):
    mha: Path
    mha_tuned: Path
    """The same architecture with other weights."""
    mla: Path
    swa: Path
    """Every other layer has a sliding window of `tiny_model.WINDOW` tokens."""
    red: Path
    blue: Path
    """`red` and `blue` are adapters for `mha`."""
    adapter: Path
    """The path that servers load as `adapter` when they start; a copy of `red` at first."""


def lora_arguments(adapter: Path) -> list[str]:
    """Return the arguments of a server that has one adapter, by the name of `adapter`."""
    return [
        *("--enable-lora", "--lora-backend", "torch_native"),
        *("--max-lora-rank", "8", "--lora-target-modules", "all"),
        *("--lora-paths", f"adapter={adapter}"),
    ]


LOG_TAIL = 6000
"""Characters of each log that a failure shows; the log files themselves are removed."""

_homes: list[Path] = []


@pytest.fixture(scope="session")
def home(forks: ForkServers) -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    Node.forks = forks
    with tempfile.TemporaryDirectory(prefix="memkv-") as directory:
        _homes.append(Path(directory))
        yield Path(directory)
        _homes.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the last log lines of servers and agents to a failure."""
    report = yield
    if report.failed:
        for log in sorted(path for home in _homes for path in home.rglob("*.log")):
            report.sections.append((str(log), log.read_text(errors="replace")[-LOG_TAIL:]))
    return report


@pytest.fixture(scope="session")
def models(home: Path) -> Models:
    models = Models(*(home / "models" / name for name in Models._fields))
    tiny_model.make(models.mha, "mha")
    tiny_model.make(models.mha_tuned, "mha", seed=1)
    tiny_model.make(models.mla, "mla")
    tiny_model.make(models.swa, "swa")
    tiny_model.make_lora(models.red, seed=1)
    tiny_model.make_lora(models.blue, seed=2)
    shutil.copytree(models.red, models.adapter)
    return models


@pytest.fixture(scope="session")
def storage() -> Iterator[MinioServer]:
    """The MinIO of all these nodes; some tests stop it and start it again."""
    with MinioServer() as server:
        yield server


@pytest.fixture(scope="session")
def shared(storage: MinioServer) -> MinioConfig:
    return MinioConfig(
        endpoint=storage.endpoint,
        bucket="pages",
        access_key=storage.access_key,
        secret_key=storage.secret_key,
    )


@pytest.fixture(scope="session")
def patched(home: Path) -> dict[str, str]:
    """Return the environment of a server that runs a patched SGLang, without the plugin."""
    return sglang_under_test() or environment_of(make_patched_copy(home / "sglang"))


class Cluster(NamedTuple):
    a: Node
    """SGLang with the plugin, unless `patched_copy.WANTED` is set."""
    b: Node
    """SGLang with the patches, enabled by the backend's name instead of the flag."""
    recompute: Recompute
    """Asks a server that has no cache of any kind."""


@pytest.fixture(scope="session")
def recompute(home: Path, models: Models, forks: ForkServers) -> Iterator[Recompute]:
    """Ask a server that has neither the tier nor a radix cache. The first call waits for it."""
    plain = CpuServer(
        models.mha,
        log=home / "plain.log",
        max_total_tokens=DEVICE_TOKENS,
        extra=["--disable-radix-cache"],
        env=libraries(home),
        forks=forks,
    )
    ready = False

    def recompute(tokens: Tokens, new_tokens: int = NEW_TOKENS) -> list[int]:
        nonlocal ready
        if not ready:
            plain.wait_ready()
            ready = True
        return plain.client.generate(tokens, max_new_tokens=new_tokens).output_ids

    try:
        plain.start()
        yield recompute
    finally:
        plain.kill()


@pytest.fixture(scope="session")
def cluster(
    home: Path, models: Models, shared: MinioConfig, patched: dict[str, str], recompute: Recompute
) -> Iterator[Cluster]:
    """Two nodes on one MinIO, and a server with neither the tier nor a radix cache."""
    lora = lora_arguments(models.adapter)
    by_name = ("--hicache-storage-backend", "memkv")
    a = Node("a", home, shared, models.mha, extra=lora)
    b = Node("b", home, shared, models.mha, extra=lora, env=patched, enable=by_name)
    with ExitStack() as stack:
        stack.callback(a.close)
        stack.callback(b.close)
        start_all(a, b)
        yield Cluster(a, b, recompute)

"""Agent processes on a page directory, its disk usage, and mounts."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from memkv_testbed.host_pool import HostPool

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import AgentConfig, Config
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import LoadResult, SpillResult
from tests.agent.agent_harness import LIMIT, RawClient, eventually

PAGE = 16 << 10
NAMESPACE = make_namespace(PAGE)
PAGES = 40
"""Pages of a chain."""


def chains(name: str, count: int, pages: int = PAGES) -> list[Chain]:
    return [make_chain(NAMESPACE, pages, f"{name}{i}") for i in range(count)]


def disk_usage(path: Path) -> int:
    """Return the disk space used by all files below a directory."""
    total = 0
    for file in path.rglob("*"):
        # The agent has renamed or removed the file in the meantime.
        with suppress(FileNotFoundError):
            total += 0 if file.is_dir() else file.lstat().st_blocks * 512
    return total


class Agent:
    """An agent process on a page directory, and a client with one pool."""

    def __init__(
        self, home: Path, directory: Path, *, descriptors: int = 0, segment_size: str = "2MiB"
    ) -> None:
        self.home = home
        self.log = home / "log"
        self.home.mkdir(mode=0o700, exist_ok=True)
        socket = home / "run" / "agent.sock"
        socket.parent.mkdir(mode=0o700, exist_ok=True)
        flags = {"capacity": "32MiB", "segment-size": segment_size, "directory": str(directory)}
        command = [
            sys.executable,
            "-P",
            "-c",
            "import sys; from memkv_sglang.cli.main import main; sys.exit(main())",
            "agent",
            f"--agent-socket={socket}",
            "--agent-http-port=0",
            *(f"--nvme-{name}={value}" for name, value in flags.items()),
        ]

        def limit() -> None:
            if descriptors:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=limit,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            )
        self.socket = socket

    def connect(self) -> None:
        eventually(self._greets)
        self.client = AgentClient(
            Config(agent=AgentConfig(socket=str(self.socket))), start=False, limit=8.0
        )
        assert self.client.wait(LIMIT), self.client.problem
        self.pool = HostPool(PAGES, PAGE, parts=1)
        self.number = self.client.register_pool(self.pool.descriptor, self.pool.length)
        self.client.describe(NAMESPACE)

    def _greets(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            with RawClient(self.socket) as raw:
                raw.greet()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def spill(self, chain: Chain) -> set[SpillResult]:
        self.pool.fill(chain)
        return set(
            self.client.spill(chain, self.pool.buffers(self.number, range(len(chain.hashes))))
        )

    def loaded(self, chain: Chain) -> int:
        """Load a chain and return how many pages were loaded; fail on wrong content."""
        self.pool.wipe()
        answers = self.client.load(chain, self.pool.buffers(self.number, range(len(chain.hashes))))
        wrong = set(self.pool.wrong(chain))
        came = [i for i, a in enumerate(answers) if a.result == LoadResult.LOADED]
        assert not wrong.intersection(came)
        return len(came)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(LIMIT)


@contextmanager
def agent(
    home: Path, directory: Path, *, descriptors: int = 0, segment_size: str = "2MiB"
) -> Iterator[Agent]:
    """Run an agent, and kill it at the end."""
    running = Agent(home, directory, descriptors=descriptors, segment_size=segment_size)
    try:
        running.connect()
        yield running
        running.client.close()
    finally:
        running.kill()


@contextmanager
def mounted(arguments: Sequence[str], at: Path) -> Iterator[None]:
    """Mount something for the block; skip the test if that is not permitted."""
    done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)

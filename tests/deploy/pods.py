"""Containers without a container engine: processes in separate pid, mount and user namespaces.

A pod runs `python -m tests.deploy.pods agent|server SOCKET`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memkv_sglang.agent.lifetime import LifetimeMemory
from memkv_sglang.agent.main import run
from memkv_sglang.agent.supervisor import KILL, ask, supervise
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import AgentConfig, Config
from memkv_sglang.testing.pages import make_chain
from tests.agent.agent_for_tests import build
from tests.agent.agent_harness import LIMIT, NAMESPACE, HostPool, environment

PAGES = 8
FILLER = 0xEE
"""The byte with which a server fills its pages once they are free again."""


class Pod:
    """A process in separate namespaces, and the init of its pid namespace. `kill` ends both."""

    def __init__(self, kind: str, socket: Path, *options: str, behaviour: str = "0") -> None:
        unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount"]
        unshare += ["--mount-proc", "--kill-child"]
        python = [sys.executable, "-P", "-m", "tests.deploy.pods"]
        self._process = subprocess.Popen(
            [*unshare, *python, kind, str(socket), *options],
            env={**os.environ, **environment(behaviour)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: str) -> Any:
        """Send a request to a server and return its answer."""
        self.send(request)
        return self.answer()

    def send(self, request: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the pod has ended"
        return json.loads(line)

    def init(self) -> int:
        """Return the process that is pid 1 in the pod."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return int(children.read_text().split()[0])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Send SIGTERM to the pod's init, as kubelet does; return the exit status."""
        os.kill(self.init(), signal.SIGTERM)
        return self._process.wait(LIMIT)

    def wait(self) -> int:
        return self._process.wait(LIMIT)


@contextmanager
def pod(kind: str, socket: Path, *options: str, behaviour: str = "0") -> Iterator[Pod]:
    started = Pod(kind, socket, *options, behaviour=behaviour)
    try:
        yield started
    finally:
        started.kill()
        for stream in (started._process.stdin, started._process.stdout):
            if stream is not None:
                stream.close()


def run_agent(socket: str, *options: str) -> int:
    config = Config(agent=AgentConfig(socket=socket))

    def serve(lifetime: LifetimeMemory | None) -> int:
        return run(config, build=build, lifetime=lifetime)

    return serve(None) if "--alone" in options else supervise(Path(socket), serve)


class ServerPod:
    """Stands in for an SGLang server; owns a host pool."""

    def __init__(self, socket: str, limit: float) -> None:
        config = Config(agent=AgentConfig(socket=socket, autostart=False))
        self._path = Path(socket)
        self._client = AgentClient(config, start=True, limit=limit)
        self._pool = HostPool(PAGES)
        self._chain = make_chain(NAMESPACE, PAGES)
        self._number = self._client.register_pool(self._pool.descriptor, self._pool.length)

    def connect(self) -> str:
        return "" if self._client.wait(LIMIT) else self._client.problem

    def problem(self) -> str:
        return self._client.problem

    def spill(self) -> list[str]:
        self._pool.fill(self._chain)
        buffers = self._pool.buffers(self._number, range(PAGES))
        results = [result.name for result in self._client.spill(self._chain, buffers)]
        self._pool.wipe()
        return results

    def load(self) -> list[str]:
        buffers = self._pool.buffers(self._number, range(PAGES))
        return [load.result.name for load in self._client.load(self._chain, buffers)]

    def holds(self) -> bool:
        return self._pool.holds(self._chain)

    def withholding(self) -> bool:
        return self._client.withholding

    def overwrite(self) -> None:
        """Fill the pages with other data."""
        for page in range(PAGES):
            for view in self._pool.views(page):
                view[:] = bytes([FILLER]) * len(view)

    def overwritten(self) -> bool:
        """Return whether the pages still contain what `overwrite` wrote."""
        return all(
            bytes(view) == bytes([FILLER]) * len(view)
            for page in range(PAGES)
            for view in self._pool.views(page)
        )

    def kill_other_agent(self) -> bool:
        """Ask the supervisor to kill an agent that is not its child."""
        other = LifetimeMemory()
        return ask(self._path, KILL, other.descriptor, LIMIT)


def run_server(socket: str, *options: str) -> int:
    server = ServerPod(socket, float(options[0]) if options else LIMIT)
    for line in sys.stdin:
        print(json.dumps(getattr(server, line.strip())()), flush=True)
    return 0


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    sys.exit({"agent": run_agent, "server": run_server}[kind](*arguments))

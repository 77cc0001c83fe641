"""Helpers that run a node for commands: an agent, with pages in its tiers."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from memkv_testbed.host_pool import HostPool

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import Config
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_namespace

LIMIT = 30.0
PAGE = 64 << 10
PAGES = 12


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


def start(
    environ: dict[str, str],
    *arguments: str,
    stdout: int | None = None,
    stderr: IO[str] | int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    program = "import sys; from memkv_sglang.cli.main import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **environ},
        stdout=stdout or subprocess.DEVNULL,
        stderr=stderr,
        text=True,
    )


@contextmanager
def running_agent(environ: dict[str, str], log: Path = Path(os.devnull)) -> Iterator[AgentClient]:
    """Run `memkv agent`, which logs to `log`, during the context; yields a connected client."""
    with log.open("w") as stderr:
        process = start(environ, "agent", stderr=stderr)
    client = AgentClient(config_of(environ), start=False)
    try:
        assert client.wait(LIMIT), client.problem
        yield client
    finally:
        client.close()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT)


def config_of(environ: dict[str, str]) -> Config:
    return load_config(None, environ, {})


def spill_chain(client: AgentClient) -> Chain:
    """Store a chain of `PAGES` pages of `PAGE` bytes in both tiers."""
    namespace = make_namespace(PAGE)
    chain = make_chain(namespace, PAGES)
    with HostPool(PAGES, PAGE, parts=1) as pool:
        pool.fill(chain)
        number = client.register_pool(pool.descriptor, pool.length)
    client.describe(namespace)
    results = client.spill(chain, pool.buffers(number, range(PAGES)))
    assert {result.name for result in results} == {"STORED"}
    assert client.flush(LIMIT)
    assert client.lookup(chain).length == PAGES
    return chain

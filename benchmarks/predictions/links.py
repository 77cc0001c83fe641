"""Four agents that share a MinIO server over shaped links: predicted, then measured."""

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from memkv_testbed.minio_server import MinioServer

from benchmarks.pool import HostPool
from benchmarks.predictions.network import Machine, inside, network
from benchmarks.servers import agent
from benchmarks.through_agent import PagesThroughAgent
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import MIB, MinioConfig
from memkv_sglang.planning.calibration import Measured, Published, fit_cpu
from memkv_sglang.planning.events import EventLoop
from memkv_sglang.planning.fabric import Fabric

PAGE = MIB
PAGES = 16
"""Pages of a session's chain."""

AGENTS = 4
SERVER_LINK = 800
"""Mb/s of MinIO's link."""
CORES = 2.0
"""Cores that the agents and MinIO share."""

LINKS = {"four equal links": (400, 400, 400, 400), "one narrow link": (400, 400, 400, 100)}
"""Mb/s of each agent's link."""

SESSIONS = 3
"""Sessions of an agent."""
THINK = 1.5
"""Mean think time in seconds; exponential."""

Method = Literal["load", "spill"]


class Load(NamedTuple):
    """What a session does in one case."""

    agent: int
    thinks: Sequence[float]
    """Seconds before each call."""


class Case(NamedTuple):
    """Calls of several sessions, each of which moves a chain of `PAGES` pages per call."""

    name: str
    links: tuple[int, ...]
    method: Method
    sessions: Sequence[Load]
    is_hot: bool = False
    """Whether all sessions move the same chain."""


def cases(*, quick: bool) -> list[Case]:
    """Return every case."""
    calls = 5 if quick else 20
    equal, narrow = LINKS.values()
    rng = random.Random(7)
    thinking = [
        Load(number % AGENTS, [rng.expovariate(1 / THINK) for _ in range(calls)])
        for number in range(AGENTS * SESSIONS)
    ]
    busy = [0.0] * calls
    four = [Load(each, busy) for each in range(AGENTS)]
    return [
        Case("one agent loads", equal, "load", [Load(0, busy)]),
        Case("two agents load", equal, "load", [Load(each, busy) for each in range(2)]),
        Case("four agents load", equal, "load", four),
        Case("four agents load the same pages", equal, "load", four, is_hot=True),
        Case("four load, one over a narrow link", narrow, "load", four),
        Case("four agents upload", narrow, "spill", four),
        Case("twelve sessions think and load", equal, "load", thinking),
    ]


def predict(case: Case, numbers: Published, machine: Measured) -> list[list[float]]:
    """Return the seconds of each call of each session."""
    loop = EventLoop()
    fabric = Fabric(loop)
    client, server = fit_cpu(machine.client_load), fit_cpu(machine.server_get)
    if case.method == "spill":
        server = fit_cpu(machine.server_put)
    cpu = client.per_byte_at(PAGE) + server.per_byte_at(PAGE)
    share = numbers.node.link_share.value
    cores = fabric.add_link("cores", CORES)
    shared = fabric.add_link("MinIO's link", SERVER_LINK * 1e6 / 8 * share)
    routes = [
        fabric.add_route(
            {cores: cpu, shared: 1.0, fabric.add_link(f"link {i}", rate * 1e6 / 8 * share): 1.0}
        )
        for i, rate in enumerate(case.links)
    ]
    seconds: list[list[float]] = [[] for _ in case.sessions]

    def think(number: int) -> None:
        session = case.sessions[number]
        if len(seconds[number]) < len(session.thinks):
            loop.after(session.thinks[len(seconds[number])], partial(call, number))

    def call(number: int) -> None:
        route = routes[case.sessions[number].agent]
        fabric.send(route, PAGES * PAGE, partial(done, number, loop.now))

    def done(number: int, began: float) -> None:
        seconds[number].append(loop.now - began)
        think(number)

    for number in range(len(case.sessions)):
        think(number)
    loop.run(1e6)
    return seconds


class Cluster:
    """Real agents in network namespaces, and a MinIO in another one."""

    def __init__(
        self, agents: Sequence[Sequence[PagesThroughAgent]], hot: Sequence[PagesThroughAgent]
    ) -> None:
        """Take the chains of each agent's sessions, and one chain that all agents load.

        All are stored in MinIO.
        """
        self._agents = agents
        self._hot = hot

    @classmethod
    @contextmanager
    def open(cls, directory: Path, links: Sequence[int]) -> Iterator["Cluster"]:
        """Start everything. Raises `MissingToolError`."""
        with ExitStack() as stack:
            scratch = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(dir=directory, prefix="memkv-bench-")
                )
            )
            server, *machines = stack.enter_context(network([SERVER_LINK, *links]))
            with inside(server.namespace):
                minio = stack.enter_context(MinioServer(scratch / "minio", host=server.address))
            clients = [_start(stack, machine, minio) for machine in machines]
            hot = [_chain(stack, client, "hot") for client in clients]
            hot[0].spill()
            yield cls([_sessions(stack, client, f"{i}") for i, client in enumerate(clients)], hot)

    def measure(self, case: Case) -> list[list[float]]:
        """Return the seconds of each call of each session."""
        chains = [iter(chains) for chains in self._agents]
        pairs = [
            (session, self._hot[session.agent] if case.is_hot else next(chains[session.agent]))
            for session in case.sessions
        ]
        with ThreadPoolExecutor(len(pairs)) as pool:
            return list(pool.map(lambda pair: _run(case.method, *pair), pairs))


def _run(method: Method, session: Load, chain: PagesThroughAgent) -> list[float]:
    seconds = []
    for think in session.thinks:
        time.sleep(think)
        if method == "spill":
            chain.renew()
        began = time.perf_counter()
        getattr(chain, method)()
        seconds.append(time.perf_counter() - began)
    return seconds


def _start(stack: ExitStack, machine: Machine, minio: MinioServer) -> AgentClient:
    config = MinioConfig(
        endpoint=minio.endpoint,
        bucket="predictions",
        access_key=minio.access_key,
        secret_key=minio.secret_key,
        stall_timeout=5.0,  # a call shares a narrow link with others
    )
    with inside(machine.namespace):
        return stack.enter_context(agent(minio=config)).client


def _sessions(stack: ExitStack, client: AgentClient, name: str) -> list[PagesThroughAgent]:
    chains = [_chain(stack, client, f"{name} {number}") for number in range(SESSIONS)]
    for chain in chains:
        chain.spill()
    return chains


def _chain(stack: ExitStack, client: AgentClient, name: str) -> PagesThroughAgent:
    pool = stack.enter_context(HostPool(PAGES, PAGE))
    pool.fill()
    return PagesThroughAgent(client, pool, name)

"""The agent process: start, serve, stop."""

import asyncio
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from memkv_sglang import __version__
from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.agent.calls import Calls
from memkv_sglang.agent.http_server import HttpServer
from memkv_sglang.agent.lifetime import LifetimeMemory
from memkv_sglang.agent.limits import (
    missing_cpus,
    raise_descriptor_limit,
    raise_disk_request_limit,
)
from memkv_sglang.agent.listener import Listener
from memkv_sglang.agent.log import configure_logging
from memkv_sglang.agent.log_file import limit_log
from memkv_sglang.agent.paths import agent_log, socket_path
from memkv_sglang.agent.placement import set_oom_score
from memkv_sglang.agent.protocol import AgentStatus
from memkv_sglang.agent.server import Server
from memkv_sglang.agent.service_manager import ServiceManager
from memkv_sglang.agent.sessions import Sessions
from memkv_sglang.agent.stopping import STOP_SIGNALS, StoppedError, interrupt_at_signal
from memkv_sglang.config.errors import BrokenDiskError, ConfigError
from memkv_sglang.config.schema import Config, RecorderConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.metrics import make_records_counter
from memkv_sglang.tiers.base import TierError

if TYPE_CHECKING:
    from memkv_sglang.agent.recorder import Recorder

log = logging.getLogger(__name__)

CALLS_LIMIT = 8.0
"""Seconds to wait for loads and spills in flight when stopping. Each call takes at most 5 s."""

REPLIES_LIMIT = 2.0
"""Seconds to wait for other calls after closing the engine, which makes them return."""

STOP_MARGIN = 10.0
"""Seconds that systemd waits beyond these limits before it kills the agent."""

REPEAT_LIMIT = 1.0
"""Seconds during which a repeated signal is ignored, because process managers often signal both the
process and its group.
"""

SOCKET_PERIOD = 1.0
"""Seconds between checks that the socket is still in place."""

REBIND_LIMIT = 10.0
"""If the socket is lost and cannot be bound again for this many seconds, the agent stops."""

READY_LIMIT = 10.0
"""Seconds after which the agent reports ready even if a tier has not answered."""

PROBE_PERIOD = 5.0
"""Seconds between probes while a tier does not work."""

STATUS_PERIOD = 5.0
"""Seconds between updates of the status that systemd shows."""

EXIT_FAILURE = 1
"""Exit status after a failure or an unclean stop."""

EXIT_CONFIG = 2
"""Exit status for an invalid configuration, which a restart cannot fix; see systemd's
`RestartPreventExitStatus`.
"""

_ACCEPT_PAUSE = 0.5

EngineBuilder = Callable[[Config, CollectorRegistry], Engine]
Report = Callable[[str], None]


def run(
    config: Config,
    *,
    locked: bool = False,
    report: Report | None = None,
    build: EngineBuilder = build_engine,
    lifetime: LifetimeMemory | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT, a client's request or idleness; return the exit status.

    Args:
        config: the agent's configuration.
        locked: the starter holds the lock on the socket's directory.
        report: called once, with an empty string when clients are served, or with a one-line error.
            By default, errors go to stderr.
        build: makes the engine.
        lifetime: see `Lifetime`.

    """
    os.umask(0o077)
    configure_logging(config.agent.log_level, config.agent.log_format)
    set_oom_score(config.agent.oom_score_adj)
    _raise_limits(config)
    report = report or _print_problem
    try:
        asyncio.run(_serve(config, locked, report, build, lifetime))
    except StoppedError:
        log.info("agent stopped before it was ready")
        if report is not _print_problem:
            report("the agent was stopped before it was ready")
    except (ConfigError, TierError, OSError) as error:
        report(str(error))
        is_config = isinstance(error, ConfigError) and not isinstance(error, BrokenDiskError)
        return EXIT_CONFIG if is_config else EXIT_FAILURE
    return 0


def _raise_limits(config: Config) -> None:
    problems = [
        missing_cpus(),
        raise_descriptor_limit(),
        raise_disk_request_limit() if config.nvme.directory else "",
    ]
    for problem in filter(None, problems):
        log.warning("a limit of the system is low", extra={"fields": {"reason": problem}})


def _print_problem(problem: str) -> None:
    if problem:
        print(f"error: {problem}", file=sys.stderr)


async def _serve(
    config: Config,
    locked: bool,
    report: Report,
    build: EngineBuilder,
    lifetime: LifetimeMemory | None,
) -> None:
    agent = Agent(config, locked, build, lifetime)
    try:
        await agent.start()
        gc.freeze()  # Exclude these long-lived objects from garbage collection.
        report("")
        locked = False
        await agent.serve()
    finally:
        agent.close(locked)


def _make_recorder(config: RecorderConfig, registry: CollectorRegistry) -> "Recorder | None":
    if not config.file:
        return None
    from memkv_sglang.agent.recorder import Recorder

    counter = make_records_counter(registry)
    try:
        return Recorder(config, lambda result, records: counter.labels(result).inc(records))
    except OSError as error:
        raise ConfigError(
            f"recorder.file: cannot create {config.file} ({error.strerror}); choose a file in an "
            "existing directory that the agent may write to"
        ) from None


class Agent:
    """Owns all parts of the process. Runs in one event loop."""

    def __init__(
        self,
        config: Config,
        locked: bool,
        build: EngineBuilder,
        lifetime: LifetimeMemory | None,
    ) -> None:
        """Bind the socket, then build the engine. The arguments are those of `run`.

        Raises `ConfigError` after cleaning up.
        """
        self._config = config.agent
        self._locked = locked
        self._launched = locked
        self._started = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._ending = threading.Event()
        self._signalled: float | None = None
        self._manager = ServiceManager({} if locked else os.environ)
        interrupt_at_signal(partial(os._exit, EXIT_FAILURE))
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._listener = Listener(socket_path(config.agent), locked=locked)
        interrupt_at_signal(self._exit_now)  # in a thread, because building the engine blocks
        try:
            self._registry = registry
            self._http = HttpServer(config.agent, self._collect_metrics)
            self._recorder = _make_recorder(config.recorder, registry)
            self._engine = build(config, registry)
            for number in STOP_SIGNALS:
                self._loop.add_signal_handler(number, self._on_signal)
        except BaseException:
            self.close(locked)
            raise
        self._sessions = Sessions()
        calls = Calls(
            self._engine,
            config,
            self._sessions,
            self.status,
            self._collect_metrics,
            self.stop,
            launched=self._launched,
            recorder=self._recorder,
        )
        self._server = Server(calls, self._sessions, lifetime)

    def _collect_metrics(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self._engine.status()  # this call also updates the gauges
        return generate_latest(self._registry)

    def status(self) -> AgentStatus:
        """Return the current state."""
        sessions = self._sessions.snapshot()
        return AgentStatus(
            version=__version__,
            pid=os.getpid(),
            socket=str(self._listener.path),
            log=str(agent_log(self._listener.path)) if self._launched else "",
            http_port=self._http.port,
            metrics_url=self._http.url,
            uptime=time.monotonic() - self._started,
            sessions=len(sessions),
            connections=self._server.connections,
            pools=sum(len(session.pools) for session in sessions),
            pool_bytes=sum(session.pools.size for session in sessions),
        )

    def stop(self) -> None:
        """Make `serve` return. Callable from any thread."""
        self._loop.call_soon_threadsafe(self._stopping.set)

    async def start(self) -> None:
        """Accept clients and scrapes.

        `/readyz` succeeds once every tier has answered or failed a first call, after `READY_LIMIT`
        seconds at the latest. Until then, lookups may miss pages in MinIO.
        """
        await self._http.start()
        self._tasks = [
            asyncio.create_task(self._accept()),
            asyncio.create_task(self._watch_socket()),
        ]
        if self._manager.is_present:
            self._tasks.append(asyncio.create_task(self._report_status()))
        if self._manager.watchdog:
            self._tasks.append(asyncio.create_task(self._feed_watchdog()))
        if self._recorder is not None:
            self._tasks.append(asyncio.create_task(self._recorder.run()))
        if self._config.idle_timeout and self._launched:
            self._tasks.append(asyncio.create_task(self._watch_idleness()))
        threading.Thread(target=self._probe_tiers, name="memkv-ready", daemon=True).start()
        fields = {"socket": self._listener.path, "http_port": self._http.port}
        log.info("agent ready", extra={"fields": fields})
        self._manager.ready()

    async def _feed_watchdog(self) -> None:
        """Tell systemd's watchdog that the event loop is running.

        The watchdog does not cover hung calls: clients notice those and kill the agent.
        """
        while True:
            self._manager.alive()
            await asyncio.sleep(self._manager.watchdog / 3)

    async def _report_status(self) -> None:
        while True:
            self._manager.status(self._summary())
            await asyncio.sleep(STATUS_PERIOD)

    def _summary(self) -> str:
        """Return the state of the agent in one line."""
        engine = self._engine.status()
        clients = len(self._sessions.snapshot())
        failing = [
            f"{tier.name} does not work: {tier.problem}" for tier in engine.tiers if tier.problem
        ]
        parts = [
            f"{clients} client{'s' * (clients != 1)}",
            f"{engine.queue_pages} pages waiting for upload",
            *(failing or ["no tier reports a problem"]),
        ]
        return "; ".join(parts)

    def _probe_tiers(self) -> None:
        """Probe the tiers at the start, and again while one does not work."""
        self._engine.probe(READY_LIMIT)
        with suppress(RuntimeError):  # the event loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._become_ready)
        while not self._ending.wait(PROBE_PERIOD):
            status = self._engine.status()
            problems = [tier.problem for tier in status.tiers]
            if any(problems) or any(shard.problem for shard in status.shards):
                self._engine.probe(READY_LIMIT)

    def _become_ready(self) -> None:
        self._http.ready = not self._stopping.is_set()

    def _on_signal(self) -> None:
        now = self._loop.time()
        if self._signalled is None:
            self._signalled = now
        elif now - self._signalled >= REPEAT_LIMIT:
            log.warning("agent stops immediately after a second signal")
            self._exit_now()
        self._stopping.set()

    def _exit_now(self) -> None:
        try:
            self.close(self._locked)
        finally:
            os._exit(EXIT_FAILURE)

    async def _accept(self) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(self._listener.socket)
            except OSError as error:  # the process has no descriptor left, or the client has gone
                log.warning("connection not accepted", extra={"fields": {"reason": str(error)}})
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            try:
                sock.setblocking(True)
                self._server.accept(sock)
            # One failed connection must not end the agent.
            except (OSError, RuntimeError) as error:
                sock.close()
                log.warning("connection not served", extra={"fields": {"reason": str(error)}})

    async def _watch_idleness(self) -> None:
        limit = self._config.idle_timeout
        while self._server.idle_seconds < limit or not self._engine.flush(0):
            await asyncio.sleep(min(1.0, limit / 4))
        log.info("agent idle", extra={"fields": {"seconds": limit}})
        self._stopping.set()

    async def _watch_socket(self) -> None:
        """Recreate the socket if it was removed; stop if that fails.

        It is removed with /run/user/UID at a logout, for instance.
        """
        lost: float | None = None
        while lost is None or self._loop.time() - lost < REBIND_LIMIT:
            await asyncio.sleep(SOCKET_PERIOD)
            if self._listener.is_in_place():
                lost = None
                continue
            lost = self._loop.time() if lost is None else lost
            try:
                listener = Listener(self._listener.path, locked=False, wait=False)
            except ConfigError as error:
                problem = str(error)
                continue
            self._replace_listener(listener)
            lost = None
        log.error(
            "socket lost, agent stops",
            extra={"fields": {"reason": problem}},
        )
        self._stopping.set()

    def _replace_listener(self, listener: Listener) -> None:
        old, self._listener = self._listener, listener
        accepting, self._tasks[0] = self._tasks[0], asyncio.create_task(self._accept())
        accepting.cancel()
        old.close()
        if self._launched:
            # The log was removed with its directory, so open it again.
            limit_log(agent_log(self._listener.path))
        log.warning("socket was removed, recreated it", extra={"fields": {"socket": listener.path}})

    async def serve(self) -> None:
        """Serve until asked to stop, then finish loads and spills, and drain the upload queue."""
        self._locked = False  # `report` has released the lock
        await self._stopping.wait()
        self._ending.set()
        self._http.ready = False
        log.info("agent stopping", extra={"fields": {"drain": self._config.drain_timeout}})
        self._manager.stopping(
            CALLS_LIMIT + self._config.drain_timeout + REPLIES_LIMIT + STOP_MARGIN
        )
        reason = "the agent is stopping"
        if not await asyncio.to_thread(self._server.stop, reason, CALLS_LIMIT):
            log.error(
                "loads or spills still running, agent stops",
                extra={"fields": {"seconds": CALLS_LIMIT}},
            )
            self._exit_now()
        await asyncio.to_thread(self._engine.close, self._config.drain_timeout)
        if not await asyncio.to_thread(self._server.join, REPLIES_LIMIT):
            log.warning("calls still running, agent stops without replying to them")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._recorder is not None:
            await self._recorder.flush()
        self._http.close()
        log.info("agent stopped")

    def close(self, locked: bool) -> None:
        """Remove the socket. Idempotent. `locked`: see `run`."""
        self._listener.close(locked=locked)

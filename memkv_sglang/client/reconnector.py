"""Keep a client connected: start an agent if needed, and reconnect when the agent ends."""

import logging
import os
import select
import threading
import time
import weakref

from memkv_sglang.agent.launch import MODULE, StartError, start_agent
from memkv_sglang.agent.paths import agent_log, socket_path
from memkv_sglang.client.connection import (
    AgentRefusedError,
    ConnectionLostError,
    OtherVersionError,
)
from memkv_sglang.client.health import HealthLog
from memkv_sglang.client.link import Link
from memkv_sglang.client.registry import Registry
from memkv_sglang.client.takeover import (
    END_LIMIT,
    LONGEST_DRAIN,
    UnsuitableAgentError,
    end_older_agent,
    join_or_retire,
)
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import Config
from memkv_sglang.printable import printable

log = logging.getLogger(__name__)

RETRY_PAUSE = 1.0
"""Seconds between connection attempts."""

CLOSE_LIMIT = 2.0
"""Seconds that `close` waits for the background thread to end."""

FORKED = "this client belongs to the parent process; create one in each process"
"""The `problem` of a client in a forked child."""

CONNECTING = "no agent yet"
"""The `problem` of a client that is still trying to connect for the first time."""

UNSUITABLE_PAUSE = 5.0
"""Seconds between attempts while an agent is running that the client cannot use."""

LONGEST_PAUSE = 30.0
"""Maximum seconds between attempts while the agent fails to start."""


class Reconnector:
    """Connects in a background thread, so calls never wait for a connection attempt."""

    def __init__(self, config: Config, *, start: bool, module: str = MODULE) -> None:
        """Start connecting. Raises `ConfigError`.

        With `start`, also start an agent if none answers, insist on the settings in `config`, and
        log the state of the agent's tiers.
        """
        self.link: Link | None = None
        """The link to the agent; None while there is no agent."""
        self.problem = CONNECTING
        """Why there is no agent; empty while connected."""
        self.registry = Registry()
        self._path = socket_path(config.agent)
        self._config = config
        self._start = start
        self._autostart = config.agent.autostart
        self._module = module
        self._lock = threading.Lock()
        self._connected = threading.Event()
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="memkv-link", daemon=True)
        self._thread.start()
        _reconnectors.add(self)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for an agent; return whether there is one."""
        return not self._closed and self._connected.wait(seconds)

    def drop(self, link: Link, problem: str) -> None:
        """Stop using a link. Returns at once; the background thread makes a new one."""
        with self._lock:
            if self.link is not link:
                return
            self._lose(problem)
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Disconnect from the agent, which keeps running. Idempotent.

        If an agent is being started, this waits for it for up to `CLOSE_LIMIT` seconds.
        """
        with self._lock:  # the background thread must not close the eventfd before this write
            if not self._closed:
                self._closed = True
                os.eventfd_write(self._wake, 1)
        self._thread.join(CLOSE_LIMIT)

    def _run(self) -> None:
        pause = RETRY_PAUSE
        while not self._closed:
            attempt = time.monotonic()
            try:
                link = self._connect()
            except StartError as error:
                self._lose(str(error))
                pause = min(2 * pause, LONGEST_PAUSE)
            except (UnsuitableAgentError, OtherVersionError) as error:
                self._lose(str(error))
                pause = UNSUITABLE_PAUSE
            except (AgentRefusedError, ConfigError, ConnectionLostError, OSError) as error:
                self._lose(str(error))
            except Exception as error:
                # This is a bug, but without this thread the client would never reconnect.
                log.exception("memkv: connection attempt failed")
                self._lose(repr(error))
            else:
                pause = RETRY_PAUSE
                self._watch(link)
            self._sleep_until(attempt + pause)
        self.link = None
        self._connected.clear()
        self.problem = "closed"
        with self.registry.lock:
            self.registry.close()
        with self._lock:
            self._close_wake()

    def _connect(self) -> Link:
        """Open a link, register all pools and namespaces, then let calls use the link."""
        link = self._open()
        try:
            with self.registry.lock:
                self.registry.announce(link.first)
                self._publish(link)
        except BaseException:
            link.close()
            raise
        return link

    def _publish(self, link: Link) -> None:
        with self._lock:
            self.link, self.problem = link, ""
            self._connected.set()

    def _open(self) -> Link:
        """Return a link to an agent that runs with this client's settings."""
        if not self._start:
            return self._find()
        link = self._find_or_start()
        try:
            retired = join_or_retire(link.first, self._config)
            if retired is None:
                return link
            self._wait_for_end(link.first.fileno(), retired.reason, retired.seconds)
        except BaseException:
            link.close()
            raise
        link.close()
        return self._open()

    def _find(self) -> Link:
        try:
            return Link(self._path)
        except (FileNotFoundError, ConnectionRefusedError):
            raise ConnectionRefusedError(f"no agent serves {self._path}") from None

    def _find_or_start(self) -> Link:
        try:
            return Link(self._path)
        except (FileNotFoundError, ConnectionRefusedError):
            if not self._autostart:
                raise ConnectionRefusedError(
                    f"no agent serves {self._path}, and agent.autostart is off; start the agent's "
                    "service or container"
                ) from None
        except OtherVersionError as error:
            if not error.is_older or not self._autostart:
                raise
            self._replace_older(error)
        if start_agent(self._config, self._module):
            log.info("memkv: agent started; it logs to %s", agent_log(self._path))
        return Link(self._path)

    def _replace_older(self, error: OtherVersionError) -> None:
        pidfd = end_older_agent(self._path, self._module, error)
        try:
            self._wait_for_end(pidfd, str(error), LONGEST_DRAIN + END_LIMIT)
        finally:
            os.close(pidfd)

    def _wait_for_end(self, pidfd: int, reason: str, seconds: float) -> None:
        """Wait until the agent that was asked to stop has ended. Raises `AgentRefusedError`."""
        self._lose(f"{reason}; it finishes its uploads, then a new agent replaces it")
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        deadline = time.monotonic() + seconds
        while not self._closed:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                raise UnsuitableAgentError(f"{reason}; it was asked to stop but is still running")
            if any(descriptor == pidfd for descriptor, _ in ready):
                return
            os.eventfd_read(self._wake)
        raise AgentRefusedError("closed")

    def _watch(self, link: Link) -> None:
        """Close the link and return when the agent ends or the link is dropped."""
        poll = select.poll()
        poll.register(link.first, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        health = HealthLog()
        while self.link is link and not self._closed:
            pause = health.check(link) * 1000 if self._start else None
            for descriptor, _ in poll.poll(pause):
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    self.drop(link, "the agent has ended")
        link.close()

    def _sleep_until(self, moment: float) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._closed and (left := moment - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                os.eventfd_read(self._wake)

    def _lose(self, problem: str) -> None:
        problem = printable(problem)
        self.link = None
        self._connected.clear()
        if problem != self.problem:
            log.warning("memkv: no agent: %s", problem)
        self.problem = problem

    def abandon_in_child(self) -> None:
        """Close in a forked child, replacing locks that another thread may have held."""
        self.link, self.problem = None, FORKED
        self._closed = True
        self._lock, self._connected = threading.Lock(), threading.Event()
        abandoned, self.registry = self.registry, Registry()
        abandoned.close()
        self._close_wake()

    def _close_wake(self) -> None:
        # Reset it before closing, so that a child forked now does not close it again.
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)


_reconnectors: "weakref.WeakSet[Reconnector]" = weakref.WeakSet()


def _abandon_in_child() -> None:
    for reconnector in list(_reconnectors):
        reconnector.abandon_in_child()


os.register_at_fork(after_in_child=_abandon_in_child)

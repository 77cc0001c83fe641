"""Run the agent as a child process, and kill it when a client asks.

A client in another pid namespace, such as another container, sees when the agent's writes have
ended but cannot kill it. It asks this process, which shares the agent's pid namespace. The client
believes only the agent's `Lifetime`, so it need not trust the answer.

A request is one byte and the descriptor of the agent's `Lifetime` as the client got it; the answer
is one byte. The descriptor identifies the agent, so a late request cannot kill its successor.
"""

import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn

from memkv_sglang.agent.lifetime import LifetimeMemory
from memkv_sglang.agent.listener import Listener
from memkv_sglang.agent.peer import peer_of
from memkv_sglang.agent.stopping import STOP_SIGNALS

ASK, KILL = b"?", b"k"
"""Requests. `ASK`: does this process supervise the agent? `KILL`: kill the agent."""

YES, NO = b"y", b"n"
"""Answers. `YES`: the agent is or was a child of this process. `NO`: it never was."""

REQUEST_LIMIT = 1.0
"""Seconds for a client to send its request."""

EXIT_FAILURE = 1
"""Exit status if the agent was killed by a signal that no client asked for."""

_PR_SET_PDEATHSIG = 1

RunAgent = Callable[[LifetimeMemory], int]
"""Serves as an agent with this lifetime; returns the exit status."""


def supervisor_path(agent: Path) -> Path:
    """Return the path of the supervisor's socket next to the agent's."""
    return agent.with_name("supervisor.sock")


def supervise(agent: Path, run_agent: RunAgent) -> int:
    """Run agents, one at a time, until one ends by itself; return its exit status.

    `agent` is the path of the agent's socket. Passes SIGTERM and SIGINT on to the agent. Must be
    called by the main thread of a process with no other threads, because it forks. Raises
    `ConfigError` if its socket cannot be bound.
    """
    listener = Listener(supervisor_path(agent), locked=False)
    try:
        return _Supervisor(listener.socket, run_agent).run()
    finally:
        listener.close()


class _Supervisor:
    def __init__(self, listening: socket.socket, run_agent: RunAgent) -> None:
        self._listening = listening
        self._run_agent = run_agent
        self._signals, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        signal.set_wakeup_fd(self._wake)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # the number arrives through the pipe
        while (status := self._run_once()) is None:
            print("memkv: starting another agent", file=sys.stderr, flush=True)
        return status

    def _run_once(self) -> int | None:
        """Run an agent until it ends; return its exit status, or None if a client had it killed."""
        memory = LifetimeMemory()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_agent(parent, memory)
        with closing(memory):
            pidfd = os.pidfd_open(pid)
            try:
                killed = self._serve(pidfd, memory)
            finally:
                os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status < 0 and killed:
            return None
        return status if status >= 0 else EXIT_FAILURE

    def _become_agent(self, parent: int, memory: LifetimeMemory) -> NoReturn:
        """Run the agent in the forked child."""
        status = EXIT_FAILURE
        try:
            signal.set_wakeup_fd(-1)
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            os.close(self._signals)
            os.close(self._wake)
            self._listening.close()
            _die_with(parent)
            status = self._run_agent(memory)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _serve(self, pidfd: int, memory: LifetimeMemory) -> bool:
        """Answer clients until the agent ends; return whether one of them had it killed."""
        killed = False
        poll = select.poll()
        for descriptor in (pidfd, self._signals, self._listening.fileno()):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._signals in ready:
                for number in os.read(self._signals, 64):
                    _send_signal(pidfd, number)
            if self._listening.fileno() in ready and self._answer_next(memory):
                print("memkv: a client had a hung agent killed", file=sys.stderr, flush=True)
                _send_signal(pidfd, signal.SIGKILL)
                killed = True
            if pidfd in ready:
                return killed

    def _answer_next(self, memory: LifetimeMemory) -> bool:
        """Answer a client; return whether it wants this agent killed."""
        try:
            connection, _ = self._listening.accept()
        except OSError:  # the client has gone
            return False
        with connection:
            if peer_of(connection).uid != os.getuid():
                return False
            connection.settimeout(REQUEST_LIMIT)
            try:
                request, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            except OSError:
                return False
            try:
                is_ours = len(descriptors) == 1 and memory.is_of(descriptors[0])
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            with suppress(OSError):
                connection.sendall(YES if is_ours else NO)
            return is_ours and request == KILL


def ask(agent: Path, request: bytes, lifetime: int, seconds: float) -> bool:
    """Send a request about an agent; return whether its supervisor agreed within `seconds`.

    `agent` is the path of the agent's socket, `lifetime` the descriptor that came with its Welcome.
    Never raises.
    """
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.settimeout(seconds)
            sock.connect(os.fspath(supervisor_path(agent)))
            if peer_of(sock).uid != os.getuid():
                return False
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            socket.send_fds(sock, [request], [lifetime])
            return sock.recv(1) == YES
        except OSError:
            return False


def _send_signal(pidfd: int, number: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent, the supervisor, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(EXIT_FAILURE)

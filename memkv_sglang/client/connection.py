"""A client's connection to the agent, which also watches the agent's process."""

import logging
import os
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from memkv_sglang.agent import protocol, supervisor
from memkv_sglang.agent.lifetime import has_ended
from memkv_sglang.agent.peer import open_peer_pidfd, peer_of
from memkv_sglang.agent.wire import Channel, ProtocolError, encode_frame
from memkv_sglang.client.withheld import withheld

log = logging.getLogger(__name__)

SEND_LIMIT = 2.0
"""Seconds without progress after which sending a request fails."""

END_LIMIT = 1.0
"""Seconds to wait for a killed agent's writes to end. They end within milliseconds unless the disk
hangs."""

_POLL_INTERVAL = 0.05
"""Seconds between checks of a running agent's lifetime lock. A debugger can keep the pidfd from
becoming readable, so waiting for the pidfd is not enough."""

_POLL_INTERVAL_AFTER_EXIT = 0.001
"""Seconds between checks of the lifetime lock after the process has ended."""

_LOST = (OSError, EOFError, ProtocolError)

_decoder = msgspec.msgpack.Decoder(protocol.Reply)


def place_of(pid: int) -> str:
    """Return a process's id as text, or that another pid namespace hides it."""
    return f"pid {pid}" if pid else "in another container"


class ConnectionLostError(Exception):
    """No valid reply arrived; the connection is unusable."""


class _NotSentError(ConnectionLostError):
    """The request was not sent completely, so the agent ignores it."""


class AgentRefusedError(Exception):
    """There is an agent, but this client cannot use it. The message says why."""


class OtherVersionError(AgentRefusedError):
    """The agent speaks another version of the protocol."""

    def __init__(self, pid: int, version: int) -> None:
        """Say in the message which side is older and what to install."""
        own = protocol.PROTOCOL_VERSION
        self.pid = pid
        self.is_older = version < own
        age = "older" if self.is_older else "newer"
        place = "for the agent" if self.is_older else "here"
        super().__init__(
            f"the agent ({place_of(pid)}) is {age}: it uses protocol version {version}, this "
            f"client {own}; install the {'newer' if self.is_older else 'same'} sglang-memkv {place}"
        )


class AgentConnection:
    """Sends one request at a time and waits for its reply. Not thread-safe; all calls block.

    Unusable in a forked child, where its descriptors are closed.
    """

    def __init__(self, path: Path, session: bytes, deadline: float) -> None:
        """Connect and perform the handshake. An empty `session` opens a new session.

        Raises `AgentRefusedError`, or `OSError` if no agent answers by the deadline.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = path
        self._pidfd = -1
        self._lifetime = -1
        self._pid = os.getpid()
        self._busy = threading.Lock()
        self._channel: Channel[protocol.Reply] = Channel(sock, _decoder)
        _connections.add(self)
        try:
            # Do not block: an agent whose backlog is full does not answer either.
            sock.setblocking(False)
            sock.connect(os.fspath(path))
            sock.setblocking(True)
            self._channel.limit_send(SEND_LIMIT)
            self._identify(sock)
            self.session = self._shake_hands(session, deadline)
            self._require_supervisor(deadline)
        except BaseException:
            self.close()
            raise

    def _identify(self, sock: socket.socket) -> None:
        peer = peer_of(sock)
        if peer.uid != os.getuid():
            raise AgentRefusedError(
                f"the agent runs as uid {peer.uid}, this process as {os.getuid()}; run both as the "
                "same user"
            )
        self.pid = peer.pid
        """The agent's process; 0 if it is in another pid namespace."""
        try:
            self._pidfd = open_peer_pidfd(sock)
        except OSError:
            if self.pid:
                raise
            raise AgentRefusedError(
                "the agent runs in another container, which needs Linux 6.5 or later; run server "
                "and agent in the same pid namespace (docker run --pid=container:NAME)"
            ) from None

    def _require_supervisor(self, deadline: float) -> None:
        """Raise `AgentRefusedError` if there is no supervisor that could kill a hung agent."""
        if self.pid:
            return
        left = max(0.001, deadline - time.monotonic())
        if not supervisor.ask(self._path, supervisor.ASK, self._lifetime, left):
            raise AgentRefusedError(
                "the agent runs in another container without a supervisor, so nothing could end it "
                "if it hung; start it with `memkv agent --supervise`"
            )

    def _shake_hands(self, session: bytes, deadline: float) -> bytes:
        # the agent may refuse the connection and close it before reading
        with suppress(BrokenPipeError):
            self._channel.send(encode_frame(protocol.Hello(protocol.PROTOCOL_VERSION, session)))
        try:
            reply = self._channel.receive(deadline)
        except TimeoutError:
            raise ConnectionAbortedError(
                f"process {self.pid}, which serves the socket, does not answer"
            ) from None
        except (EOFError, ProtocolError) as error:
            raise ConnectionAbortedError(
                f"process {self.pid}, which serves the socket, does not answer like an agent: "
                f"{error or 'it closed the connection'}"
            ) from None
        match reply:
            case protocol.Welcome(version=version) if version != protocol.PROTOCOL_VERSION:
                raise OtherVersionError(self.pid, version)
            case protocol.Welcome(session=bytes() as token):
                self._lifetime = self._claim_lifetime()
                return token
            case protocol.Refused(reason=reason):
                raise AgentRefusedError(reason)
            case _:
                raise AgentRefusedError(f"the agent answered Hello with {type(reply).__name__}")

    def _claim_lifetime(self) -> int:
        """Return the `Lifetime` descriptor that came with Welcome. Raises `AgentRefusedError`."""
        descriptors = self._channel.claim_descriptors()
        try:
            if len(descriptors) == 1 and not has_ended(descriptors[0]):
                return descriptors.pop()
        except OSError as error:  # The descriptor does not support locks.
            log.warning(
                "agent sent an invalid lifetime descriptor", extra={"fields": {"error": str(error)}}
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        raise AgentRefusedError(
            f"the agent did not send its lifetime lock; restart it (kill {self.pid})"
        )

    def call(
        self, request: protocol.Request, deadline: float, descriptors: Sequence[int] = ()
    ) -> protocol.Reply:
        """Send a request without buffers; return the reply. Raises `ConnectionLostError`.

        The agent may still be working on the request when this raises.
        """
        frame = encode_frame(request)
        self._claim()
        try:
            self._channel.send(frame, descriptors)
            return self._channel.receive(deadline)
        except _LOST as error:
            raise ConnectionLostError(str(error)) from None
        finally:
            self._busy.release()

    def call_with_buffers(self, request: protocol.Request, deadline: float) -> protocol.Reply:
        """Send a request with buffers; return the reply. Raises `ConnectionLostError`.

        Returns with the reply, or once the agent can no longer write to the buffers. Kills the
        agent at the deadline. If its writes have not ended `END_LIMIT` later, the buffers of a load
        are `withheld`. The agent ignores a request that was not sent completely.
        """
        frame = encode_frame(request)
        self._claim()
        try:
            try:
                self._channel.send(frame)
            except OSError as error:
                raise _NotSentError(str(error)) from None
            return self._channel.receive(deadline)
        except _NotSentError:
            raise
        except BaseException as error:  # also for KeyboardInterrupt: the buffers must be safe first
            self._secure_buffers(request, deadline)
            if isinstance(error, _LOST):
                raise ConnectionLostError(str(error)) from None
            raise
        finally:
            self._busy.release()

    def _claim(self) -> None:
        """Reject use by another thread or a forked child."""
        if self._pid != os.getpid():
            raise _NotSentError("the connection belongs to the parent process")
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("two threads use one connection to the agent")

    def _secure_buffers(self, request: protocol.Request, deadline: float) -> None:
        """Return once the agent can no longer write, or the buffers of a load are withheld.

        Kills the agent at the deadline.
        """
        interrupt: KeyboardInterrupt | None = None
        decided = withholds = False
        while not decided:
            try:
                ended = self._end_agent(deadline)
                withholds = not ended and isinstance(request, protocol.LoadPages)
                if withholds:
                    withheld.add(self._lifetime)
                decided = True
            except KeyboardInterrupt as error:
                interrupt = error
        if withholds:
            self._lifetime = -1  # `withheld` owns it now
        if interrupt is not None:
            raise interrupt

    def _end_agent(self, deadline: float) -> bool:
        """Kill the agent at the deadline. Returns False if it may still write `END_LIMIT` later."""
        if self._wait_for_end(deadline):
            return True
        fields = {"pid": self.pid}
        log.error("memkv: agent killed because it did not answer in time", extra={"fields": fields})
        self._kill(deadline + END_LIMIT)
        if self._wait_for_end(deadline + END_LIMIT):
            return True
        log.error(
            "memkv: disk requests of the killed agent have not ended", extra={"fields": fields}
        )
        return False

    def _kill(self, deadline: float) -> None:
        if self.pid:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            return
        left = max(0.001, deadline - time.monotonic())
        if not supervisor.ask(self._path, supervisor.KILL, self._lifetime, left):
            log.error("memkv: the agent's supervisor did not answer")

    def _wait_for_end(self, deadline: float) -> bool:
        """Wait until the agent can no longer write. Returns False at the deadline."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        while not has_ended(self._lifetime):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if poll.poll(1000 * min(left, _POLL_INTERVAL)):
                time.sleep(min(left, _POLL_INTERVAL_AFTER_EXIT))
        return True

    def fileno(self) -> int:
        """Return the agent's pidfd, which becomes readable when the process ends."""
        return self._pidfd

    def close(self) -> None:
        """Close the socket and descriptors. Idempotent."""
        self._channel.close()
        descriptors = (self._pidfd, self._lifetime)
        # Reset them before closing, so that a child forked now does not close them again.
        self._pidfd = self._lifetime = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


_connections: "weakref.WeakSet[AgentConnection]" = weakref.WeakSet()


def _close_in_child() -> None:
    """Close every connection in a forked child; the parent's stay open.

    If the child kept them, the agent would not notice when the parent ends.
    """
    for connection in list(_connections):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)

"""A client's connection to the agent, and what it knows of the agent's process."""

import logging
import os
import re
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

from memkv_sglang.agent import protocol
from memkv_sglang.agent.lifetime import has_ended
from memkv_sglang.agent.peer import open_peer_pidfd, peer_of
from memkv_sglang.agent.wire import Channel, ProtocolError, encode_frame
from memkv_sglang.client.withheld import withheld

log = logging.getLogger(__name__)

SEND_LIMIT = 2.0
"""Seconds in which the agent must take something of a request."""

END_LIMIT = 1.0
"""Seconds that a call waits for the end of a killed agent's writes. It takes some milliseconds
unless the disk hangs."""

_LOOK_EVERY = 0.05
"""Seconds from one look at a living agent's lifetime to the next: a debugger may keep its pidfd
from becoming readable."""

_LOOK_AGAIN = 0.001
"""Seconds from one look to the next once the process has ended."""

_LOST = (OSError, EOFError, ProtocolError)

_TOLD_IN_WORDS = re.compile(r"protocol version \d+, this agent (\d{1,9})")
"""How agents before version 4 tell their version."""

_decoder = msgspec.msgpack.Decoder(protocol.Reply)


class ConnectionLostError(Exception):
    """No reply came, or none that can be understood; the connection is of no more use."""


class _NotSentError(ConnectionLostError):
    """The request was not sent whole, so that the agent does not act on it."""


class AgentRefusedError(Exception):
    """There is an agent, but not one for us. The text says why."""


class OtherVersionError(AgentRefusedError):
    """The agent speaks another version of the protocol."""

    def __init__(self, pid: int, version: int) -> None:
        """Say which of the two is older, and what to do."""
        own = protocol.PROTOCOL_VERSION
        self.pid = pid
        self.is_older = version < own
        age = "older" if self.is_older else "newer"
        place = "for the agent" if self.is_older else "here"
        super().__init__(
            f"the agent (pid {pid}) is {age}: it speaks protocol version {version}, this client "
            f"{own}; install the {'newer' if self.is_older else 'same'} sglang-memkv {place}"
        )


class Connection:
    """For one thread at a time: a request and its reply, then the next. All calls block.

    Of no use in a forked child, where its descriptors are closed.
    """

    def __init__(self, path: Path, session: bytes, deadline: float) -> None:
        """Connect and shake hands; an empty `session` opens one.

        Raises `AgentRefusedError`, or `OSError` if nobody answers, also not in time.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pidfd = -1
        self._lifetime = -1
        self._pid = os.getpid()
        self._busy = threading.Lock()
        self._channel: Channel[protocol.Reply] = Channel(sock, _decoder)
        _connections.add(self)
        try:
            # Without blocking: a full backlog is as good as nobody.
            sock.setblocking(False)
            sock.connect(os.fspath(path))
            sock.setblocking(True)
            self._channel.limit_send(SEND_LIMIT)
            self._identify(sock)
            self.session = self._shake_hands(session, deadline)
        except BaseException:
            self.close()
            raise

    def _identify(self, sock: socket.socket) -> None:
        peer = peer_of(sock)
        if peer.uid != os.getuid():
            raise AgentRefusedError(f"the agent belongs to uid {peer.uid}, this is {os.getuid()}")
        if peer.pid == 0:
            raise AgentRefusedError(
                "the agent runs in another pid namespace, so this process could not end it if it "
                "hung; start server and agent in one (docker run --pid=container:NAME)"
            )
        self.pid = peer.pid
        self._pidfd = open_peer_pidfd(sock)

    def _shake_hands(self, session: bytes, deadline: float) -> bytes:
        with suppress(BrokenPipeError):  # a refusal may be there before the request is
            self._channel.send(encode_frame(protocol.Hello(protocol.PROTOCOL_VERSION, session)))
        try:
            reply = self._channel.receive(deadline)
        except TimeoutError:
            raise ConnectionAbortedError(
                f"process {self.pid}, which has the socket, does not answer"
            ) from None
        except (EOFError, ProtocolError) as error:
            raise ConnectionAbortedError(
                f"process {self.pid}, which has the socket, does not answer as an agent: "
                f"{error or 'it hung up'}"
            ) from None
        match reply:
            case protocol.Welcome(version=version) if version != protocol.PROTOCOL_VERSION:
                raise OtherVersionError(self.pid, version)
            case protocol.Welcome(session=bytes() as token):
                self._lifetime = self._claim_lifetime()
                return token
            case protocol.Refused(reason=reason):
                if match := _TOLD_IN_WORDS.search(reason):
                    raise OtherVersionError(self.pid, int(match[1]))
                raise AgentRefusedError(reason)
            case _:
                raise AgentRefusedError(f"no welcome but {type(reply).__name__}")

    def _claim_lifetime(self) -> int:
        """Return the descriptor that came with the welcome. Raises `AgentRefusedError`."""
        descriptors = self._channel.claim_descriptors()
        try:
            if len(descriptors) == 1 and not has_ended(descriptors[0]):
                return descriptors.pop()
        except OSError as error:  # a descriptor that cannot be locked
            log.warning("no lifetime", extra={"fields": {"error": str(error)}})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        raise AgentRefusedError("the agent does not prove that it is alive; end it")

    def call(
        self, request: protocol.Request, deadline: float, descriptors: Sequence[int] = ()
    ) -> protocol.Reply:
        """Return the reply to a request that names no buffers. Raises `ConnectionLostError`.

        The agent may still be at work on the request after an error.
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
        """Return the reply to a request that names buffers. Raises `ConnectionLostError`.

        A request that was not sent whole is not carried out. Otherwise this returns with the reply,
        or once the agent can write no more; the agent is killed at the deadline. If its writes have
        not ended `END_LIMIT` later, the buffers of a load are `withheld`.
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
        except BaseException as error:  # even KeyboardInterrupt has to wait
            self._outlive_agent(request, deadline)
            if isinstance(error, _LOST):
                raise ConnectionLostError(str(error)) from None
            raise
        finally:
            self._busy.release()

    def _claim(self) -> None:
        """Keep other threads, and forked children, from sending in between."""
        if self._pid != os.getpid():
            raise _NotSentError("the connection belongs to this process's parent")
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("two threads use one connection to the agent")

    def _outlive_agent(self, request: protocol.Request, deadline: float) -> None:
        """Return once the agent can write no more, or the buffers of a load are withheld.

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
            self._lifetime = -1  # not ours to close any more
        if interrupt is not None:
            raise interrupt

    def _end_agent(self, deadline: float) -> bool:
        """Kill the agent at the deadline; False if it may still write `END_LIMIT` later."""
        if self._wait_for_end(deadline):
            return True
        fields = {"pid": self.pid}
        log.error("agent killed, it did not answer in time", extra={"fields": fields})
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if self._wait_for_end(deadline + END_LIMIT):
            return True
        log.error("the killed agent's requests to the disk do not end", extra={"fields": fields})
        return False

    def _wait_for_end(self, deadline: float) -> bool:
        """Wait until the agent can write no more; False if that is not so by the deadline."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        while not has_ended(self._lifetime):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if poll.poll(1000 * min(left, _LOOK_EVERY)):
                time.sleep(min(left, _LOOK_AGAIN))
        return True

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the agent's process has ended."""
        return self._pidfd

    def close(self) -> None:
        """Close; idempotent."""
        self._channel.close()
        descriptors = (self._pidfd, self._lifetime)
        self._pidfd = self._lifetime = -1  # first: a child forked meanwhile must not close them too
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


_connections: "weakref.WeakSet[Connection]" = weakref.WeakSet()


def _leave_to_parent() -> None:
    """Close every connection in a forked child, which leaves the parent's as they are.

    Only closed, not shut down. If the child kept them, the agent would not notice the parent's end.
    """
    for connection in list(_connections):
        connection.close()


os.register_at_fork(after_in_child=_leave_to_parent)

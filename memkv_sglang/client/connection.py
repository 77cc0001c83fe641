"""A client's connection to the agent, and what it knows of the agent's process."""

import logging
import os
import re
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from memkv_sglang.agent import protocol
from memkv_sglang.agent.peer import open_peer_pidfd, peer_of
from memkv_sglang.agent.wire import Channel, ProtocolError, encode_frame

log = logging.getLogger(__name__)

SEND_LIMIT = 2.0
"""Seconds in which the agent must take something of a request."""

_REMINDER = 10.0
"""Seconds between log lines about a killed agent that does not end."""

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
    """For one thread at a time: a request and its reply, then the next. All calls block."""

    def __init__(self, path: Path, session: bytes, deadline: float) -> None:
        """Connect and shake hands; an empty `session` opens one.

        Raises `AgentRefusedError`, or `OSError` if nobody answers, also not in time.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pidfd = -1
        self._channel: Channel[protocol.Reply] = Channel(sock, _decoder)
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
                "the agent runs in another pid namespace, so that nobody could tell whether it "
                "has ended; start server and agent in one (docker run --pid=container:NAME)"
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
                return token
            case protocol.Refused(reason=reason):
                if match := _TOLD_IN_WORDS.search(reason):
                    raise OtherVersionError(self.pid, int(match[1]))
                raise AgentRefusedError(reason)
            case _:
                raise AgentRefusedError(f"no welcome but {type(reply).__name__}")

    def call(
        self, request: protocol.Request, deadline: float, descriptors: Sequence[int] = ()
    ) -> protocol.Reply:
        """Return the reply to a request that names no buffers. Raises `ConnectionLostError`.

        The agent may still be at work on the request after an error.
        """
        frame = encode_frame(request)
        try:
            self._channel.send(frame, descriptors)
            return self._channel.receive(deadline)
        except _LOST as error:
            raise ConnectionLostError(str(error)) from None

    def call_with_buffers(self, request: protocol.Request, deadline: float) -> protocol.Reply:
        """Return the reply to a request that names buffers. Raises `ConnectionLostError`.

        However this call ends, nobody touches the buffers any more: it ends with the reply, or
        with the agent's process, which is killed at the deadline. A request that could not be
        sent whole is not carried out.
        """
        frame = encode_frame(request)
        try:
            try:
                self._channel.send(frame)
            except OSError as error:
                raise _NotSentError(str(error)) from None
            return self._channel.receive(deadline)
        except _NotSentError:
            raise
        except BaseException as error:  # even KeyboardInterrupt has to wait
            self._outlive_agent(deadline)
            if isinstance(error, _LOST):
                raise ConnectionLostError(str(error)) from None
            raise

    def _outlive_agent(self, deadline: float) -> None:
        """Return once the agent's process has ended; kill it at the deadline.

        Without a limit: nobody can say that the pages are free while the process is there.
        """
        interrupt: KeyboardInterrupt | None = None
        ended = False
        while not ended:
            try:
                self._end_agent(deadline)
                ended = True
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _end_agent(self, deadline: float) -> None:
        if self.wait_for_end(max(0.0, deadline - time.monotonic())):
            return
        log.error("agent killed, it did not answer in time", extra={"fields": {"pid": self.pid}})
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        while not self.wait_for_end(_REMINDER):
            log.error("killed agent does not end", extra={"fields": {"pid": self.pid}})

    def wait_for_end(self, seconds: float) -> bool:
        """Wait for the end of the agent's process; False if it has not come in time."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the agent's process has ended."""
        return self._pidfd

    def close(self) -> None:
        """Close; idempotent."""
        self._channel.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

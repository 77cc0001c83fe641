"""One client connection, served by its own thread."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NoReturn

import msgspec

from memkv_sglang.agent import protocol
from memkv_sglang.agent.calls import Calls
from memkv_sglang.agent.lifetime import Lifetime
from memkv_sglang.agent.peer import Peer
from memkv_sglang.agent.pools import RequestError
from memkv_sglang.agent.sessions import Session, Sessions
from memkv_sglang.agent.wire import Channel, MessageError, ProtocolError, encode_frame

log = logging.getLogger(__name__)

HELLO_LIMIT = 5.0
"""Seconds for a new connection to send Hello."""

SEND_LIMIT = 5.0
"""Seconds without progress after which sending a reply fails."""

MAX_TOKEN = 64
"""Maximum length of a session token in bytes."""

PAGE_CALLS = (protocol.LoadPages, protocol.SpillPages)
"""Requests that use a client's buffers until the reply."""

_decoder = msgspec.msgpack.Decoder(protocol.Request)


class ClientConnection:
    """Serves one request at a time until the client closes or violates the protocol."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        calls: Calls,
        sessions: Sessions,
        lifetime: Lifetime,
        ended: Callable[["ClientConnection"], None],
    ) -> None:
        """Take ownership of the socket. The connection's thread calls `ended` when it ends."""
        self._channel: Channel[protocol.Request] = Channel(sock, _decoder)
        self._channel.limit_send(SEND_LIMIT)
        self.peer = peer
        self._calls = calls
        self._sessions = sessions
        self._lifetime = lifetime
        self._ended = ended
        self._stopping = False
        self._using_buffers = threading.Lock()  # held during each load and spill
        self._thread = threading.Thread(target=self._run, name="memkv-connection", daemon=True)

    def start(self) -> None:
        """Start the serving thread."""
        self._thread.start()

    def stop_receiving(self) -> None:
        """Finish the call in flight, including its reply, then end. Does not wait."""
        self._stopping = True
        self._channel.stop_receiving()

    def wait_for_buffers(self, deadline: float) -> bool:
        """After `stop_receiving`, wait until no call uses buffers.

        Returns False at the deadline.
        """
        ended = self._using_buffers.acquire(timeout=max(0.0, deadline - time.monotonic()))
        if ended:
            self._using_buffers.release()
        return ended

    def join(self, deadline: float) -> bool:
        """Wait for the thread to end. Returns False at the deadline."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._serve()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            log.debug("connection closed", extra={"fields": self.peer._asdict()})
        except (ProtocolError, OSError) as error:
            fields = {**self.peer._asdict(), "reason": str(error)}
            log.warning("connection aborted", extra={"fields": fields})
        except Exception:  # This is a bug, but the session must still be closed.
            log.exception("connection failed")
        finally:
            self._channel.close()
            self._ended(self)

    def _serve(self) -> None:
        session = self._greet()
        try:
            welcome = protocol.Welcome(protocol.PROTOCOL_VERSION, session.token)
            self._channel.send(encode_frame(welcome), [self._lifetime.descriptor])
            while True:
                self._serve_one(session)
        finally:
            self._sessions.leave(session)

    def _serve_one(self, session: Session) -> None:
        # In a method of its own, so that no local variable keeps pages, and with them pools, alive
        # between calls.
        try:
            request = self._channel.receive()
        except MessageError as error:
            log.warning("invalid request", extra={"fields": {"reason": str(error)}})
            self._channel.send(encode_frame(protocol.Refused(f"invalid request: {error}")))
            return
        with self._using_buffers if isinstance(request, PAGE_CALLS) else nullcontext():
            self._answer(session, request)

    def _answer(self, session: Session, request: protocol.Request) -> None:
        descriptors = self._channel.claim_descriptors()
        try:
            if self._stopping:  # the engine may already be closed
                reply: protocol.Reply = protocol.Refused("the agent is stopping")
            else:
                reply = self._calls.answer(session, request, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._channel.send(encode_frame(reply))

    def _greet(self) -> Session:
        hello = self._channel.receive(time.monotonic() + HELLO_LIMIT)
        if not isinstance(hello, protocol.Hello):
            raise ProtocolError("the first message is not Hello")
        if hello.version != protocol.PROTOCOL_VERSION:
            self._channel.send(encode_frame(protocol.Welcome(protocol.PROTOCOL_VERSION)))
            raise EOFError  # The client logs this, and retries often, so the agent does not log it.
        try:
            return self._sessions.enter(_token(hello.session), self.peer.pid)
        except RequestError as error:
            self._refuse(str(error))

    def _refuse(self, reason: str) -> NoReturn:
        self._channel.send(encode_frame(protocol.Refused(reason)))
        raise ProtocolError(reason)


def _token(value: object) -> bytes:
    """Return a session token. Raises `RequestError` if the value is not one."""
    if not isinstance(value, bytes) or len(value) > MAX_TOKEN:
        raise RequestError("unknown session")
    return value

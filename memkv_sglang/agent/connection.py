"""One connection of a client, served by one thread."""

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
"""Seconds in which a new connection must say hello."""

SEND_LIMIT = 5.0
"""Seconds in which a client must take something of its reply."""

MAX_TOKEN = 64
"""Bytes of a session's token."""

PAGE_CALLS = (protocol.LoadPages, protocol.SpillPages)
"""Requests whose calls use a client's pages until the reply."""

_decoder = msgspec.msgpack.Decoder(protocol.Request)


class ClientConnection:
    """Serves requests one after the other until the client closes or breaks the protocol."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        calls: Calls,
        sessions: Sessions,
        lifetime: Lifetime,
        ended: Callable[["ClientConnection"], None],
    ) -> None:
        """Own the socket; `ended` is called once, by the connection's own thread, at its end."""
        self._channel: Channel[protocol.Request] = Channel(sock, _decoder)
        self._channel.limit_send(SEND_LIMIT)
        self.peer = peer
        self._calls = calls
        self._sessions = sessions
        self._lifetime = lifetime
        self._ended = ended
        self._stopping = False
        self._moving = threading.Lock()  # held from the begin of a load or spill to its reply
        self._thread = threading.Thread(target=self._run, name="memkv-connection", daemon=True)

    def start(self) -> None:
        """Serve in a thread."""
        self._thread.start()

    def stop_receiving(self) -> None:
        """Let the connection end after the call in flight, its reply included."""
        self._stopping = True
        self._channel.stop_receiving()

    def wait_for_pages(self, deadline: float) -> bool:
        """After `stop_receiving`: wait until no call uses pages; False at the deadline."""
        ended = self._moving.acquire(timeout=max(0.0, deadline - time.monotonic()))
        if ended:
            self._moving.release()
        return ended

    def join(self, deadline: float) -> bool:
        """Wait for the end; False at the deadline."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._serve()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            log.debug("connection closed", extra={"fields": self.peer._asdict()})
        except (ProtocolError, OSError) as error:
            fields = {**self.peer._asdict(), "reason": str(error)}
            log.warning("connection broken off", extra={"fields": fields})
        except Exception:  # a defect, which must not leave the session open
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
        # A method of its own: between calls no local keeps a request's pages, thus pools, alive.
        try:
            request = self._channel.receive()
        except MessageError as error:
            log.warning("request not understood", extra={"fields": {"reason": str(error)}})
            self._channel.send(encode_frame(protocol.Refused(f"no request: {error}")))
            return
        with self._moving if isinstance(request, PAGE_CALLS) else nullcontext():
            self._answer(session, request)

    def _answer(self, session: Session, request: protocol.Request) -> None:
        descriptors = self._channel.claim_descriptors()
        try:
            if self._stopping:  # the engine may be closed already
                reply: protocol.Reply = protocol.Refused("the agent is about to end")
            else:
                reply = self._calls.answer(session, request, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._channel.send(encode_frame(reply))

    def _greet(self) -> Session:
        hello = self._channel.receive(time.monotonic() + HELLO_LIMIT)
        if not isinstance(hello, protocol.Hello):
            raise ProtocolError("no hello")
        if hello.version != protocol.PROTOCOL_VERSION:
            self._channel.send(encode_frame(protocol.Welcome(protocol.PROTOCOL_VERSION)))
            raise EOFError  # nothing to log: the client says so, and tries again and again
        try:
            return self._sessions.enter(_token(hello.session), self.peer.pid)
        except RequestError as error:
            self._refuse(str(error))

    def _refuse(self, reason: str) -> NoReturn:
        self._channel.send(encode_frame(protocol.Refused(reason)))
        raise ProtocolError(reason)


def _token(value: object) -> bytes:
    """Return a session's token; raises `RequestError` for what is none."""
    if not isinstance(value, bytes) or len(value) > MAX_TOKEN:
        raise RequestError("there is no such session")
    return value

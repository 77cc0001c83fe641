"""The compiled fast path: moves objects over several connections in one thread.

Receiving or sending a page evicts everything else from the CPU caches, so a line of Python between
two pages costs several times its usual price, and the threads of other calls wait for the GIL
meanwhile. This loop therefore signs, sends, receives, encrypts, decrypts and verifies without the
GIL. It takes the GIL only for TLS, and to parse a head that is not one of the usual ones.
"""

import time

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free
from cpython.object cimport PyObject
from libc.math cimport INFINITY
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from memkv_sglang.tiers.minio.http cimport bulk_stream, libcrypto, xxh3
from memkv_sglang.tiers.minio.http.bulk_batch cimport Batch, Upload, allocate
from memkv_sglang.tiers.minio.http.bulk_heads cimport HEAD_ROOM, surplus
from memkv_sglang.tiers.minio.http.bulk_requests cimport Template, room
from memkv_sglang.tiers.minio.http.bulk_stream cimport (
    CHANGED,
    DONE,
    LATE,
    READY,
    RESTED,
    SILENT,
    UNASKED,
    UNSENT,
    UNUSUAL,
    WAITS,
    WHOLE,
    Event,
    Stream,
)
from memkv_sglang.tiers.minio.http.sockets cimport POLLIN, POLLOUT, poll, pollfd

from memkv_sglang.tiers.minio.http.errors import (
    OutOfTimeError,
    ProtocolError,
    StallError,
    StatusError,
    TransferError,
)
from memkv_sglang.tiers.minio.http.framing import Framing, is_interim, parse_head
from memkv_sglang.tiers.minio.http.transport import PlainTransport

cdef enum:
    REST = 100  # milliseconds between two checks for signals


def transfer(connections, Batch batch, double deadline, double stall_timeout):
    """See bulk_loop.pyi."""
    patience = min(connection.patience(deadline) for connection in connections)
    lanes = _Lanes(connections, batch, patience)
    lanes.start()
    while lanes.active:
        event = lanes.wait(deadline, stall_timeout)
        if event == LATE:
            raise lanes.late(stall_timeout if time.monotonic() < deadline else None)
        if event == SILENT:
            lanes.drop_silent()
        elif event == RESTED:
            PyErr_CheckSignals()
        elif event != DONE:
            lanes.go_on(lanes.found, event)


cdef class _Lanes:
    """All connections of one thread."""

    cdef list lanes
    cdef Batch batch
    cdef Stream **streams
    cdef pollfd *polls
    cdef Py_ssize_t count, active, at, found
    cdef bint moved
    cdef double stalls_at, silent_at

    def __cinit__(self, connections, Batch batch, double patience):
        cdef Py_ssize_t i
        self.lanes = [_Lane(connection, batch) for connection in connections]
        self.batch = batch
        self.count = self.active = self.at = len(self.lanes)
        self.moved = True
        self.silent_at = _now() + patience
        self.streams = <Stream **>allocate(self.count, sizeof(Stream *))
        self.polls = <pollfd *>allocate(self.count, sizeof(pollfd))
        for i in range(self.count):
            self.streams[i] = (<_Lane>self.lanes[i]).stream
            self.polls[i] = pollfd(self.streams[i].fd, POLLIN, 0)

    def __dealloc__(self):
        PyMem_Free(self.streams)
        PyMem_Free(self.polls)

    cdef start(self):
        for index in range(self.count):
            self.go_on(index, WHOLE)

    cdef go_on(self, Py_ssize_t index, Event event):
        """Handle what needs Python."""
        if not (<_Lane>self.lanes[index]).go_on(event):
            self._end(index)
        self._watch(index)

    cdef void _end(self, Py_ssize_t index) noexcept nogil:
        self.polls[index].fd = -1  # which poll skips
        self.active -= 1

    cdef void _watch(self, Py_ssize_t index) noexcept nogil:
        """Wait for room to send only while there is something to send."""
        self.polls[index].events = POLLIN | POLLOUT if self.streams[index].unsent.count else POLLIN

    cdef Event wait(self, double deadline, double stall_timeout):
        """Move bytes until the lane at `found` needs attention, or time has passed."""
        cdef Event event = WAITS
        with nogil:
            while event == WAITS:
                if self.at < self.count:
                    event = self._next()
                else:
                    event = self._poll(deadline, stall_timeout)
        return event

    cdef Event _next(self) noexcept nogil:
        """Move bytes of the next lane that is ready."""
        cdef Event event
        self.found = self.at
        self.at += 1
        if not self.polls[self.found].revents:
            return WAITS
        event = self._move(self.streams[self.found], self.polls[self.found].revents)
        if event == WHOLE:
            bulk_stream.settle(self.streams[self.found])
            event = bulk_stream.begin(self.streams[self.found])
        self._watch(self.found)
        if event == DONE:
            self._end(self.found)
            return WAITS if self.active else DONE
        return event

    cdef Event _move(self, Stream *stream, short ready) noexcept nogil:
        """Receive first: a server that refuses a request may not read the rest of it."""
        cdef Event event = WAITS
        if ready & ~POLLOUT:
            event = bulk_stream.receive(stream)
        if event == WAITS and ready & POLLOUT:
            event = bulk_stream.send(stream)
        return event

    cdef Event _poll(self, double deadline, double stall_timeout) noexcept nogil:
        """Wait until bytes arrive, or can be sent."""
        cdef double left, now = _now()
        cdef int ready
        if self.moved:
            self.moved, self.stalls_at = False, now + stall_timeout
        if now >= self.silent_at and now < deadline:
            self.silent_at = INFINITY
            return SILENT
        left = min(min(deadline, self.stalls_at), self.silent_at) - now
        if left <= 0:
            return LATE
        ready = poll(self.polls, self.count, <int>min(1e3 * left + 1, REST))
        if ready <= 0:
            return RESTED
        self.at, self.moved = 0, True
        return WAITS

    cdef drop_silent(self):
        """Close reused connections that never answered: a load balancer may have dropped them.

        Their pages are left to the slow path; the other connections continue.
        """
        cdef Py_ssize_t i
        for i in range(self.count):
            lane = <_Lane>self.lanes[i]
            if self.polls[i].fd >= 0 and not lane.stream.heard and lane.connection.reused:
                lane.connection.stale = True
                lane.connection.close()
                self.batch.fall_back("stale")
                self._end(i)

    cdef late(self, stall_timeout):
        """Close the connections that have a request in flight; return the error to raise."""
        cdef Py_ssize_t i
        for i in range(self.count):
            if self.polls[i].fd >= 0:
                connection = (<_Lane>self.lanes[i]).connection
                connection.stalled = stall_timeout is not None
                connection.close()
        if stall_timeout is None:
            return OutOfTimeError("the deadline passed")
        return StallError(stall_timeout)


cdef class _Lane:
    """One connection with one request in flight."""

    cdef object connection, transport
    cdef Batch batch
    cdef list errors  # raised by the transport
    cdef bytearray memory  # for an encrypted upload
    cdef Stream *stream

    def __cinit__(self, connection, Batch batch):
        cdef Template template
        cdef size_t size
        self.connection = connection
        self.transport = connection.transport
        self.batch = batch
        self.errors = []
        self.stream = stream = <Stream *>allocate(1, sizeof(Stream))
        stream.fd = self.transport.fileno
        stream.transport = <PyObject *>self.transport
        stream.errors = <PyObject *>self.errors
        stream.work = &batch.work
        stream.plain = isinstance(self.transport, PlainTransport)
        stream.checksum = xxh3.new_state()
        stream.digest = libcrypto.new_digest()
        if batch.work.key_count:
            stream.cipher = libcrypto.new_cipher()
        if batch.work.uploads and batch.work.key_count:
            self.memory = (<Upload>batch).take_memory()
            stream.sealed = <unsigned char *>PyByteArray_AS_STRING(self.memory)
        template = batch.templates.get(connection.endpoint)
        if template is not None:
            stream.signing = &template.signing
            size = room(&template.signing, batch.longest_path)
            stream.request = <char *>allocate(size, 1)
            stream.scratch = <char *>allocate(size, 1)

    def __dealloc__(self):
        if self.stream == NULL:
            return
        if self.stream.checksum != NULL:
            xxh3.free_state(self.stream.checksum)
        if self.stream.digest != NULL:
            libcrypto.free_digest(self.stream.digest)
        if self.stream.cipher != NULL:
            libcrypto.free_cipher(self.stream.cipher)
        PyMem_Free(self.stream.request)
        PyMem_Free(self.stream.scratch)
        PyMem_Free(self.stream)

    cdef bint go_on(self, Event event) except -1:
        """Handle an event, and send the next request if the last one has its response.

        False if the connection gets no further requests.
        """
        if self.errors:
            raise self.errors[0]
        try:
            if event == UNUSUAL:
                event = self._parse_in_full()
                if event == WAITS:
                    return True
                with nogil:
                    bulk_stream.settle(self.stream)
            return self._begin(event)
        except StatusError:
            self.batch.stop()
            return False
        except (OSError, TransferError):
            self.connection.close()
            self.batch.stop()
            return False

    cdef bint _begin(self, Event event) except -1:
        if event == WHOLE:
            with nogil:
                event = bulk_stream.begin(self.stream)
        if event == READY:
            event = UNASKED
            if self.connection.is_idle():
                with nogil:
                    event = bulk_stream.send(self.stream)
        if event == UNASKED:
            self.batch.fall_back("malformed" if self.stream.heard else "stale")
            raise ProtocolError("the server sent something unasked")
        if event == UNSENT:
            self.batch.fall_back(self._closed())
            raise OSError("the request was not sent")
        if event == CHANGED:
            self.batch.fall_back("changed")
            self.batch.stop()
            return False
        return event != DONE

    cdef _closed(self):
        """Return the reason for a connection that ended during a request."""
        return "stale" if self.connection.reused and not self.stream.heard else "close"

    cdef Event _parse_in_full(self) except *:
        """Continue a response whose head is not a usual one, or that broke off.

        Raises `StatusError` for a refusal that was read completely, and `TransferError` for any
        other response that is left to the slow path.
        """
        cdef Event event
        cdef size_t received = 0
        head = self.stream.head.raw[: self.stream.head.size]
        answer, reason = None, self._closed()
        if self.stream.head.size == 0:
            if self.stream.head.received == HEAD_ROOM:
                reason = "malformed"
        elif not self.stream.framed:
            received = surplus(&self.stream.head)
            answer, reason = self._parse(head, received)
            if not reason:
                with nogil:
                    bulk_stream.accept_head(self.stream)
                    event = bulk_stream.receive(self.stream)
                if event != UNUSUAL:
                    return event
                reason = "close"
        self.batch.fall_back(reason)
        if reason == "status" and answer.keep_alive and answer.framing is Framing.LENGTH:
            # A server may refuse an upload before it has read the whole object.
            if answer.length == received and not self.batch.work.uploads:
                raise StatusError(answer.status)
        raise TransferError(f"left to the slow path: {reason}")

    cdef tuple _parse(self, bytes head, size_t received):
        """Return the parsed head, and why the response is left to the slow path, or ""."""
        cdef size_t left = self.stream.left
        if is_interim(head):
            return None, "interim"
        try:
            answer = parse_head(head)
            is_stored = not self.batch.work.uploads or answer.field(b"etag")
        except ProtocolError:
            return None, "malformed"
        if answer.status != 200:
            return answer, "status"
        if answer.framing is not Framing.LENGTH:
            return answer, "framing"
        if answer.length != left or received > left:
            return answer, "length"
        if not is_stored or self.stream.unsent.count:
            return answer, "malformed"
        return answer, "" if answer.keep_alive else "close"


cdef double _now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + 1e-9 * now.tv_nsec

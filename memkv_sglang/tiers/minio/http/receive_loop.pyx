"""The compiled fast path: receives objects over several connections in one thread.

Receiving a page evicts everything else from the CPU caches, so a line of Python between two pages
costs several times its usual price. This loop is therefore compiled; `bulk_reader` writes the
requests in advance and verifies the heads afterwards. While an object is received, the GIL is taken
only to decrypt TLS and to parse a head that `_is_usual` does not match.
"""

import time

from cpython.buffer cimport PyBUF_WRITABLE, PyBUF_WRITE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, errno
from libc.stdio cimport snprintf
from libc.math cimport INFINITY
from libc.string cimport memcmp, memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from memkv_sglang.tiers.minio.http cimport xxh3

from memkv_sglang.page import checksum_seed
from memkv_sglang.tiers.minio.http.bulk import Response
from memkv_sglang.tiers.minio.http.errors import (
    OutOfTimeError,
    ProtocolError,
    StallError,
    StatusError,
    TransferError,
)
from memkv_sglang.tiers.minio.http.transport import PlainTransport
from memkv_sglang.tiers.minio.http.framing import Framing, is_interim, parse_head


cdef extern from "<string.h>" nogil:
    void *memmem(const void *where, size_t length, const void *what, size_t size)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *polls, unsigned long count, int milliseconds)
    enum: POLLIN

cdef extern from "<sys/socket.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    enum: MSG_DONTWAIT


cdef enum:
    HEAD_ROOM = 4096  # maximum size of a response head (MinIO's have 900 bytes)
    IOV_LIMIT = 512  # buffers for one system call; the kernel takes at most 1024
    REST = 100  # milliseconds between two checks for signals

cdef enum:  # results of a receive other than a byte count and 0, the end of the stream
    NOTHING = -1
    FAILED = -2

cdef enum Event:
    WAITS  # the response is incomplete
    WHOLE  # the response is complete
    UNUSUAL  # the head needs the full parser, or the connection ended
    LATE  # the deadline or the stall timeout passed
    RESTED  # time to check for signals
    SILENT  # some reused connections have not answered the first request


cdef struct Stream:  # one connection, and the response that it receives
    int fd
    bint plain
    PyObject *lane  # the owner
    bint heard  # whether the connection has received a byte
    bint framed  # whether the head was accepted
    size_t received  # bytes in `head`
    size_t head_size  # up to the empty line; 0 until that is received
    size_t left  # missing bytes of the body
    iovec *pieces  # where they belong
    size_t count
    void *checksum  # of the body's bytes so far
    char head[HEAD_ROOM]  # the head, and the part of the body that came with it


def receive(connections, source, double deadline, double stall_timeout):
    """See receive_loop.pyi."""
    lanes = _Lanes(connections, min(connection.patience(deadline) for connection in connections))
    for index in range(len(connections)):
        lanes.go_on(index, WAITS, source)
    while lanes.active:
        event = lanes.wait(deadline, stall_timeout)
        if event == LATE:
            raise lanes.late(stall_timeout if time.monotonic() < deadline else None)
        if event == SILENT:
            lanes.drop_silent(source)
        elif event == RESTED:
            PyErr_CheckSignals()
        else:
            lanes.go_on(lanes.found, event, source)


cdef class _Lanes:
    """All connections of one thread."""

    cdef list lanes
    cdef Stream **streams
    cdef pollfd *polls
    cdef Py_ssize_t count, active, at, found
    cdef bint moved
    cdef double stalls_at, silent_at

    def __cinit__(self, connections, double patience):
        cdef Py_ssize_t i
        self.lanes = [_Lane(connection) for connection in connections]
        self.count = self.active = self.at = len(self.lanes)
        self.moved = True
        self.silent_at = _now() + patience
        self.streams = <Stream **>PyMem_Calloc(self.count, sizeof(Stream *))
        self.polls = <pollfd *>PyMem_Calloc(self.count, sizeof(pollfd))
        if self.streams == NULL or self.polls == NULL:
            raise MemoryError
        for i in range(self.count):
            self.streams[i] = &(<_Lane>self.lanes[i]).stream
            self.polls[i] = pollfd(self.streams[i].fd, POLLIN, 0)

    def __dealloc__(self):
        PyMem_Free(self.streams)
        PyMem_Free(self.polls)

    cdef go_on(self, Py_ssize_t index, Event event, source):
        if not (<_Lane>self.lanes[index]).go_on(event, source):
            self.polls[index].fd = -1  # which poll skips
            self.active -= 1

    cdef Event wait(self, double deadline, double stall_timeout):
        """Receive until the lane at `found` needs attention, or time has passed."""
        cdef Event event = WAITS
        with nogil:
            while event == WAITS:
                if self.at < self.count:
                    event = self._next()
                else:
                    event = self._poll(deadline, stall_timeout)
        return event

    cdef Event _next(self) noexcept nogil:
        """Receive the bytes that have arrived for the next lane."""
        self.found = self.at
        self.at += 1
        return _receive(self.streams[self.found]) if self.polls[self.found].revents else WAITS

    cdef Event _poll(self, double deadline, double stall_timeout) noexcept nogil:
        """Wait until bytes arrive."""
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

    cdef drop_silent(self, source):
        """Close reused connections that never answered: a load balancer may have dropped them.

        Their pages are left to the slow path; the other connections continue.
        """
        cdef Py_ssize_t i
        for i in range(self.count):
            lane = <_Lane>self.lanes[i]
            if self.polls[i].fd >= 0 and not lane.stream.heard and lane.connection.reused:
                lane.drop()
                source.fall_back("stale")
                self.polls[i].fd = -1
                self.active -= 1

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

    cdef object connection, transport, request
    cdef BaseException error  # raised in `_take_decrypted`, which cannot propagate it
    cdef Stream stream
    cdef iovec *pieces
    cdef Py_buffer *views
    cdef Py_ssize_t held, capacity

    def __cinit__(self, connection):
        self.connection = connection
        self.transport = connection.transport
        self.stream.fd = self.transport.fileno
        self.stream.lane = <PyObject *>self
        self.stream.plain = isinstance(self.transport, PlainTransport)
        self.stream.checksum = xxh3.new_state()

    def __dealloc__(self):
        self._release()
        if self.stream.checksum != NULL:
            xxh3.free_state(self.stream.checksum)
        PyMem_Free(self.views)
        PyMem_Free(self.pieces)

    cdef bint go_on(self, Event event, source) except -1:
        """Finish the response in flight, if any, and send the next request; False at the end."""
        if self.error is not None:
            raise self.error
        try:
            if event == UNUSUAL:
                event = self._parse_in_full(source)
                if event == WAITS:
                    return True
            if event == WHOLE:
                self._deliver(source)
            return self._begin(source)
        except StatusError:
            source.stop()
            return False
        except (OSError, TransferError):
            self.connection.close()
            source.stop()
            return False

    cdef drop(self):
        self.connection.stale = True
        self.connection.close()
        self._release()

    cdef _begin(self, source):
        self.request = source.take(self.connection.endpoint)
        if self.request is None:
            return False
        self._hold(self.request.page.buffers)
        xxh3.reset(self.stream.checksum, checksum_seed(self.request.page.key))
        self.stream.received = self.stream.head_size = 0
        self.stream.framed = False
        if not self.connection.is_idle():
            source.fall_back("malformed" if self.stream.heard else "stale")
            raise ProtocolError("the server sent something unasked")
        self.transport.send_now(self.request.head)
        return True

    cdef _deliver(self, source):
        head = self.stream.head[: self.stream.head_size]
        self._release()
        source.deliver(Response(self.request.number, head, xxh3.digest(self.stream.checksum)))

    cdef Event _parse_in_full(self, source) except *:
        """Continue a response that `_is_usual` did not match, or that broke off.

        Raises `StatusError` for a refusal that was read completely, and `TransferError` for any
        other response that is left to the slow path.
        """
        cdef Event event = UNUSUAL
        head = self.stream.head[: self.stream.head_size]
        size = self.stream.received - len(head) - 2
        answer, reason = None, "close"
        if self.stream.head_size == 0:
            if self.stream.received == HEAD_ROOM:
                reason = "malformed"
            elif self.connection.reused and not self.stream.heard:
                reason = "stale"
        elif not self.stream.framed:
            answer, reason = _parse(head, size, self.stream.left)
            if not reason:
                with nogil:
                    _copy_body(&self.stream)
                    event = _receive(&self.stream)
                if event != UNUSUAL:
                    return event
                reason = "close"
        self._release()
        source.fall_back(reason)
        if reason == "status" and answer.keep_alive and answer.framing is Framing.LENGTH:
            if answer.length == size:
                raise StatusError(answer.status)
        raise TransferError(f"left to the slow path: {reason}")

    cdef _hold(self, buffers):
        """Pin the buffers' memory while it is written to."""
        cdef Py_buffer *view
        self._reserve(len(buffers))
        self.stream.pieces, self.stream.count, self.stream.left = self.pieces, 0, 0
        for buffer in buffers:
            view = &self.views[self.held]
            PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
            self.held += 1
            if view.len:
                self.pieces[self.stream.count] = iovec(view.buf, view.len)
                self.stream.count += 1
                self.stream.left += view.len

    cdef _reserve(self, Py_ssize_t count):
        if count <= self.capacity:
            return
        PyMem_Free(self.views)
        PyMem_Free(self.pieces)
        self.capacity = 0
        self.views = <Py_buffer *>PyMem_Calloc(count, sizeof(Py_buffer))
        self.pieces = <iovec *>PyMem_Calloc(count, sizeof(iovec))
        if self.views == NULL or self.pieces == NULL:
            raise MemoryError
        self.capacity = count

    cdef _release(self):
        while self.held:
            self.held -= 1
            PyBuffer_Release(&self.views[self.held])


cdef tuple _parse(bytes head, size_t received, size_t left):
    """Return the parsed head, and why the response is left to the slow path; empty if it is not."""
    if is_interim(head):
        return None, "interim"
    try:
        answer = parse_head(head)
    except ProtocolError:
        return None, "malformed"
    if answer.status != 200:
        return answer, "status"
    if answer.framing is not Framing.LENGTH:
        return answer, "framing"
    if answer.length != left or received > left:
        return answer, "length"
    return answer, "" if answer.keep_alive else "close"


cdef Event _receive(Stream *stream) noexcept nogil:
    """Receive the bytes that have arrived."""
    cdef iovec space
    cdef size_t asked
    cdef ssize_t count
    while stream.head_size == 0:
        space.iov_base = stream.head + stream.received
        space.iov_len = HEAD_ROOM - stream.received
        count = _take(stream, &space, 1)  # 0 also if the head is too long
        if count <= 0:
            return WAITS if count == NOTHING else UNUSUAL
        stream.heard = True
        stream.received += count
        if not _read_head(stream):
            return UNUSUAL
        if <size_t>count < space.iov_len and stream.left:
            return WAITS
    while stream.left:
        asked = stream.left if stream.plain else stream.pieces.iov_len
        count = _take(stream, stream.pieces, min(stream.count, <size_t>IOV_LIMIT))
        if count <= 0:
            return WAITS if count == NOTHING else UNUSUAL
        _advance(stream, count)
        if <size_t>count < asked:
            return WAITS
    return WHOLE


cdef bint _read_head(Stream *stream) noexcept nogil:
    """Look for the end of the head; False if the head needs the full parser."""
    cdef char *end = <char *>memmem(stream.head, stream.received, b"\r\n\r\n", 4)
    if end == NULL:
        return True
    stream.head_size = end + 2 - stream.head
    if stream.received - stream.head_size - 2 > stream.left or not _is_usual(stream):
        return False
    _copy_body(stream)
    return True


cdef void _copy_body(Stream *stream) noexcept nogil:
    """Copy the part of the body that came with the head into the page."""
    cdef char *body = stream.head + stream.head_size + 2
    cdef size_t count, size = stream.received - stream.head_size - 2
    stream.framed = True
    while size:
        count = min(size, stream.pieces.iov_len)
        memcpy(stream.pieces.iov_base, body, count)
        _advance(stream, count)
        body += count
        size -= count


cdef bint _is_usual(Stream *stream) noexcept nogil:
    """Fast path: True for a 200 of the page's length on a connection that stays open.

    False means "parse the head in full"; must not match a head that `parse_head` reads differently.
    """
    cdef char lower[HEAD_ROOM]
    cdef char expected[64]
    cdef char *found
    cdef char *connection
    cdef size_t i, size = stream.head_size
    cdef size_t length = snprintf(expected, 64, b"\r\ncontent-length: %zu\r\n", stream.left)
    if size < 13 or memcmp(stream.head, b"HTTP/1.1 200 ", 13):
        return False
    for i in range(size):
        lower[i] = stream.head[i] | 0x20 if 65 <= stream.head[i] <= 90 else stream.head[i]
    found = <char *>memmem(lower, size, b"\r\ncontent-length:", 17)
    connection = <char *>memmem(lower, size, b"\r\nconnection:", 13)
    return (
        found != NULL
        and found == memmem(lower, size, expected, length)
        and memmem(found + 17, lower + size - found - 17, b"\r\ncontent-length:", 17) == NULL
        and memmem(lower, size, b"\r\ntransfer-encoding:", 20) == NULL
        and connection == memmem(lower, size, b"\r\nconnection: keep-alive\r\n", 26)
        and (
            connection == NULL
            or memmem(connection + 13, lower + size - connection - 13, b"\r\nconnection:", 13) == NULL
        )
    )


cdef void _advance(Stream *stream, size_t count) noexcept nogil:
    """Hash the `count` bytes that just came, while they are in the cache, and skip them."""
    stream.left -= count
    while stream.count and count >= stream.pieces.iov_len:
        xxh3.update(stream.checksum, stream.pieces.iov_base, stream.pieces.iov_len)
        count -= stream.pieces.iov_len
        stream.pieces += 1
        stream.count -= 1
    if count:
        xxh3.update(stream.checksum, stream.pieces.iov_base, count)
        stream.pieces.iov_base = <char *>stream.pieces.iov_base + count
        stream.pieces.iov_len -= count


cdef ssize_t _take(Stream *stream, iovec *pieces, size_t count) noexcept nogil:
    cdef msghdr message
    cdef ssize_t got
    if not stream.plain:
        return _take_decrypted(stream, pieces)
    memset(&message, 0, sizeof(message))
    message.msg_iov, message.msg_iovlen = pieces, count
    got = recvmsg(stream.fd, &message, MSG_DONTWAIT)
    if got < 0:
        return NOTHING if errno == EAGAIN else FAILED
    return got


cdef ssize_t _take_decrypted(Stream *stream, iovec *piece) noexcept with gil:
    space = PyMemoryView_FromMemory(<char *>piece.iov_base, piece.iov_len, PyBUF_WRITE)
    lane = <_Lane>stream.lane
    try:
        return lane.transport.receive_now([space])
    except BlockingIOError:
        return NOTHING
    except OSError:
        return FAILED
    except BaseException as error:
        lane.error = error
        return FAILED


cdef double _now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + 1e-9 * now.tv_nsec

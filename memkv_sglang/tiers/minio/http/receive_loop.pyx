"""Objects received by one thread over several connections, in a loop that does little else.

Between two pages the caches are full of page bytes, and a line of Python costs several times what
it costs in a row. So this is compiled, requests are written before, and heads judged after
(`reader`). Between the first byte of an object and its last, the interpreter's lock is taken only
for what TLS decrypts.
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
from memkv_sglang.tiers.minio.objects.bulk import Response
from memkv_sglang.tiers.minio.http.errors import (
    OutOfTimeError,
    ProtocolError,
    StallError,
    StatusError,
    TransferError,
)
from memkv_sglang.tiers.minio.http.transport import PlainTransport
from memkv_sglang.tiers.minio.http.framing import parse_head


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
    HEAD_ROOM = 4096  # bytes of a response's head at most (MinIO's have 900)
    IOV_LIMIT = 512  # pieces of memory for one system call; the kernel takes at most 1024
    REST = 100  # milliseconds: a signal that comes just before a wait does not end it

cdef enum:  # what a receive returns beside a count, and 0 for the stream's end
    NOTHING = -1
    FAILED = -2

cdef enum Event:
    WAITS  # for bytes
    WHOLE  # is the response
    ODD  # is the response, or the connection: not as it should be
    LATE
    RESTED  # for a while: time to look for signals
    SILENT  # are some reused connections since the first request


cdef struct Stream:  # one connection, and the response that comes from it
    int fd
    bint plain
    PyObject *lane  # that it belongs to
    bint heard  # whether a byte has come from it
    size_t received  # bytes in `head`
    size_t head_size  # up to the empty line; 0 until it is there
    size_t left  # bytes of the body that are missing
    iovec *pieces  # of memory for them
    size_t count
    void *checksum  # of what came of the body
    char head[HEAD_ROOM]  # and what came of the body with it


def receive(connections, source, double deadline, double stall_timeout):
    """See loop.pyi."""
    lanes = _Lanes(connections, min(connection.patience(deadline) for connection in connections))
    for index in range(len(connections)):
        lanes.go_on(index, WAITS, source)
    while lanes.active:
        event = lanes.wait(deadline, stall_timeout)
        if event == LATE:
            raise lanes.late(stall_timeout if time.monotonic() < deadline else None)
        if event == SILENT:
            lanes.drop_silent()
        elif event == RESTED:
            PyErr_CheckSignals()
        else:
            lanes.go_on(lanes.found, event, source)


cdef class _Lanes:
    """The connections of one thread."""

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
        """Receive until there is something to do for one of them, which is the `found`."""
        cdef Event event = WAITS
        with nogil:
            while event == WAITS:
                if self.at < self.count:
                    event = self._next()
                else:
                    event = self._poll(deadline, stall_timeout)
        return event

    cdef Event _next(self) noexcept nogil:
        """Receive what is there for the next of them."""
        self.found = self.at
        self.at += 1
        return _receive(self.streams[self.found]) if self.polls[self.found].revents else WAITS

    cdef Event _poll(self, double deadline, double stall_timeout) noexcept nogil:
        """Wait until something is there."""
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
        """Close reused connections that never answered: a balancer may have forgotten them.

        Their pages are left to the caller, the other connections go on.
        """
        cdef Py_ssize_t i
        for i in range(self.count):
            lane = <_Lane>self.lanes[i]
            if self.polls[i].fd >= 0 and not lane.stream.heard and lane.connection.reused:
                lane.drop()
                self.polls[i].fd = -1
                self.active -= 1

    cdef late(self, stall_timeout):
        """Close those that have a request under way, return why."""
        cdef Py_ssize_t i
        for i in range(self.count):
            if self.polls[i].fd >= 0:
                connection = (<_Lane>self.lanes[i]).connection
                connection.stalled = stall_timeout is not None
                connection.close()
        if stall_timeout is None:
            return OutOfTimeError("the deadline came first")
        return StallError(stall_timeout)


cdef class _Lane:
    """One connection with one request under way."""

    cdef object connection, transport, request
    cdef BaseException error  # that came where nobody could be told
    cdef Stream stream
    cdef iovec *pieces
    cdef Py_buffer *views
    cdef Py_ssize_t held, room

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
        """Finish what is under way, if anything is, and begin the next; False at the end."""
        if self.error is not None:
            raise self.error
        try:
            if event != WAITS:
                self._finish(event, source)
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
        if not self.connection.is_idle():
            raise ProtocolError("more than was asked for")
        self.transport.send_now(self.request.head)
        return True

    cdef _finish(self, Event event, source):
        head = self.stream.head[: self.stream.head_size]
        self._release()
        if event == ODD:
            self._judge(head)
        source.deliver(Response(self.request.number, head, xxh3.digest(self.stream.checksum)))

    cdef _judge(self, bytes head):
        """Raise `StatusError` for a refusal that was read to its end, else `ProtocolError`."""
        if head and not head.startswith(b"HTTP/1.1 200 "):
            answer = parse_head(head)
            if answer.keep_alive and answer.length == self.stream.received - len(head) - 2:
                raise StatusError(answer.status)
        raise ProtocolError("not what was asked for")

    cdef _hold(self, buffers):
        """Have the buffers stay where they are while they are written to."""
        cdef Py_buffer *view
        self._make_room(len(buffers))
        self.stream.pieces, self.stream.count, self.stream.left = self.pieces, 0, 0
        for buffer in buffers:
            view = &self.views[self.held]
            PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
            self.held += 1
            if view.len:
                self.pieces[self.stream.count] = iovec(view.buf, view.len)
                self.stream.count += 1
                self.stream.left += view.len

    cdef _make_room(self, Py_ssize_t count):
        if count <= self.room:
            return
        PyMem_Free(self.views)
        PyMem_Free(self.pieces)
        self.room = 0
        self.views = <Py_buffer *>PyMem_Calloc(count, sizeof(Py_buffer))
        self.pieces = <iovec *>PyMem_Calloc(count, sizeof(iovec))
        if self.views == NULL or self.pieces == NULL:
            raise MemoryError
        self.room = count

    cdef _release(self):
        while self.held:
            self.held -= 1
            PyBuffer_Release(&self.views[self.held])


cdef Event _receive(Stream *stream) noexcept nogil:
    """Receive what is there."""
    cdef iovec room
    cdef size_t asked
    cdef ssize_t count
    while stream.head_size == 0:
        room.iov_base = stream.head + stream.received
        room.iov_len = HEAD_ROOM - stream.received
        count = _take(stream, &room, 1)  # 0 for a head that has no end, too
        if count <= 0:
            return WAITS if count == NOTHING else ODD
        stream.heard = True
        stream.received += count
        if not _read_head(stream):
            return ODD
        if <size_t>count < room.iov_len and stream.left:
            return WAITS
    while stream.left:
        asked = stream.left if stream.plain else stream.pieces.iov_len
        count = _take(stream, stream.pieces, min(stream.count, <size_t>IOV_LIMIT))
        if count <= 0:
            return WAITS if count == NOTHING else ODD
        _advance(stream, count)
        if <size_t>count < asked:
            return WAITS
    return WHOLE


cdef bint _read_head(Stream *stream) noexcept nogil:
    """Look for the head's end, copy what is behind it; False if it is not what was asked for."""
    cdef char *end = <char *>memmem(stream.head, stream.received, b"\r\n\r\n", 4)
    cdef size_t behind, count
    if end == NULL:
        return True
    stream.head_size = end + 2 - stream.head
    behind = stream.received - stream.head_size - 2
    if behind > stream.left or not _frames(stream):
        return False
    end += 4
    while behind:
        count = min(behind, stream.pieces.iov_len)
        memcpy(stream.pieces.iov_base, end, count)
        _advance(stream, count)
        end += count
        behind -= count
    return True


cdef bint _frames(Stream *stream) noexcept nogil:
    """Tell whether a head says that the whole object follows, and then the next response."""
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
    """Hash the first bytes of what was missing while caches hold them, go on behind them."""
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
    room = PyMemoryView_FromMemory(<char *>piece.iov_base, piece.iov_len, PyBUF_WRITE)
    lane = <_Lane>stream.lane
    try:
        return lane.transport.receive_now([room])
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

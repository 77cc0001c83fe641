"""The compiled fast path: receives objects over several connections in one thread.

Receiving a page evicts everything else from the CPU caches, so a line of Python between two pages
costs several times its usual price, and the threads of other calls wait for the GIL meanwhile. This
loop therefore signs, sends, receives, decrypts and verifies without the GIL. It takes the GIL only
for TLS, and to parse a head that `_is_usual` does not match.
"""

import time

from cpython.buffer cimport PyBUF_WRITABLE, PyBUF_WRITE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, errno
from libc.math cimport INFINITY
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from memkv_sglang.tiers.minio.http cimport libcrypto, xxh3
from memkv_sglang.tiers.minio.http.libcrypto cimport Hmac

from memkv_sglang.page import checksum_seed
from memkv_sglang.tiers.minio.http.bulk import Response, ignore_fallback
from memkv_sglang.tiers.minio.http.errors import (
    OutOfTimeError,
    ProtocolError,
    StallError,
    StatusError,
    TransferError,
)
from memkv_sglang.tiers.minio.http.framing import Framing, is_interim, parse_head
from memkv_sglang.tiers.minio.http.transport import PlainTransport


cdef extern from *:
    """
    #define take_number(counter) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)
    """
    Py_ssize_t take_number(Py_ssize_t *counter) nogil

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
    ssize_t recv(int fd, void *buffer, size_t length, int flags)
    ssize_t send(int fd, const void *buffer, size_t length, int flags)
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL
    enum: MSG_PEEK


cdef enum:
    HEAD_ROOM = 4096  # maximum size of a response head (MinIO's have 900 bytes)
    IOV_LIMIT = 512  # buffers for one system call; the kernel takes at most 1024
    REST = 100  # milliseconds between two checks for signals
    NONCE_SIZE = 12
    CHECKSUM_SIZE = 16
    TAIL_SIZE = 32  # of an encrypted page: encrypted checksum and tag
    SIGNATURE_SIZE = 64
    ROOM = 64  # for the fixed parts of a request

cdef enum:  # results of a receive other than a byte count and 0, the end of the stream
    NOTHING = -1
    FAILED = -2

cdef enum Event:
    WAITS  # the response is incomplete
    WHOLE  # the response is complete
    READY  # the connection can take the next request, but not without the GIL
    DONE  # there are no more requests
    UNUSUAL  # the head needs the full parser, or the connection ended
    UNASKED  # the connection has bytes, or an end, that no request asked for
    UNSENT  # a request did not fit the send buffer, or the connection ended
    LATE  # the deadline or the stall timeout passed
    RESTED  # time to check for signals
    SILENT  # some reused connections have not answered the first request

cdef enum State:
    OPEN  # not received, or not completely
    VERIFIED
    UNVERIFIED  # received, but the metadata need the full parser
    FORGED  # received, but it could not be decrypted


cdef struct Item:  # one object
    const char *path
    size_t path_length
    iovec *pieces  # of the object, where they belong
    size_t count
    size_t length
    unsigned long long seed
    const char *associated  # data that an encrypted page is bound to
    State state
    unsigned char checksum[CHECKSUM_SIZE]
    char *head  # a copy, if it is needed after the response
    size_t head_size
    unsigned char nonce[NONCE_SIZE]
    unsigned char tail[TAIL_SIZE]


cdef struct Work:  # what the streams of all threads share
    Item *items
    Py_ssize_t count
    Py_ssize_t next
    bint stopped
    const char *prefix  # see `Metadata`
    size_t prefix_size
    const char **lines
    size_t *line_sizes
    size_t line_count
    const char *length
    const char *checksum
    size_t key_count  # 0 unless objects are encrypted
    const char **key_lines
    size_t *key_line_sizes
    Hmac *keys
    int associated_size


cdef struct Signing:  # a `BulkTemplate`
    const char *start
    size_t start_size
    size_t method_size
    const char *canonical
    size_t canonical_size
    const char *text
    size_t text_size
    const char *lines
    size_t lines_size
    Hmac key


cdef struct Stream:  # one connection, and the response that it receives
    int fd
    bint plain
    PyObject *lane  # the owner
    Work *work
    Signing *signing  # NULL if this server gets no requests
    Item *item
    char *request
    char *scratch
    size_t request_size
    void *digest
    bint heard  # whether the connection has received a byte
    bint framed  # whether the head was accepted
    bint lowered  # whether `lower` holds the head
    size_t received  # bytes in `head`
    size_t head_size  # up to the empty line; 0 until that is received
    size_t left  # missing bytes of the body
    iovec *pieces  # where they belong
    size_t count
    void *checksum  # of the body's bytes so far
    void *cipher
    Hmac *key  # of the encrypted page; NULL if this node does not have it
    bint sound  # whether decryption has not failed so far
    char head[HEAD_ROOM]  # the head, and the part of the body that came with it
    char lower[HEAD_ROOM]


cdef class Batch:
    """See receive_loop.pyi."""

    cdef Work work
    cdef list kept  # objects that `work` points into
    cdef dict templates
    cdef object fall_back
    cdef iovec *pieces
    cdef Py_buffer *views
    cdef Py_ssize_t held
    cdef size_t longest_path

    def __init__(
        self, requests, templates, metadata, fall_back=ignore_fallback, *, sealing=None
    ):
        cdef Py_ssize_t i = 0, pieces = 0
        self.kept = [metadata, requests]
        self.fall_back = fall_back
        self.templates = {
            endpoint: _Template(template) for endpoint, template in templates.items()
        }
        self._expect(metadata)
        if sealing is not None:
            self._decrypt(sealing)
        self.work.items = <Item *>_allocate(len(requests), sizeof(Item))
        for path, page in requests:
            pieces += len(page.buffers) + 2
        self.views = <Py_buffer *>_allocate(pieces, sizeof(Py_buffer))
        self.pieces = <iovec *>_allocate(pieces, sizeof(iovec))
        pieces = 0
        for path, page in requests:
            pieces += self._add(&self.work.items[i], &self.pieces[pieces], path, page, sealing)
            i += 1
        self.work.count = i

    cdef _expect(self, metadata):
        self.work.prefix, self.work.prefix_size = metadata.prefix, len(metadata.prefix)
        self.work.length, self.work.checksum = metadata.length, metadata.checksum
        self.work.line_count = len(metadata.lines)
        self.work.lines = <const char **>_allocate(self.work.line_count, sizeof(char *))
        self.work.line_sizes = <size_t *>_allocate(self.work.line_count, sizeof(size_t))
        for i, line in enumerate(metadata.lines):
            self.work.lines[i], self.work.line_sizes[i] = line, len(line)

    cdef _decrypt(self, sealing):
        cdef size_t count = len(sealing.keys)
        lines = list(sealing.keys)
        self.kept.append(lines)
        self.work.key_lines = <const char **>_allocate(count, sizeof(char *))
        self.work.key_line_sizes = <size_t *>_allocate(count, sizeof(size_t))
        self.work.keys = <Hmac *>_allocate(count, sizeof(Hmac))
        self.work.key_count = count
        for i, line in enumerate(lines):
            self.work.key_lines[i], self.work.key_line_sizes[i] = line, len(line)
            libcrypto.hmac_init(&self.work.keys[i], sealing.keys[line])

    cdef Py_ssize_t _add(self, Item *item, iovec *pieces, bytes path, page, sealing) except -1:
        """Fill an item; return the number of its pieces."""
        cdef Py_buffer *view
        key = page.key
        item.path, item.path_length = path, len(path)
        self.longest_path = max(self.longest_path, item.path_length)
        item.seed = checksum_seed(key)
        item.pieces = pieces
        if sealing is not None:
            associated = sealing.context + key.namespace + key.hash
            self.kept.append(associated)
            item.associated, self.work.associated_size = associated, len(associated)
            _append(item, item.nonce, NONCE_SIZE)
        for buffer in page.buffers:
            view = &self.views[self.held]
            PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
            self.held += 1
            _append(item, view.buf, view.len)
        if sealing is not None:
            _append(item, item.tail, TAIL_SIZE)
        return item.count

    def stop(self):
        self.work.stopped = True

    def close(self):
        while self.held:
            self.held -= 1
            PyBuffer_Release(&self.views[self.held])

    def checksums(self):
        cdef Py_ssize_t i
        cdef Item *item
        found = []
        for i in range(self.work.count):
            item = &self.work.items[i]
            found.append(
                item.checksum[:CHECKSUM_SIZE] if item.state == VERIFIED else None
            )
        return found

    def unverified(self):
        cdef Py_ssize_t i
        cdef Item *item
        found = []
        for i in range(self.work.count):
            item = &self.work.items[i]
            if item.state == UNVERIFIED and item.head != NULL:
                head = item.head[: item.head_size]
                found.append(Response(i, head, item.checksum[:CHECKSUM_SIZE]))
        return found

    def __dealloc__(self):
        cdef Py_ssize_t i
        cdef size_t k
        self.close()
        if self.work.items != NULL:
            for i in range(self.work.count):
                free(self.work.items[i].head)
        if self.work.keys != NULL:
            for k in range(self.work.key_count):
                libcrypto.hmac_free(&self.work.keys[k])
        for memory in (
            <size_t>self.views, <size_t>self.pieces, <size_t>self.work.items,
            <size_t>self.work.lines, <size_t>self.work.line_sizes, <size_t>self.work.keys,
            <size_t>self.work.key_lines, <size_t>self.work.key_line_sizes,
        ):
            PyMem_Free(<void *>memory)


cdef class _Template:
    """A `BulkTemplate` as `Signing`."""

    cdef object template  # which `signing` points into
    cdef Signing signing

    def __cinit__(self, template):
        self.template = template
        self.signing.start, self.signing.start_size = template.start, len(template.start)
        self.signing.method_size = template.start.index(b" ")
        self.signing.canonical = template.canonical
        self.signing.canonical_size = len(template.canonical)
        self.signing.text, self.signing.text_size = template.text, len(template.text)
        self.signing.lines, self.signing.lines_size = template.lines, len(template.lines)
        libcrypto.hmac_init(&self.signing.key, template.key)

    def __dealloc__(self):
        libcrypto.hmac_free(&self.signing.key)


cdef void *_allocate(size_t count, size_t size) except NULL:
    memory = PyMem_Calloc(max(count, <size_t>1), size)
    if memory == NULL:
        raise MemoryError
    return memory


cdef void _append(Item *item, void *memory, size_t length) noexcept:
    if length:
        item.pieces[item.count] = iovec(memory, length)
        item.count += 1
        item.length += length


def receive(connections, Batch batch, double deadline, double stall_timeout):
    """See receive_loop.pyi."""
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
        self.streams = <Stream **>_allocate(self.count, sizeof(Stream *))
        self.polls = <pollfd *>_allocate(self.count, sizeof(pollfd))
        for i in range(self.count):
            self.streams[i] = (<_Lane>self.lanes[i]).stream
            self.polls[i] = pollfd(self.streams[i].fd, POLLIN, 0)

    def __dealloc__(self):
        PyMem_Free(self.streams)
        PyMem_Free(self.polls)

    cdef start(self):
        for index in range(self.count):
            self.go_on(index, READY)

    cdef go_on(self, Py_ssize_t index, Event event):
        """Handle what needs Python."""
        if not (<_Lane>self.lanes[index]).go_on(event):
            self._end(index)

    cdef void _end(self, Py_ssize_t index) noexcept nogil:
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
        cdef Event event
        self.found = self.at
        self.at += 1
        if not self.polls[self.found].revents:
            return WAITS
        event = _receive(self.streams[self.found])
        if event == WHOLE:
            _settle(self.streams[self.found])
            event = _begin(self.streams[self.found])
        if event == DONE:
            self._end(self.found)
            return WAITS if self.active else DONE
        return event

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
    cdef BaseException error  # raised in `_take_decrypted`, which cannot propagate it
    cdef Stream *stream

    def __cinit__(self, connection, Batch batch):
        cdef _Template template
        cdef size_t room
        self.connection = connection
        self.transport = connection.transport
        self.batch = batch
        self.stream = stream = <Stream *>_allocate(1, sizeof(Stream))
        stream.fd = self.transport.fileno
        stream.lane = <PyObject *>self
        stream.work = &batch.work
        stream.plain = isinstance(self.transport, PlainTransport)
        stream.checksum = xxh3.new_state()
        stream.digest = libcrypto.new_digest()
        if batch.work.key_count:
            stream.cipher = libcrypto.new_cipher()
        template = batch.templates.get(connection.endpoint)
        if template is not None:
            stream.signing = &template.signing
            room = template.signing.start_size + batch.longest_path + ROOM
            stream.request = <char *>_allocate(room + template.signing.lines_size + SIGNATURE_SIZE, 1)
            room += max(template.signing.canonical_size, template.signing.text_size)
            stream.scratch = <char *>_allocate(room, 1)

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
        if self.error is not None:
            raise self.error
        try:
            if event == UNUSUAL:
                event = self._parse_in_full()
                if event == WAITS:
                    return True
                with nogil:
                    _settle(self.stream)
            return self._begin(event)
        except StatusError:
            self.batch.stop()
            return False
        except (OSError, TransferError):
            self.connection.close()
            self.batch.stop()
            return False

    cdef bint _begin(self, Event event) except -1:
        if event == READY or event == WHOLE or event == UNUSUAL:
            with nogil:
                event = _begin(self.stream)
        if event == READY:
            if self.connection.is_idle():
                self.transport.send_now(self.stream.request[: self.stream.request_size])
                return True
            event = UNASKED
        if event == UNASKED:
            self.batch.fall_back("malformed" if self.stream.heard else "stale")
            raise ProtocolError("the server sent something unasked")
        if event == UNSENT:
            raise OSError("the request was not sent")
        return event != DONE

    cdef Event _parse_in_full(self) except *:
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
                    _copy_body(self.stream)
                    event = _receive(self.stream)
                if event != UNUSUAL:
                    return event
                reason = "close"
        self.batch.fall_back(reason)
        if reason == "status" and answer.keep_alive and answer.framing is Framing.LENGTH:
            if answer.length == size:
                raise StatusError(answer.status)
        raise TransferError(f"left to the slow path: {reason}")


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


cdef Event _begin(Stream *stream) noexcept nogil:
    """Send the next request; a TLS connection is only made ready for it."""
    cdef Work *work = stream.work
    cdef Py_ssize_t number
    cdef char peeked
    if stream.signing == NULL or work.stopped:
        return DONE
    number = take_number(&work.next)
    if number >= work.count:
        return DONE
    stream.item = &work.items[number]
    stream.pieces, stream.count = stream.item.pieces, stream.item.count
    stream.left = stream.item.length
    stream.received = stream.head_size = 0
    stream.framed = stream.lowered = False
    xxh3.reset(stream.checksum, stream.item.seed)
    if not _write_request(stream):
        return UNSENT
    if not stream.plain:
        return READY
    if recv(stream.fd, &peeked, 1, MSG_PEEK | MSG_DONTWAIT) >= 0 or errno != EAGAIN:
        return UNASKED
    if send(stream.fd, stream.request, stream.request_size, MSG_DONTWAIT | MSG_NOSIGNAL) != (
        <ssize_t>stream.request_size
    ):
        return UNSENT
    return WAITS


cdef bint _write_request(Stream *stream) noexcept nogil:
    """Write and sign the request for the item; see `auth.sigv4.Template.head`."""
    cdef Signing *signing = stream.signing
    cdef Item *item = stream.item
    cdef unsigned char hashed[32]
    cdef char *at = stream.scratch
    at = _put(at, signing.start, signing.method_size)
    at = _put(at, b"\n", 1)
    at = _put(
        at, signing.start + signing.method_size + 1, signing.start_size - signing.method_size - 1
    )
    at = _put(at, item.path, item.path_length)
    at = _put(at, signing.canonical, signing.canonical_size)
    if not libcrypto.sha256(stream.digest, stream.scratch, at - stream.scratch, hashed):
        return False
    at = _put(stream.scratch, signing.text, signing.text_size)
    at = _put_digits(at, hashed, 32)
    if not libcrypto.hmac(
        &signing.key, stream.digest, stream.scratch, at - stream.scratch, hashed
    ):
        return False
    at = _put(stream.request, signing.start, signing.start_size)
    at = _put(at, item.path, item.path_length)
    at = _put(at, b" HTTP/1.1\r\n", 11)
    at = _put(at, signing.lines, signing.lines_size)
    at = _put_digits(at, hashed, 32)
    at = _put(at, b"\r\n\r\n", 4)
    stream.request_size = at - stream.request
    return True


cdef char *_put(char *at, const char *text, size_t length) noexcept nogil:
    memcpy(at, text, length)
    return at + length


cdef char *_put_digits(char *at, const unsigned char *data, size_t length) noexcept nogil:
    cdef const char *digits = "0123456789abcdef"
    cdef size_t i
    for i in range(length):
        at[2 * i] = digits[data[i] >> 4]
        at[2 * i + 1] = digits[data[i] & 15]
    return at + 2 * length


cdef void _settle(Stream *stream) noexcept nogil:
    """Record a complete response with its checksum, and whether its metadata match."""
    cdef Item *item = stream.item
    cdef bint matches
    xxh3.digest(stream.checksum, item.checksum)
    matches = stream.lowered and _matches(stream)
    if stream.work.key_count and not (matches and _is_authentic(stream)):
        item.state = FORGED
        return
    if not matches:
        item.head = <char *>malloc(stream.head_size)
        if item.head == NULL:
            return
        memcpy(item.head, stream.head, stream.head_size)
        item.head_size = stream.head_size
    item.state = VERIFIED if matches else UNVERIFIED


cdef bint _matches(Stream *stream) noexcept nogil:
    """Return whether the metadata match the object and its checksum.

    Fast path: False means "parse the head in full".
    """
    cdef Work *work = stream.work
    cdef char line[256]
    cdef char *at = line
    cdef size_t i, count = 0
    cdef char *found = stream.lower
    cdef char *end = stream.lower + stream.head_size
    while True:  # no field may be repeated, nor be there in addition
        found = <char *>memmem(found, end - found, work.prefix, work.prefix_size)
        if found == NULL:
            break
        found += work.prefix_size
        count += 1
    if count != work.line_count + 2 + (work.key_count != 0):
        return False
    for i in range(work.line_count):
        if not _has_line(stream, work.lines[i], work.line_sizes[i]):
            return False
    i = snprintf(line, 256, b"%s%zu\r\n", work.length, stream.item.length)
    if i >= 256 or not _has_line(stream, line, i):
        return False
    i = snprintf(line, 256, b"%s", work.checksum)
    if i >= 256 - 2 * CHECKSUM_SIZE - 2:
        return False
    at = _put_digits(line + i, stream.item.checksum, CHECKSUM_SIZE)
    at = _put(at, b"\r\n", 2)
    return _has_line(stream, line, at - line)


cdef bint _has_line(Stream *stream, const char *line, size_t length) noexcept nogil:
    return memmem(stream.lower, stream.head_size, line, length) != NULL


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
    cdef size_t i
    if end == NULL:
        return True
    stream.head_size = end + 2 - stream.head
    for i in range(stream.head_size):
        stream.lower[i] = (
            stream.head[i] | 0x20 if 65 <= stream.head[i] <= 90 else stream.head[i]
        )
    stream.lowered = True
    if stream.received - stream.head_size - 2 > stream.left or not _is_usual(stream):
        return False
    _copy_body(stream)
    return True


cdef void _copy_body(Stream *stream) noexcept nogil:
    """Accept the head, and copy the part of the body that came with it into the page."""
    cdef char *body = stream.head + stream.head_size + 2
    cdef size_t count, size = stream.received - stream.head_size - 2
    stream.framed = True
    if stream.work.key_count:
        _choose_key(stream)
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
    cdef char *lower = stream.lower
    cdef char expected[64]
    cdef char *found
    cdef char *connection
    cdef size_t size = stream.head_size
    cdef size_t length = snprintf(expected, 64, b"\r\ncontent-length: %zu\r\n", stream.left)
    if size < 13 or memcmp(stream.head, b"HTTP/1.1 200 ", 13):
        return False
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
    """Process the `count` bytes that just came, while they are in the cache, and skip them."""
    cdef size_t part
    stream.left -= count
    while count:
        part = min(count, stream.pieces.iov_len)
        _process(stream, <char *>stream.pieces.iov_base, part)
        count -= part
        stream.pieces.iov_base = <char *>stream.pieces.iov_base + part
        stream.pieces.iov_len -= part
        if stream.pieces.iov_len == 0:
            stream.pieces += 1
            stream.count -= 1


cdef void _process(Stream *stream, char *data, size_t length) noexcept nogil:
    """Hash bytes of the object; decrypt them in place if it is encrypted."""
    xxh3.update(stream.checksum, data, length)
    if stream.key == NULL or not stream.sound:
        return
    if stream.pieces == stream.item.pieces:  # the nonce
        if length == stream.pieces.iov_len:
            stream.sound = _begin_decryption(stream)
    elif stream.count > 1:
        stream.sound = libcrypto.decrypt(stream.cipher, data, length)


cdef void _choose_key(Stream *stream) noexcept nogil:
    """Find the key that the head names; without it, the page is left to the slow path."""
    cdef size_t i
    stream.key, stream.sound = NULL, True
    for i in range(stream.work.key_count):
        if _has_line(stream, stream.work.key_lines[i], stream.work.key_line_sizes[i]):
            stream.key = &stream.work.keys[i]


cdef bint _begin_decryption(Stream *stream) noexcept nogil:
    """Derive the page's key (HKDF-Expand, RFC 5869, one block) and start to decrypt."""
    cdef unsigned char info[256]
    cdef unsigned char key[32]
    cdef int size = stream.work.associated_size
    if size >= 256:
        return False
    memcpy(info, stream.item.associated, size)
    info[size] = 1
    return libcrypto.hmac(
        stream.key, stream.digest, info, size + 1, key
    ) and libcrypto.begin_decryption(
        stream.cipher, key, stream.item.nonce, stream.item.associated, size
    )


cdef bint _is_authentic(Stream *stream) noexcept nogil:
    """Decrypt the checksum of the content into the item; return whether the tag is right."""
    cdef unsigned char *tail = stream.item.tail
    if stream.key == NULL or not stream.sound:
        return False
    if not libcrypto.decrypt(stream.cipher, tail, CHECKSUM_SIZE):
        return False
    memcpy(stream.item.checksum, tail, CHECKSUM_SIZE)
    return libcrypto.authentic(stream.cipher, tail + CHECKSUM_SIZE)


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

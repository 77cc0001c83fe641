"""See bulk_stream.pxd."""

from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from libc.errno cimport EAGAIN, errno
from libc.stdlib cimport malloc
from libc.string cimport memcmp, memcpy, memset

from memkv_sglang.tiers.minio.http cimport bulk_heads, libcrypto, xxh3
from memkv_sglang.tiers.minio.http.bulk_batch cimport (
    CHECKSUM_SIZE,
    FORGED,
    NONCE_SIZE,
    UNVERIFIED,
    VERIFIED,
    take,
)
from memkv_sglang.tiers.minio.http.bulk_heads cimport HEAD_ROOM
from memkv_sglang.tiers.minio.http.bulk_requests cimport put, write_request
from memkv_sglang.tiers.minio.http.bulk_sealing cimport (
    TAG_SIZE,
    begin_unsealing,
    end_unsealing,
    seal,
)
from memkv_sglang.tiers.minio.http.sockets cimport (
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    msghdr,
    recv,
    recvmsg,
    sendmsg,
)

cdef enum:
    IOV_LIMIT = 512  # buffers for one system call; the kernel takes at most 1024
    TLS_PIECE = 256 << 10  # most bytes for one call of the ssl module

cdef enum:  # results of a transfer other than a byte count and 0, the end of the stream
    NOTHING = -1
    FAILED = -2


cdef Event begin(Stream *stream) noexcept nogil:
    """Send the next request; a TLS connection is only made ready for it."""
    cdef char peeked
    if stream.signing == NULL:
        return DONE
    stream.item = take(stream.work)
    if stream.item == NULL:
        return DONE
    stream.left = 0
    stream.framed = False
    bulk_heads.clear(&stream.head)
    if stream.work.uploads:
        if not _prepare_upload(stream):
            return CHANGED
    else:
        _prepare_download(stream)
    stream.parts[0].iov_base = stream.request
    stream.parts[0].iov_len = write_request(
        stream.signing,
        stream.item.path,
        stream.item.path_size,
        stream.item.checksum if stream.work.uploads else NULL,
        stream.digest,
        stream.scratch,
        stream.request,
    )
    if stream.parts[0].iov_len == 0:
        return UNSENT
    if stream.unsent.first == stream.item.pieces:
        stream.item.pieces[0] = stream.parts[0]
    if not stream.plain:
        return READY
    if recv(stream.fd, &peeked, 1, MSG_PEEK | MSG_DONTWAIT) >= 0 or errno != EAGAIN:
        return UNASKED
    return send(stream)


cdef void _prepare_download(Stream *stream) noexcept nogil:
    stream.unsent = Pieces(&stream.parts[0], 1)
    stream.missing = Pieces(stream.item.pieces, stream.item.count)
    stream.left = stream.item.length
    xxh3.reset(stream.checksum, stream.item.seed)


cdef bint _prepare_upload(Stream *stream) noexcept nogil:
    """Compute the checksum, and encrypt the object if necessary; False if it must not be sent."""
    cdef Item *item = stream.item
    stream.missing.count = 0
    if stream.sealed != NULL:
        stream.unsent = Pieces(&stream.parts[0], 2)
        return _seal(stream)
    stream.unsent = Pieces(item.pieces, item.count)
    _hash(stream, item.pieces + 1, item.count - 1, item.checksum)
    return _is_known(item, item.checksum)


cdef void _hash(
    Stream *stream, const iovec *pieces, size_t count, unsigned char *checksum
) noexcept nogil:
    cdef size_t i
    xxh3.reset(stream.checksum, stream.item.seed)
    for i in range(count):
        xxh3.update(stream.checksum, pieces[i].iov_base, pieces[i].iov_len)
    xxh3.digest(stream.checksum, checksum)


cdef bint _is_known(const Item *item, const unsigned char *checksum) noexcept nogil:
    return item.known == NULL or memcmp(item.known, checksum, CHECKSUM_SIZE) == 0


cdef bint _seal(Stream *stream) noexcept nogil:
    """Encrypt the object; see `encryption.sealing.seal`.

    Reads the pages once, since a client may write to them at the same time.
    """
    cdef Item *item = stream.item
    cdef char *at = put(<char *>stream.sealed, item.nonce, NONCE_SIZE)
    cdef iovec content = iovec(at, item.length)
    cdef size_t i
    for i in range(1, item.count):
        at = put(at, item.pieces[i].iov_base, item.pieces[i].iov_len)
    _hash(stream, &content, 1, <unsigned char *>at)
    if not _is_known(item, <unsigned char *>at) or not seal(
        stream.cipher, stream.digest, stream.work.keys, &item.binding, stream.sealed, item.length
    ):
        return False
    stream.parts[1].iov_base = stream.sealed
    stream.parts[1].iov_len = NONCE_SIZE + item.length + CHECKSUM_SIZE + TAG_SIZE
    _hash(stream, &stream.parts[1], 1, item.checksum)
    return True


cdef Event send(Stream *stream) noexcept nogil:
    """Send what fits the send buffer."""
    cdef ssize_t count
    while stream.unsent.count:
        count = _give(stream)
        if count == NOTHING:
            stream.paused = True
            return WAITS
        if count <= 0:
            return UNSENT
        stream.heard |= stream.paused  # there is room again: the server took bytes
        _skip(&stream.unsent, count)
    return WAITS


cdef void _skip(Pieces *pieces, size_t count) noexcept nogil:
    cdef size_t part
    while count:
        part = min(count, pieces.first.iov_len)
        pieces.first.iov_base = <char *>pieces.first.iov_base + part
        pieces.first.iov_len -= part
        count -= part
        if pieces.first.iov_len == 0:
            pieces.first += 1
            pieces.count -= 1


cdef Event receive(Stream *stream) noexcept nogil:
    """Receive the bytes that have arrived."""
    cdef iovec space
    cdef Pieces head = Pieces(&space, 1)
    cdef size_t asked
    cdef ssize_t count
    while stream.head.size == 0:
        space.iov_base = stream.head.raw + stream.head.received
        space.iov_len = HEAD_ROOM - stream.head.received
        asked = space.iov_len
        count = _take(stream, &head)  # 0 also if the head is too long
        if count <= 0:
            return WAITS if count == NOTHING else UNUSUAL
        stream.heard = True
        stream.head.received += count
        if not bulk_heads.find_end(&stream.head):
            continue
        if not _is_usual(stream):
            return UNUSUAL
        accept_head(stream)
        if <size_t>count < asked and stream.left:
            return WAITS
    while stream.left:
        asked = stream.left if stream.plain else stream.missing.first.iov_len
        count = _take(stream, &stream.missing)
        if count <= 0:
            return WAITS if count == NOTHING else UNUSUAL
        _advance(stream, count)
        if <size_t>count < asked:
            return WAITS
    return WHOLE


cdef bint _is_usual(const Stream *stream) noexcept nogil:
    """Fast path: return whether the head is that of an object, or confirms a stored one."""
    cdef const Head *head = &stream.head
    return (
        bulk_heads.surplus(head) <= stream.left
        and bulk_heads.is_usual(head, stream.left)
        and not stream.unsent.count
        and (not stream.work.uploads or bulk_heads.has_etag(head))
    )


cdef void accept_head(Stream *stream) noexcept nogil:
    """Accept the head, and copy the part of the body that came with it into the page."""
    cdef size_t count, size = bulk_heads.surplus(&stream.head)
    cdef char *body = stream.head.raw + stream.head.received - size
    stream.framed = True
    if stream.work.key_count:
        _choose_key(stream)
    while size:
        count = min(size, stream.missing.first.iov_len)
        memcpy(stream.missing.first.iov_base, body, count)
        _advance(stream, count)
        body += count
        size -= count


cdef void _choose_key(Stream *stream) noexcept nogil:
    """Find the key that the head names; without it, the page is left to the slow path."""
    cdef Work *work = stream.work
    cdef size_t i
    stream.key, stream.sound = NULL, True
    for i in range(work.key_count):
        if bulk_heads.has_line(&stream.head, work.key_lines[i], work.key_line_sizes[i]):
            stream.key = &work.keys[i]


cdef void _advance(Stream *stream, size_t count) noexcept nogil:
    """Process the `count` bytes that just came, while they are in the cache, and skip them."""
    cdef size_t part
    stream.left -= count
    while count:
        part = min(count, stream.missing.first.iov_len)
        _process(stream, <char *>stream.missing.first.iov_base, part)
        _skip(&stream.missing, part)
        count -= part


cdef void _process(Stream *stream, char *data, size_t length) noexcept nogil:
    """Hash bytes of the object; decrypt them in place if it is encrypted."""
    xxh3.update(stream.checksum, data, length)
    if stream.key == NULL or not stream.sound:
        return
    if stream.missing.first == stream.item.pieces:  # the nonce
        if length == stream.missing.first.iov_len:
            stream.sound = begin_unsealing(
                stream.cipher, stream.digest, stream.key, &stream.item.binding, stream.item.nonce
            )
    elif stream.missing.count > 1:
        stream.sound = libcrypto.decrypt(stream.cipher, data, length)


cdef void settle(Stream *stream) noexcept nogil:
    """Record a complete response: that it confirms an upload, or whether an object is sound."""
    cdef Item *item = stream.item
    cdef bint matches
    if stream.work.uploads:
        item.state = VERIFIED
        return
    xxh3.digest(stream.checksum, item.checksum)
    matches = bulk_heads.matches(
        &stream.head, &stream.work.expected, item.length, item.checksum
    )
    if stream.work.key_count and not (matches and _is_authentic(stream)):
        item.state = FORGED
        return
    if not matches:
        item.head = <char *>malloc(stream.head.size)
        if item.head == NULL:
            return
        memcpy(item.head, stream.head.raw, stream.head.size)
        item.head_size = stream.head.size
    item.state = VERIFIED if matches else UNVERIFIED


cdef bint _is_authentic(Stream *stream) noexcept nogil:
    """Decrypt the checksum of the content into the item; return whether the tag is right."""
    if stream.key == NULL or not stream.sound or not end_unsealing(stream.cipher, stream.item.tail):
        return False
    memcpy(stream.item.checksum, stream.item.tail, CHECKSUM_SIZE)
    return True


cdef ssize_t _give(Stream *stream) noexcept nogil:
    """Send from the unsent pieces."""
    cdef msghdr message
    cdef ssize_t sent
    if not stream.plain:
        return _give_encrypted(stream)
    _fill(&message, &stream.unsent)
    sent = sendmsg(stream.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent < 0:
        return NOTHING if errno == EAGAIN else FAILED
    return sent


cdef ssize_t _take(Stream *stream, const Pieces *pieces) noexcept nogil:
    """Receive into the pieces; with TLS, only into the first."""
    cdef msghdr message
    cdef ssize_t got
    if not stream.plain:
        return _take_decrypted(stream, pieces.first)
    _fill(&message, pieces)
    got = recvmsg(stream.fd, &message, MSG_DONTWAIT)
    if got < 0:
        return NOTHING if errno == EAGAIN else FAILED
    return got


cdef void _fill(msghdr *message, const Pieces *pieces) noexcept nogil:
    memset(message, 0, sizeof(msghdr))
    message.msg_iov, message.msg_iovlen = pieces.first, min(pieces.count, <size_t>IOV_LIMIT)


cdef ssize_t _give_encrypted(Stream *stream) noexcept with gil:
    cdef iovec *piece = stream.unsent.first
    data = PyMemoryView_FromMemory(
        <char *>piece.iov_base, min(piece.iov_len, <size_t>TLS_PIECE), PyBUF_READ
    )
    try:
        return (<object>stream.transport).send_now(data)
    except BlockingIOError:
        return NOTHING
    except OSError:
        return FAILED
    except BaseException as error:
        (<list>stream.errors).append(error)
        return FAILED


cdef ssize_t _take_decrypted(Stream *stream, const iovec *piece) noexcept with gil:
    space = PyMemoryView_FromMemory(<char *>piece.iov_base, piece.iov_len, PyBUF_WRITE)
    try:
        return (<object>stream.transport).receive_now([space])
    except BlockingIOError:
        return NOTHING
    except OSError:
        return FAILED
    except BaseException as error:
        (<list>stream.errors).append(error)
        return FAILED

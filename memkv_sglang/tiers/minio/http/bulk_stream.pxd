"""One connection of the compiled loop, and the exchange on it: a request and its response.

Without the GIL, except for TLS. The functions that return an `Event` never block.
"""

from cpython.object cimport PyObject

from memkv_sglang.tiers.minio.http.bulk_batch cimport Item, Work
from memkv_sglang.tiers.minio.http.bulk_heads cimport Head
from memkv_sglang.tiers.minio.http.bulk_requests cimport Signing
from memkv_sglang.tiers.minio.http.libcrypto cimport Hmac
from memkv_sglang.tiers.minio.http.sockets cimport iovec

cdef enum Event:
    WAITS  # the exchange is incomplete
    WHOLE  # the response is complete, or none is awaited yet
    READY  # the next request is prepared, but sending it takes the GIL
    DONE  # there are no more requests
    UNUSUAL  # the head needs the full parser, or the connection ended
    UNASKED  # the connection has bytes, or an end, that no request asked for
    UNSENT  # the connection ended before the request was sent
    CHANGED  # the object differs from its known checksum
    LATE  # the deadline or the stall timeout passed
    RESTED  # time to check for signals
    SILENT  # some reused connections have not answered the first request

cdef struct Pieces:
    iovec *first
    size_t count

cdef struct Stream:
    int fd
    bint plain
    PyObject *transport
    PyObject *errors  # list for what the transport raised, since C functions cannot raise it
    Work *work
    Signing *signing  # NULL if this server gets no requests
    Item *item
    char *request
    char *scratch
    void *digest
    void *checksum  # of the object's bytes so far
    void *cipher
    unsigned char *sealed  # memory for an encrypted upload
    iovec parts[2]  # the head of the request, and the encrypted object
    Pieces unsent  # of the request
    bint paused  # whether the send buffer was full at least once
    bint heard  # whether the server has sent or acknowledged a byte
    bint framed  # whether the head was accepted
    Head head
    size_t left  # missing bytes of the response's body
    Pieces missing  # where they belong
    Hmac *key  # of the encrypted page; NULL if this node does not have it
    bint sound  # whether decryption has not failed so far

cdef Event begin(Stream *stream) noexcept nogil
cdef Event send(Stream *stream) noexcept nogil
cdef Event receive(Stream *stream) noexcept nogil
cdef void accept_head(Stream *stream) noexcept nogil
cdef void settle(Stream *stream) noexcept nogil

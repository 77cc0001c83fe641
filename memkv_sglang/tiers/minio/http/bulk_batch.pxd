"""The objects of one call, which the streams of several threads share."""

from memkv_sglang.tiers.minio.http.bulk_heads cimport Expected
from memkv_sglang.tiers.minio.http.bulk_sealing cimport (
    CHECKSUM_SIZE,
    NONCE_SIZE,
    TAIL_SIZE,
    Binding,
)
from memkv_sglang.tiers.minio.http.libcrypto cimport Hmac
from memkv_sglang.tiers.minio.http.sockets cimport iovec

cdef enum State:
    OPEN  # not transferred, or not completely
    VERIFIED  # received and verified, or stored
    UNVERIFIED  # received, but the metadata need the full parser
    FORGED  # received, but it could not be decrypted

cdef struct Item:  # one object
    const char *path
    size_t path_size
    iovec *pieces  # of the object; before those of an upload, there is a place for its head
    size_t count
    size_t length
    unsigned long long seed
    Binding binding  # of an encrypted page
    const unsigned char *known  # the checksum that an upload must have; NULL if unknown
    State state
    unsigned char checksum[CHECKSUM_SIZE]
    char *head  # a copy, if it is needed after the response
    size_t head_size
    unsigned char nonce[NONCE_SIZE]
    unsigned char tail[TAIL_SIZE]

cdef struct Work:
    bint uploads
    Item *items
    Py_ssize_t count
    Py_ssize_t next
    bint stopped
    Expected expected
    size_t key_count  # 0 unless objects are encrypted
    const char **key_lines
    size_t *key_line_sizes
    Hmac *keys  # of an upload only the one to encrypt with

cdef Item *take(Work *work) noexcept nogil
cdef void *allocate(size_t count, size_t size) except NULL

cdef class Batch:
    cdef Work work
    cdef list kept  # objects that `work` points into
    cdef dict templates
    cdef object fall_back
    cdef iovec *pieces
    cdef iovec *free_pieces
    cdef Py_buffer *views
    cdef Py_ssize_t held
    cdef size_t longest_path

    cdef _start(self, requests, templates, fall_back, size_t more)
    cdef Item *_add(self, bytes path, page, sealing) except NULL
    cdef _add_buffers(self, Item *item, page, int flags)
    cdef _add_keys(self, keys)

cdef class Download(Batch):
    cdef _expect(self, metadata)

cdef class Upload(Batch):
    cdef list memory  # for sealed objects, one per connection
    cdef size_t stored_size

    cdef bytearray take_memory(self)

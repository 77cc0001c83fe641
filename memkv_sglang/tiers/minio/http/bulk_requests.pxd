"""Writes signed request heads without the GIL."""

from memkv_sglang.tiers.minio.http.libcrypto cimport Hmac

cdef struct Signing:  # a `BulkTemplate`
    const char *start
    size_t start_size
    size_t method_size
    const char *canonical
    size_t canonical_size
    const char *canonical_end
    size_t canonical_end_size
    const char *text
    size_t text_size
    const char *lines
    size_t lines_size
    const char *lines_end
    size_t lines_end_size
    Hmac key

cdef class Template:
    cdef object template  # which `signing` points into
    cdef Signing signing

cdef size_t room(const Signing *signing, size_t path_size) noexcept nogil
cdef size_t write_request(
    const Signing *signing,
    const char *path,
    size_t path_size,
    const unsigned char *checksum,
    void *digest,
    char *scratch,
    char *request,
) noexcept nogil
cdef char *put(char *at, const void *data, size_t length) noexcept nogil
cdef char *put_digits(char *at, const unsigned char *data, size_t length) noexcept nogil

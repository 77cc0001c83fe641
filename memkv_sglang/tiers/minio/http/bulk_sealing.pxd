"""Encrypts and decrypts pages like `encryption.sealing`, without the GIL."""

from memkv_sglang.tiers.minio.http.libcrypto cimport Hmac

cdef enum:
    NONCE_SIZE = 12
    CHECKSUM_SIZE = 16
    TAG_SIZE = 16
    TAIL_SIZE = 32  # encrypted checksum and tag

cdef struct Binding:  # what a sealed page is bound to
    const char *associated
    int size

cdef bint begin_unsealing(
    void *cipher, void *digest, const Hmac *master, const Binding *binding,
    const unsigned char *nonce,
) noexcept nogil
cdef bint end_unsealing(void *cipher, unsigned char *tail) noexcept nogil
cdef bint seal(
    void *cipher, void *digest, const Hmac *master, const Binding *binding,
    unsigned char *sealed, size_t length,
) noexcept nogil

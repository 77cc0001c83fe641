"""SHA-256, HMAC and AES-256-GCM of OpenSSL's libcrypto, without the GIL."""

cdef struct Hmac:  # of one key
    void *inner
    void *outer

cdef void *new_digest() except NULL
cdef void free_digest(void *digest) noexcept nogil
cdef bint sha256(void *digest, const void *data, size_t length, unsigned char *out) noexcept nogil
cdef int hmac_init(Hmac *hmac, bytes key) except -1
cdef void hmac_free(Hmac *hmac) noexcept nogil
cdef bint hmac(
    const Hmac *hmac, void *digest, const void *data, size_t length, unsigned char *out
) noexcept nogil

cdef void *new_cipher() except NULL
cdef void free_cipher(void *cipher) noexcept nogil
cdef bint begin_decryption(
    void *cipher, const unsigned char *key, const unsigned char *nonce,
    const void *associated, int length
) noexcept nogil
cdef bint decrypt(void *cipher, void *data, size_t length) noexcept nogil
cdef bint authentic(void *cipher, const void *tag) noexcept nogil
cdef bint begin_encryption(
    void *cipher, const unsigned char *key, const unsigned char *nonce,
    const void *associated, int length
) noexcept nogil
cdef bint encrypt(void *cipher, void *data, size_t length) noexcept nogil
cdef bint end_encryption(void *cipher, void *tag) noexcept nogil

"""See libcrypto.pxd. Calls the libcrypto that Python's own modules are linked with.

The functions are OpenSSL's public EVP interface, the same in OpenSSL 1.1.1 and 3. Python's objects
for them need the GIL for every call.
"""

import ctypes
import ctypes.util
import hashlib
import hmac as python_hmac

cdef enum:
    BLOCK = 64  # bytes of an SHA-256 block
    TAG_SIZE = 16
    SET_TAG = 0x11  # EVP_CTRL_AEAD_SET_TAG
    GET_TAG = 0x10  # EVP_CTRL_AEAD_GET_TAG
    ONE_UPDATE = 1 << 30  # most bytes of one update, whose length is an int

cdef const void *(*_sha256)() noexcept nogil
cdef const void *(*_aes)() noexcept nogil
cdef void *(*_digest_new)() noexcept nogil
cdef void (*_digest_free)(void *) noexcept nogil
cdef int (*_digest_init)(void *, const void *, void *) noexcept nogil
cdef int (*_digest_update)(void *, const void *, size_t) noexcept nogil
cdef int (*_digest_final)(void *, unsigned char *, unsigned int *) noexcept nogil
cdef int (*_digest_copy)(void *, const void *) noexcept nogil
cdef void *(*_cipher_new)() noexcept nogil
cdef void (*_cipher_free)(void *) noexcept nogil
cdef int (*_cipher_control)(void *, int, int, void *) noexcept nogil
cdef int (*_decrypt_init)(
    void *, const void *, void *, const unsigned char *, const unsigned char *
) noexcept nogil
cdef int (*_decrypt_update)(void *, void *, int *, const void *, int) noexcept nogil
cdef int (*_decrypt_final)(void *, unsigned char *, int *) noexcept nogil
cdef int (*_encrypt_init)(
    void *, const void *, void *, const unsigned char *, const unsigned char *
) noexcept nogil
cdef int (*_encrypt_update)(void *, void *, int *, const void *, int) noexcept nogil
cdef int (*_encrypt_final)(void *, unsigned char *, int *) noexcept nogil


_INNER, _OUTER = (bytes([byte ^ pad for byte in range(256)]) for pad in (0x36, 0x5C))


def _open():
    """Return a library that has the functions."""
    import _hashlib

    places = [getattr(_hashlib, "__file__", None), None, ctypes.util.find_library("crypto")]
    for place in dict.fromkeys(places):
        try:
            library = ctypes.CDLL(place)
        except OSError:
            continue
        if hasattr(library, "EVP_aes_256_gcm"):
            return library
    raise ImportError("there is no libcrypto; install OpenSSL 1.1.1 or newer")


cdef void *_function(library, str name) except NULL:
    if not hasattr(library, name):
        raise ImportError(f"libcrypto does not export {name}; install OpenSSL 1.1.1 or newer")
    return <void *><size_t>ctypes.cast(getattr(library, name), ctypes.c_void_p).value


_library = _open()
_sha256 = <const void *(*)() noexcept nogil>_function(_library, "EVP_sha256")
_aes = <const void *(*)() noexcept nogil>_function(_library, "EVP_aes_256_gcm")
_digest_new = <void *(*)() noexcept nogil>_function(_library, "EVP_MD_CTX_new")
_digest_free = <void (*)(void *) noexcept nogil>_function(_library, "EVP_MD_CTX_free")
_digest_init = <int (*)(void *, const void *, void *) noexcept nogil>_function(
    _library, "EVP_DigestInit_ex"
)
_digest_update = <int (*)(void *, const void *, size_t) noexcept nogil>_function(
    _library, "EVP_DigestUpdate"
)
_digest_final = <int (*)(void *, unsigned char *, unsigned int *) noexcept nogil>_function(
    _library, "EVP_DigestFinal_ex"
)
_digest_copy = <int (*)(void *, const void *) noexcept nogil>_function(
    _library, "EVP_MD_CTX_copy_ex"
)
_cipher_new = <void *(*)() noexcept nogil>_function(_library, "EVP_CIPHER_CTX_new")
_cipher_free = <void (*)(void *) noexcept nogil>_function(_library, "EVP_CIPHER_CTX_free")
_cipher_control = <int (*)(void *, int, int, void *) noexcept nogil>_function(
    _library, "EVP_CIPHER_CTX_ctrl"
)
_decrypt_init = <int (*)(
    void *, const void *, void *, const unsigned char *, const unsigned char *
) noexcept nogil>_function(_library, "EVP_DecryptInit_ex")
_decrypt_update = <int (*)(void *, void *, int *, const void *, int) noexcept nogil>_function(
    _library, "EVP_DecryptUpdate"
)
_decrypt_final = <int (*)(void *, unsigned char *, int *) noexcept nogil>_function(
    _library, "EVP_DecryptFinal_ex"
)
_encrypt_init = <int (*)(
    void *, const void *, void *, const unsigned char *, const unsigned char *
) noexcept nogil>_function(_library, "EVP_EncryptInit_ex")
_encrypt_update = <int (*)(void *, void *, int *, const void *, int) noexcept nogil>_function(
    _library, "EVP_EncryptUpdate"
)
_encrypt_final = <int (*)(void *, unsigned char *, int *) noexcept nogil>_function(
    _library, "EVP_EncryptFinal_ex"
)


cdef void *new_digest() except NULL:
    digest = _digest_new()
    if digest == NULL:
        raise MemoryError
    return digest


cdef void free_digest(void *digest) noexcept nogil:
    _digest_free(digest)


cdef bint sha256(void *digest, const void *data, size_t length, unsigned char *out) noexcept nogil:
    return (
        _digest_init(digest, _sha256(), NULL) == 1
        and _digest_update(digest, data, length) == 1
        and _digest_final(digest, out, NULL) == 1
    )


cdef int hmac_init(Hmac *hmac, bytes key) except -1:
    """Prepare HMAC-SHA256 (RFC 2104): both hashes, up to the padded key."""
    if len(key) > BLOCK:
        key = hashlib.sha256(key).digest()
    cdef bytes inner = key.ljust(BLOCK, b"\0").translate(_INNER)
    cdef bytes outer = key.ljust(BLOCK, b"\0").translate(_OUTER)
    hmac.inner, hmac.outer = new_digest(), new_digest()
    for digest, pad in ((<size_t>hmac.inner, inner), (<size_t>hmac.outer, outer)):
        if (
            _digest_init(<void *><size_t>digest, _sha256(), NULL) != 1
            or _digest_update(<void *><size_t>digest, <const char *>pad, BLOCK) != 1
        ):
            raise MemoryError
    return 0


cdef void hmac_free(Hmac *hmac) noexcept nogil:
    _digest_free(hmac.inner)  # NULL is ignored
    _digest_free(hmac.outer)


cdef bint hmac(
    const Hmac *hmac, void *digest, const void *data, size_t length, unsigned char *out
) noexcept nogil:
    cdef unsigned char inner[32]
    return (
        _digest_copy(digest, hmac.inner) == 1
        and _digest_update(digest, data, length) == 1
        and _digest_final(digest, inner, NULL) == 1
        and _digest_copy(digest, hmac.outer) == 1
        and _digest_update(digest, inner, 32) == 1
        and _digest_final(digest, out, NULL) == 1
    )


cdef void *new_cipher() except NULL:
    cipher = _cipher_new()
    if cipher == NULL:
        raise MemoryError
    return cipher


cdef void free_cipher(void *cipher) noexcept nogil:
    _cipher_free(cipher)


cdef bint begin_decryption(
    void *cipher, const unsigned char *key, const unsigned char *nonce,
    const void *associated, int length
) noexcept nogil:
    """Start AES-256-GCM with a nonce of 12 bytes."""
    cdef int done
    return (
        _decrypt_init(cipher, _aes(), NULL, key, nonce) == 1
        and _decrypt_update(cipher, NULL, &done, associated, length) == 1
    )


cdef bint decrypt(void *cipher, void *data, size_t length) noexcept nogil:
    """Decrypt the next bytes in place."""
    cdef int done, part
    while length:
        part = <int>min(length, <size_t>ONE_UPDATE)
        if _decrypt_update(cipher, data, &done, data, part) != 1:
            return False
        data = <char *>data + part
        length -= part
    return True


cdef bint authentic(void *cipher, const void *tag) noexcept nogil:
    """Return whether the tag of 16 bytes is that of everything decrypted."""
    cdef unsigned char rest[16]
    cdef int done
    return (
        _cipher_control(cipher, SET_TAG, TAG_SIZE, <void *>tag) == 1
        and _decrypt_final(cipher, rest, &done) == 1
    )


cdef bint begin_encryption(
    void *cipher, const unsigned char *key, const unsigned char *nonce,
    const void *associated, int length
) noexcept nogil:
    """Start AES-256-GCM with a nonce of 12 bytes."""
    cdef int done
    return (
        _encrypt_init(cipher, _aes(), NULL, key, nonce) == 1
        and _encrypt_update(cipher, NULL, &done, associated, length) == 1
    )


cdef bint encrypt(void *cipher, void *data, size_t length) noexcept nogil:
    """Encrypt the next bytes in place."""
    cdef int done, part
    while length:
        part = <int>min(length, <size_t>ONE_UPDATE)
        if _encrypt_update(cipher, data, &done, data, part) != 1:
            return False
        data = <char *>data + part
        length -= part
    return True


cdef bint end_encryption(void *cipher, void *tag) noexcept nogil:
    """Write the tag of 16 bytes."""
    cdef unsigned char rest[16]
    cdef int done
    return (
        _encrypt_final(cipher, rest, &done) == 1
        and _cipher_control(cipher, GET_TAG, TAG_SIZE, tag) == 1
    )


cdef _check():
    """Raise ImportError unless these functions agree with Python's."""
    cdef unsigned char out[32]
    cdef Hmac keyed
    digest = new_digest()
    data, key = b"memkv" * 20, b"key"
    try:
        done = sha256(digest, <const char *>data, len(data), out)
        if not done or out[:32] != hashlib.sha256(data).digest():
            raise ImportError("libcrypto has a different C interface")
        hmac_init(&keyed, key)
        done = hmac(&keyed, digest, <const char *>data, len(data), out)
        hmac_free(&keyed)
        if not done or out[:32] != python_hmac.digest(key, data, "sha256"):
            raise ImportError("libcrypto has a different C interface")
    finally:
        free_digest(digest)


_check()

"""See bulk_sealing.pxd."""

from libc.string cimport memcpy

from memkv_sglang.tiers.minio.http cimport libcrypto

cdef enum:
    KEY_SIZE = 32
    INFO_ROOM = 256


cdef bint begin_unsealing(
    void *cipher, void *digest, const Hmac *master, const Binding *binding,
    const unsigned char *nonce,
) noexcept nogil:
    """Start to decrypt a page; `libcrypto.decrypt` continues."""
    cdef unsigned char key[KEY_SIZE]
    return _derive(digest, master, binding, key) and libcrypto.begin_decryption(
        cipher, key, nonce, binding.associated, binding.size
    )


cdef bint end_unsealing(void *cipher, unsigned char *tail) noexcept nogil:
    """Decrypt the checksum at `tail` in place; return whether the tag after it is right."""
    return libcrypto.decrypt(cipher, tail, CHECKSUM_SIZE) and libcrypto.authentic(
        cipher, tail + CHECKSUM_SIZE
    )


cdef bint seal(
    void *cipher, void *digest, const Hmac *master, const Binding *binding,
    unsigned char *sealed, size_t length,
) noexcept nogil:
    """Encrypt a page of `length` bytes in place, and add the tag.

    `sealed` holds the nonce, the page and its checksum, and has room for the tag.
    """
    cdef unsigned char key[KEY_SIZE]
    cdef unsigned char *content = sealed + NONCE_SIZE
    length += CHECKSUM_SIZE
    return (
        _derive(digest, master, binding, key)
        and libcrypto.begin_encryption(cipher, key, sealed, binding.associated, binding.size)
        and libcrypto.encrypt(cipher, content, length)
        and libcrypto.end_encryption(cipher, content + length)
    )


cdef bint _derive(
    void *digest, const Hmac *master, const Binding *binding, unsigned char *key
) noexcept nogil:
    """Derive the page's key (HKDF-Expand, RFC 5869, one block)."""
    cdef unsigned char info[INFO_ROOM]
    if binding.size >= INFO_ROOM:
        return False
    memcpy(info, binding.associated, binding.size)
    info[binding.size] = 1
    return libcrypto.hmac(master, digest, info, binding.size + 1, key)

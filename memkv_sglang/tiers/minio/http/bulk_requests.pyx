"""See bulk_requests.pxd."""

from libc.string cimport memcpy

from memkv_sglang.tiers.minio.http cimport libcrypto

cdef enum:
    FIXED_ROOM = 256  # for a checksum, a signature and the fixed parts of a request
    CHECKSUM_SIZE = 16


cdef class Template:
    """A `BulkTemplate` as `Signing`."""

    def __cinit__(self, template):
        self.template = template
        self.signing.start, self.signing.start_size = template.start, len(template.start)
        self.signing.method_size = template.start.index(b" ")
        self.signing.canonical = template.canonical
        self.signing.canonical_size = len(template.canonical)
        self.signing.canonical_end = template.canonical_end
        self.signing.canonical_end_size = len(template.canonical_end)
        self.signing.text, self.signing.text_size = template.text, len(template.text)
        self.signing.lines, self.signing.lines_size = template.lines, len(template.lines)
        self.signing.lines_end = template.lines_end
        self.signing.lines_end_size = len(template.lines_end)
        libcrypto.hmac_init(&self.signing.key, template.key)

    def __dealloc__(self):
        libcrypto.hmac_free(&self.signing.key)


cdef size_t room(const Signing *signing, size_t path_size) noexcept nogil:
    """Return the size of the memory that `write_request` needs for either of its buffers."""
    return (
        FIXED_ROOM + path_size + signing.start_size + signing.text_size
        + max(
            signing.canonical_size + signing.canonical_end_size,
            signing.lines_size + signing.lines_end_size,
        )
    )


cdef size_t write_request(
    const Signing *signing,
    const char *path,
    size_t path_size,
    const unsigned char *checksum,
    void *digest,
    char *scratch,
    char *request,
) noexcept nogil:
    """Write and sign the request for an object; return its size, 0 on failure.

    The checksum, unless it is NULL, is the value of the field that the template leaves open. See
    `auth.sigv4.Template.head`.
    """
    cdef unsigned char hashed[32]
    cdef size_t method = signing.method_size
    cdef char *at = put(scratch, signing.start, method)
    at = put(at, b"\n", 1)
    at = put(at, signing.start + method + 1, signing.start_size - method - 1)
    at = put(at, path, path_size)
    at = put(at, signing.canonical, signing.canonical_size)
    at = _put_value(at, checksum)
    at = put(at, signing.canonical_end, signing.canonical_end_size)
    if not libcrypto.sha256(digest, scratch, at - scratch, hashed):
        return 0
    at = put(scratch, signing.text, signing.text_size)
    at = put_digits(at, hashed, 32)
    if not libcrypto.hmac(&signing.key, digest, scratch, at - scratch, hashed):
        return 0
    at = put(request, signing.start, signing.start_size)
    at = put(at, path, path_size)
    at = put(at, b" HTTP/1.1\r\n", 11)
    at = put(at, signing.lines, signing.lines_size)
    at = _put_value(at, checksum)
    at = put(at, signing.lines_end, signing.lines_end_size)
    at = put_digits(at, hashed, 32)
    at = put(at, b"\r\n\r\n", 4)
    return at - request


cdef char *_put_value(char *at, const unsigned char *checksum) noexcept nogil:
    return at if checksum == NULL else put_digits(at, checksum, CHECKSUM_SIZE)


cdef char *put(char *at, const void *data, size_t length) noexcept nogil:
    """Copy to `at`; return where the next bytes go."""
    memcpy(at, data, length)
    return at + length


cdef char *put_digits(char *at, const unsigned char *data, size_t length) noexcept nogil:
    """Write lower-case hexadecimal digits to `at`; return where the next bytes go."""
    cdef const char *digits = "0123456789abcdef"
    cdef size_t i
    for i in range(length):
        at[2 * i] = digits[data[i] >> 4]
        at[2 * i + 1] = digits[data[i] & 15]
    return at + 2 * length

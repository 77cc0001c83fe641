"""See bulk_heads.pxd."""

from libc.stdio cimport snprintf
from libc.string cimport memcmp

from memkv_sglang.tiers.minio.http.bulk_requests cimport put, put_digits

cdef extern from "<string.h>" nogil:
    void *memmem(const void *where, size_t length, const void *what, size_t size)

cdef enum:
    CHECKSUM_SIZE = 16
    LINE_ROOM = 256


cdef void clear(Head *head) noexcept nogil:
    head.received = head.size = 0
    head.lowered = False


cdef bint find_end(Head *head) noexcept nogil:
    """Return whether the head was received completely; measure it, and convert it to lower case."""
    cdef char *end = <char *>memmem(head.raw, head.received, b"\r\n\r\n", 4)
    cdef size_t i
    if end == NULL:
        return False
    head.size = end + 2 - head.raw
    for i in range(head.size):
        head.lower[i] = head.raw[i] | 0x20 if 65 <= head.raw[i] <= 90 else head.raw[i]
    head.lowered = True
    return True


cdef size_t surplus(const Head *head) noexcept nogil:
    """Return how many bytes of the body came with the head."""
    return head.received - head.size - 2


cdef bint is_usual(const Head *head, size_t length) noexcept nogil:
    """Return whether this is a 200 of the body's length on a connection that stays open.

    Must not match a head that `parse_head` reads differently.
    """
    cdef const char *lower = head.lower
    cdef char expected[64]
    cdef char *found
    cdef char *connection
    cdef size_t size = head.size
    cdef size_t line = snprintf(expected, 64, b"\r\ncontent-length: %zu\r\n", length)
    if size < 13 or memcmp(head.raw, b"HTTP/1.1 200 ", 13):
        return False
    found = <char *>memmem(lower, size, b"\r\ncontent-length:", 17)
    connection = <char *>memmem(lower, size, b"\r\nconnection:", 13)
    return (
        found != NULL
        and found == memmem(lower, size, expected, line)
        and memmem(found + 17, lower + size - found - 17, b"\r\ncontent-length:", 17) == NULL
        and memmem(lower, size, b"\r\ntransfer-encoding:", 20) == NULL
        and connection == memmem(lower, size, b"\r\nconnection: keep-alive\r\n", 26)
        and (
            connection == NULL
            or memmem(connection + 13, lower + size - connection - 13, b"\r\nconnection:", 13) == NULL
        )
    )


cdef bint has_line(const Head *head, const char *line, size_t length) noexcept nogil:
    return memmem(head.lower, head.size, line, length) != NULL


cdef bint has_etag(const Head *head) noexcept nogil:
    """Return whether there is exactly one ETag, which is not empty: the object was stored."""
    cdef const char *end = head.lower + head.size
    cdef const char *found = <const char *>memmem(head.lower, head.size, b"\r\netag: \"", 9)
    if found == NULL or found + 9 >= end or found[9] <= 32 or found[9] == 34:
        return False
    return (
        memmem(head.lower, head.size, b"\r\netag:", 7) == found
        and memmem(found + 7, end - found - 7, b"\r\netag:", 7) == NULL
    )


cdef bint matches(
    const Head *head, const Expected *expected, size_t length, const unsigned char *checksum
) noexcept nogil:
    """Return whether the metadata match an object of this length and checksum."""
    cdef char line[LINE_ROOM]
    cdef char *at = line
    cdef size_t i, count = 0
    cdef const char *found = head.lower
    cdef const char *end = head.lower + head.size
    if not head.lowered:
        return False
    while True:  # no field may be repeated, nor be there in addition
        found = <const char *>memmem(found, end - found, expected.prefix, expected.prefix_size)
        if found == NULL:
            break
        found += expected.prefix_size
        count += 1
    if count != expected.line_count + 2 + expected.encrypted:
        return False
    for i in range(expected.line_count):
        if not has_line(head, expected.lines[i], expected.line_sizes[i]):
            return False
    i = snprintf(line, LINE_ROOM, b"%s%zu\r\n", expected.length, length)
    if i >= LINE_ROOM or not has_line(head, line, i):
        return False
    i = snprintf(line, LINE_ROOM, b"%s", expected.checksum)
    if i >= LINE_ROOM - 2 * CHECKSUM_SIZE - 2:
        return False
    at = put_digits(line + i, checksum, CHECKSUM_SIZE)
    at = put(at, b"\r\n", 2)
    return has_line(head, line, at - line)

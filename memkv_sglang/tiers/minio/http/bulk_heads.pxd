"""Fast checks of response heads, without the GIL. A head that they reject needs `parse_head`."""

cdef enum:
    HEAD_ROOM = 4096  # maximum size of a response head (MinIO's have 900 bytes)

cdef struct Head:
    size_t received  # bytes in `raw`
    size_t size  # up to the empty line; 0 until that is received
    bint lowered  # whether `lower` holds the head in lower case
    char raw[HEAD_ROOM]  # the head, and the part of the body that came with it
    char lower[HEAD_ROOM]

cdef struct Expected:  # a `Metadata`
    const char *prefix
    size_t prefix_size
    const char **lines
    size_t *line_sizes
    size_t line_count
    const char *length
    const char *checksum
    bint encrypted

cdef void clear(Head *head) noexcept nogil
cdef bint find_end(Head *head) noexcept nogil
cdef size_t surplus(const Head *head) noexcept nogil
cdef bint is_usual(const Head *head, size_t length) noexcept nogil
cdef bint has_line(const Head *head, const char *line, size_t length) noexcept nogil
cdef bint has_etag(const Head *head) noexcept nogil
cdef bint matches(
    const Head *head, const Expected *expected, size_t length, const unsigned char *checksum
) noexcept nogil

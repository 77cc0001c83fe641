"""Incremental XXH3-128 that does not need the GIL."""

cdef void *new_state() except NULL
cdef void free_state(void *state) noexcept nogil
cdef void reset(void *state, unsigned long long seed) noexcept nogil
cdef void update(void *state, const void *data, size_t length) noexcept nogil
cdef void digest(void *state, unsigned char *out) noexcept nogil  # 16 bytes

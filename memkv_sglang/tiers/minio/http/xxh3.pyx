"""See xxh3.pxd. Calls the xxHash library inside the `xxhash` package's extension module.

The module exports these C functions, but the package does not document them: pyproject.toml names
the versions that work. The package's Python objects need the GIL for every update, so several
receiving threads would wait for each other.
"""

import ctypes

import xxhash
from xxhash import _xxhash


cdef struct Checksum:  # XXH128_hash_t
    unsigned long long low, high

cdef void *(*_create)() noexcept nogil
cdef int (*_free)(void *) noexcept nogil
cdef int (*_reset)(void *, unsigned long long) noexcept nogil
cdef int (*_update)(void *, const void *, size_t) noexcept nogil
cdef Checksum (*_digest)(const void *) noexcept nogil
cdef void (*_canonical)(unsigned char *, Checksum) noexcept nogil


cdef void *_function(library, str name) except NULL:
    # The `dispatch` variants use the vector instructions that this processor has.
    for exported in (f"{name}_dispatch", name):
        if hasattr(library, exported):
            pointer = ctypes.cast(getattr(library, exported), ctypes.c_void_p)
            return <void *><size_t>pointer.value
    raise ImportError(f"the xxhash package ({xxhash.VERSION}) does not export {name}")


try:
    _library = ctypes.CDLL(_xxhash.__file__)
except (AttributeError, OSError) as error:
    raise ImportError(f"cannot open the extension module of the xxhash package: {error}") from error
_create = <void *(*)() noexcept nogil>_function(_library, "XXH3_createState")
_free = <int (*)(void *) noexcept nogil>_function(_library, "XXH3_freeState")
_reset = <int (*)(void *, unsigned long long) noexcept nogil>_function(
    _library, "XXH3_128bits_reset_withSeed"
)
_update = <int (*)(void *, const void *, size_t) noexcept nogil>_function(
    _library, "XXH3_128bits_update"
)
_digest = <Checksum (*)(const void *) noexcept nogil>_function(_library, "XXH3_128bits_digest")
_canonical = <void (*)(unsigned char *, Checksum) noexcept nogil>_function(
    _library, "XXH128_canonicalFromHash"
)


cdef void *new_state() except NULL:
    state = _create()
    if state == NULL:
        raise MemoryError
    return state


cdef void free_state(void *state) noexcept nogil:
    _free(state)


cdef void reset(void *state, unsigned long long seed) noexcept nogil:
    _reset(state, seed)


cdef void update(void *state, const void *data, size_t length) noexcept nogil:
    _update(state, data, length)


cdef void digest(void *state, unsigned char *out) noexcept nogil:
    _canonical(out, _digest(state))


cdef _check():
    """Raise ImportError unless these functions agree with the package's Python API."""
    cdef unsigned char computed[16]
    data, seed = b"memkv" * 1000, 7
    state = new_state()
    try:
        reset(state, seed)
        update(state, <const unsigned char *>data, len(data))
        digest(state, computed)
    finally:
        free_state(state)
    if computed[:16] != xxhash.xxh3_128_digest(data, seed=seed):
        raise ImportError(f"the xxhash package ({xxhash.VERSION}) has a different C interface")


_check()

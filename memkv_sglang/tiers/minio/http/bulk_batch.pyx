"""See bulk_batch.pyi and bulk_batch.pxd."""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdlib cimport free
from libc.string cimport memcpy

from memkv_sglang.tiers.minio.http cimport libcrypto
from memkv_sglang.tiers.minio.http.bulk_requests cimport Template

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE
from memkv_sglang.tiers.minio.http.bulk import Response, ignore_fallback

cdef extern from *:
    """
    #define take_number(counter) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)
    """
    Py_ssize_t take_number(Py_ssize_t *counter) nogil


cdef Item *take(Work *work) noexcept nogil:
    """Return the next object; NULL if there are no more."""
    cdef Py_ssize_t number
    if work.stopped:
        return NULL
    number = take_number(&work.next)
    return &work.items[number] if number < work.count else NULL


cdef class Batch:
    """See bulk_batch.pyi."""

    cdef _start(self, requests, templates, fall_back, size_t more):
        """Allocate the items, each with `more` pieces than its page has buffers."""
        cdef size_t pieces = sum([len(page.buffers) + more for _, page in requests])
        self.kept = [requests]
        self.fall_back = fall_back
        self.templates = {endpoint: Template(one) for endpoint, one in templates.items()}
        self.work.items = <Item *>allocate(len(requests), sizeof(Item))
        self.views = <Py_buffer *>allocate(pieces, sizeof(Py_buffer))
        self.pieces = self.free_pieces = <iovec *>allocate(pieces, sizeof(iovec))

    cdef Item *_add(self, bytes path, page, sealing) except NULL:
        """Add an item without pieces."""
        cdef Item *item = &self.work.items[self.work.count]
        self.work.count += 1
        item.path, item.path_size = path, len(path)
        self.longest_path = max(self.longest_path, item.path_size)
        item.seed = _seed(page.key)
        item.pieces = self.free_pieces
        if sealing is not None:
            associated = sealing.context + page.key.namespace + page.key.hash
            self.kept.append(associated)
            item.binding = Binding(associated, len(associated))
        return item

    cdef _add_buffers(self, Item *item, page, int flags):
        cdef Py_buffer *view
        for buffer in page.buffers:
            view = &self.views[self.held]
            PyObject_GetBuffer(buffer, view, flags)
            self.held += 1
            _append(item, view.buf, view.len)

    cdef _add_keys(self, keys):
        """Add the master keys of a dictionary, by line of the head."""
        cdef size_t count = len(keys)
        lines = list(keys)
        self.kept.append(lines)
        self.work.key_lines = <const char **>allocate(count, sizeof(char *))
        self.work.key_line_sizes = <size_t *>allocate(count, sizeof(size_t))
        self.work.keys = <Hmac *>allocate(count, sizeof(Hmac))
        self.work.key_count = count
        for i, line in enumerate(lines):
            self.work.key_lines[i], self.work.key_line_sizes[i] = line, len(line)
            libcrypto.hmac_init(&self.work.keys[i], keys[line])

    def stop(self):
        self.work.stopped = True

    def close(self):
        while self.held:
            self.held -= 1
            PyBuffer_Release(&self.views[self.held])

    def __dealloc__(self):
        cdef Py_ssize_t i
        cdef size_t k
        while self.held:
            self.held -= 1
            PyBuffer_Release(&self.views[self.held])
        if self.work.items != NULL:
            for i in range(self.work.count):
                free(self.work.items[i].head)
        if self.work.keys != NULL:
            for k in range(self.work.key_count):
                libcrypto.hmac_free(&self.work.keys[k])
        for memory in (
            <size_t>self.views, <size_t>self.pieces, <size_t>self.work.items,
            <size_t>self.work.expected.lines, <size_t>self.work.expected.line_sizes,
            <size_t>self.work.keys, <size_t>self.work.key_lines, <size_t>self.work.key_line_sizes,
        ):
            PyMem_Free(<void *>memory)


cdef class Download(Batch):
    """See bulk_batch.pyi."""

    def __init__(
        self, requests, templates, metadata, fall_back=ignore_fallback, *, sealing=None
    ):
        cdef Item *item
        self._start(requests, templates, fall_back, 2)
        self._expect(metadata)
        if sealing is not None:
            self._add_keys(sealing.keys)
            self.work.expected.encrypted = True
        for path, page in requests:
            item = self._add(path, page, sealing)
            if sealing is not None:
                _append(item, item.nonce, NONCE_SIZE)
            self._add_buffers(item, page, PyBUF_WRITABLE)
            if sealing is not None:
                _append(item, item.tail, TAIL_SIZE)
            self.free_pieces += item.count

    cdef _expect(self, metadata):
        cdef Expected *expected = &self.work.expected
        self.kept.append(metadata)
        expected.prefix, expected.prefix_size = metadata.prefix, len(metadata.prefix)
        expected.length, expected.checksum = metadata.length, metadata.checksum
        expected.line_count = len(metadata.lines)
        expected.lines = <const char **>allocate(expected.line_count, sizeof(char *))
        expected.line_sizes = <size_t *>allocate(expected.line_count, sizeof(size_t))
        for i, line in enumerate(metadata.lines):
            expected.lines[i], expected.line_sizes[i] = line, len(line)

    def checksums(self):
        cdef Py_ssize_t i
        cdef Item *item
        found = []
        for i in range(self.work.count):
            item = &self.work.items[i]
            found.append(
                item.checksum[:CHECKSUM_SIZE] if item.state == VERIFIED else None
            )
        return found

    def unverified(self):
        cdef Py_ssize_t i
        cdef Item *item
        found = []
        for i in range(self.work.count):
            item = &self.work.items[i]
            if item.state == UNVERIFIED and item.head != NULL:
                head = item.head[: item.head_size]
                found.append(Response(i, head, item.checksum[:CHECKSUM_SIZE]))
        return found


cdef class Upload(Batch):
    """See bulk_batch.pyi."""

    def __init__(
        self, requests, templates, fall_back=ignore_fallback, *, length, sealing=None, memory=()
    ):
        cdef Item *item
        self._start(requests, templates, fall_back, 1)
        self.work.uploads = True
        self.memory = list(memory)
        self.stored_size = length
        if sealing is not None:
            self._add_keys({b"": sealing.write})
            self.stored_size += NONCE_SIZE + TAIL_SIZE
            nonces = os.urandom(NONCE_SIZE * len(requests))
        for number, (path, page) in enumerate(requests):
            item = self._add(path, page, sealing)
            item.count = 1  # the first piece is the head
            self._add_buffers(item, page, PyBUF_SIMPLE)
            if item.length != <size_t>length:
                self.work.count -= 1
                break
            self.free_pieces += item.count
            if page.checksum is not None:
                if len(page.checksum) != CHECKSUM_SIZE:
                    raise ValueError("not a checksum")
                item.known = page.checksum
            if sealing is not None:
                nonce = nonces[NONCE_SIZE * number :]
                memcpy(item.nonce, <const char *>nonce, NONCE_SIZE)

    cdef bytearray take_memory(self):
        """Return the memory for one connection's sealed objects."""
        memory = self.memory.pop()
        if len(memory) < <Py_ssize_t>self.stored_size:
            raise ValueError(f"{len(memory)} bytes for objects of {self.stored_size}")
        return memory

    @property
    def started(self):
        return min(self.work.next, self.work.count)

    def stored(self):
        cdef Py_ssize_t i
        return [self.work.items[i].state == VERIFIED for i in range(self.work.count)]


cdef unsigned long long _seed(key) except? 0:
    """Return the seed of a page's checksum; see `page.checksum_seed`."""
    cdef bytes namespace = key.namespace, page_hash = key.hash
    cdef const unsigned char *one = namespace
    cdef const unsigned char *other = page_hash
    cdef unsigned long long seed = 0
    cdef int i
    if len(namespace) != NAMESPACE_DIGEST_SIZE or len(page_hash) != PAGE_HASH_SIZE:
        raise ValueError("not the key of a page")
    for i in range(8):
        seed |= <unsigned long long>(one[i] ^ other[i]) << (8 * i)
    return seed


cdef void *allocate(size_t count, size_t size) except NULL:
    """Return zeroed memory, to be freed with `PyMem_Free`."""
    memory = PyMem_Calloc(max(count, <size_t>1), size)
    if memory == NULL:
        raise MemoryError
    return memory


cdef void _append(Item *item, void *memory, size_t length) noexcept:
    if length:
        item.pieces[item.count] = iovec(memory, length)
        item.count += 1
        item.length += length

"""Linux AIO system calls, for which the C library has no wrappers (linux/aio_abi.h)."""

import ctypes
import errno
import os
import platform
import struct
from typing import NamedTuple

from memkv_sglang.tiers.nvme.disk.base import DiskRequest
from memkv_sglang.tiers.nvme.disk.direct_io import address_of


class _Numbers(NamedTuple):
    setup: int
    destroy: int
    submit: int
    get_events: int


_NUMBERS = {"x86_64": _Numbers(206, 207, 209, 208), "aarch64": _Numbers(0, 1, 2, 4)}.get(
    platform.machine()
)
_PREADV, _PWRITEV = 7, 8
_IOCB = struct.Struct("<QIiHhiQQqQII")
"""data, key, rw_flags, opcode, priority, fd, vectors, count, offset, reserved, flags, resfd"""
_EVENT = struct.Struct("<QQqq")
"""data, iocb, result, second result"""
_VECTOR = struct.Struct("<QQ")

_system_call = ctypes.CDLL(None, use_errno=True).syscall
_system_call.restype = ctypes.c_long


class Context:
    """An AIO context. Not thread-safe."""

    def __init__(self, depth: int) -> None:
        """Create a context for `depth` requests.

        Raises `OSError` if the kernel has no AIO or all contexts are in use (fs.aio-max-nr).
        """
        if _NUMBERS is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._numbers = _NUMBERS
        self._depth = depth
        self._id = ctypes.c_ulong(0)
        self._block = ctypes.create_string_buffer(_IOCB.size)
        self._blocks = (ctypes.c_void_p * 1)(ctypes.addressof(self._block))
        self._events = ctypes.create_string_buffer(_EVENT.size * depth)
        _call(self._numbers.setup, depth, ctypes.byref(self._id))

    def submit(self, number: int, request: DiskRequest) -> None:
        """Submit a request. Raises `OSError` if it is rejected, for example for too many buffers.

        The caller must keep its buffers until it has completed. Without O_DIRECT, this blocks.
        """
        vectors = b"".join([_VECTOR.pack(address_of(v), len(v)) for v in request.vectors])
        address = ctypes.cast(ctypes.c_char_p(vectors), ctypes.c_void_p).value
        _IOCB.pack_into(
            *(self._block, 0, number, 0, 0, _PWRITEV if request.writes else _PREADV, 0),
            *(request.fd, address, len(request.vectors), request.offset, 0, 0, 0),
        )
        # By the time this returns, the kernel has copied the control block and the vectors.
        _call(self._numbers.submit, self._id, 1, self._blocks)

    def collect(self) -> list[tuple[int, int]]:
        """Return number and result (bytes, or a negative errno) of the completed requests.

        Blocks until one completes. Returns an empty list if a signal interrupts it.
        """
        try:
            count = _call(self._numbers.get_events, self._id, 1, self._depth, self._events, None)
        except InterruptedError:
            return []
        events = (_EVENT.unpack_from(self._events, i * _EVENT.size) for i in range(count))
        return [(number, result) for number, _, result, _ in events]

    def close(self) -> None:
        """Wait for requests in flight and release the context."""
        _call(self._numbers.destroy, self._id)


def _call(number: int, *arguments: object) -> int:
    result: int = _system_call(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result

"""Aligned scratch memory for I/O tasks: footers, and a bounce buffer for unaligned pages."""

from collections.abc import Iterator
from contextlib import contextmanager

from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK, aligned_memory

_KEPT = 8 << 20
"""Maximum bytes of a bounce buffer that is kept for the next task."""
_TAIL = 2 * BLOCK
_IDLE = 32
"""Maximum number of scratches that are kept for the next tasks."""


class Scratch:
    """The scratch memory of one task. A method's memory stays valid until its next call."""

    def __init__(self) -> None:
        self._tails: list[memoryview] = []
        self._bounce = memoryview(b"")

    def tails(self, count: int) -> list[memoryview]:
        """Return `count` pairs of blocks: the first for padding, the second for a footer."""
        if len(self._tails) < count:
            memory = aligned_memory(count * _TAIL)
            self._tails = [memory[i * _TAIL : (i + 1) * _TAIL] for i in range(count)]
        return self._tails[:count]

    def bounce(self, size: int) -> memoryview:
        """Return `size` bytes aligned to a page boundary."""
        if len(self._bounce) >= size:
            return self._bounce[:size]
        memory = aligned_memory(size)
        if size <= _KEPT:
            self._bounce = memory
        return memory[:size]


class ScratchPool:
    """A pool of scratches. Thread-safe."""

    def __init__(self) -> None:
        self._idle: list[Scratch] = []

    @contextmanager
    def borrow(self) -> Iterator[Scratch]:
        """Provide a scratch for exclusive use within the `with` block."""
        try:
            scratch = self._idle.pop()
        except IndexError:
            scratch = Scratch()
        try:
            yield scratch
        finally:
            if len(self._idle) < _IDLE:
                self._idle.append(scratch)

"""Calls that add or find pages of a namespace kept apart from the removal of its pages."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class NamespaceGate:
    """Lets any number of calls use a namespace, and none while it is closed. Thread-safe."""

    def __init__(self) -> None:
        """Begin with every namespace open."""
        self._inside: Counter[bytes] = Counter()
        self._closed: Counter[bytes] = Counter()
        self._left = threading.Condition()

    @contextmanager
    def enter(self, namespace: bytes) -> Iterator[bool]:
        """Use a namespace within the block; yield False, and keep nobody waiting, if closed."""
        with self._left:
            is_open = namespace not in self._closed
            if is_open:
                self._inside[namespace] += 1
        try:
            yield is_open
        finally:
            if is_open:
                with self._left:
                    _take_one(self._inside, namespace)
                    if namespace in self._closed:
                        self._left.notify_all()

    @contextmanager
    def close(self, namespace: bytes, timeout: float) -> Iterator[bool]:
        """Keep calls out within the block, after waiting for those that are inside.

        Yields False if some of these had not ended after `timeout` seconds.
        """
        with self._left:
            self._closed[namespace] += 1
        try:
            with self._left:
                ended = self._left.wait_for(lambda: namespace not in self._inside, timeout)
            yield ended
        finally:
            with self._left:
                _take_one(self._closed, namespace)


def _take_one(counts: Counter[bytes], namespace: bytes) -> None:
    counts[namespace] -= 1
    if not counts[namespace]:
        del counts[namespace]

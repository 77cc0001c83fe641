"""Calls that add or find pages of a namespace kept apart from the removal of its pages."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class NamespaceGate:
    """Lets any number of calls use a namespace, and none while it is closed. Thread-safe."""

    def __init__(self) -> None:
        """Begin with every namespace open."""
        self._inside: dict[bytes, int] = {}
        self._closed: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)

    def enter(self, namespace: bytes) -> "_Use":
        """Use a namespace within a `with` block; gives False, without waiting, if it is closed."""
        return _Use(self, namespace)

    @contextmanager
    def close(self, namespace: bytes, timeout: float) -> Iterator[bool]:
        """Keep calls out within the block, after waiting for those that are inside.

        Yields False if some of these had not ended after `timeout` seconds.
        """
        with self._lock:
            _add(self._closed, namespace, 1)
        try:
            with self._left:
                ended = self._left.wait_for(lambda: namespace not in self._inside, timeout)
            yield ended
        finally:
            with self._lock:
                _add(self._closed, namespace, -1)

    def begin(self, namespace: bytes) -> bool:
        """Count a call in; False if the namespace is closed."""
        with self._lock:
            if namespace in self._closed:
                return False
            _add(self._inside, namespace, 1)
            return True

    def end(self, namespace: bytes) -> None:
        """Count a call out that `begin` has counted in."""
        with self._lock:
            _add(self._inside, namespace, -1)
            if namespace in self._closed:
                self._left.notify_all()


class _Use:
    """A call's use of a namespace; a class because a generator costs each lookup 2 us more."""

    __slots__ = ("_gate", "_is_open", "_namespace")

    def __init__(self, gate: NamespaceGate, namespace: bytes) -> None:
        self._gate = gate
        self._namespace = namespace

    def __enter__(self) -> bool:
        self._is_open = self._gate.begin(self._namespace)
        return self._is_open

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            self._gate.end(self._namespace)


def _add(counts: dict[bytes, int], namespace: bytes, change: int) -> None:
    count = counts.get(namespace, 0) + change
    if count:
        counts[namespace] = count
    else:
        del counts[namespace]

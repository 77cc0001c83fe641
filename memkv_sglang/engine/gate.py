"""Keep calls that find or store a namespace's pages from overlapping with the pages' removal."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class NamespaceGate:
    """Admits concurrent calls on a namespace, but none while it is closed. Thread-safe."""

    def __init__(self) -> None:
        """Start with all namespaces open."""
        self._calls: dict[bytes, int] = {}
        self._closed: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._drained = threading.Condition(self._lock)

    def enter(self, namespace: bytes) -> "_Use":
        """Use a namespace in a `with` block. Yields False, without waiting, if it is closed."""
        return _Use(self, namespace)

    @contextmanager
    def close(self, namespace: bytes, timeout: float) -> Iterator[bool]:
        """Wait for calls in flight, then admit none during the block.

        Yields False if some calls had not ended after `timeout` seconds.
        """
        with self._lock:
            _add(self._closed, namespace, 1)
        try:
            with self._drained:
                ended = self._drained.wait_for(lambda: namespace not in self._calls, timeout)
            yield ended
        finally:
            with self._lock:
                _add(self._closed, namespace, -1)

    def begin(self, namespace: bytes) -> bool:
        """Register a call. Returns False if the namespace is closed."""
        with self._lock:
            if namespace in self._closed:
                return False
            _add(self._calls, namespace, 1)
            return True

    def end(self, namespace: bytes) -> None:
        """Unregister a call that `begin` registered."""
        with self._lock:
            _add(self._calls, namespace, -1)
            if namespace in self._closed:
                self._drained.notify_all()


class _Use:
    """A context manager of one call. A class, because a generator would add 2 us to each lookup."""

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

"""What every agent that this client meets has to be told: its pools and namespaces."""

import fcntl
import itertools
import logging
import os
import threading
import time

from memkv_sglang.agent import protocol
from memkv_sglang.agent.pools import check_descriptor
from memkv_sglang.client.connection import Connection
from memkv_sglang.namespace import Namespace

log = logging.getLogger(__name__)

ANNOUNCE_LIMIT = 5.0
"""Seconds for the agent to take a pool or a description."""

KEPT_NAMESPACES = 64
"""Descriptions that another agent is told of, the newest: a server has one a pool, and new ones
whenever its weights are updated."""


class Registry:
    """Pools by number and namespaces by digest. Not thread-safe; see `lock`."""

    def __init__(self) -> None:
        """Start without any."""
        self.lock = threading.Lock()
        """Held by whoever uses the registry, also while it tells an agent."""
        self._numbers = itertools.count()
        self._pools: dict[int, tuple[int, int]] = {}
        self._namespaces: dict[bytes, Namespace] = {}

    def add_pool(self, descriptor: int, length: int) -> int:
        """Keep a duplicate of the descriptor, return the pool's number. Raises `RequestError`."""
        check_descriptor(descriptor, length)
        number = next(self._numbers)
        self._pools[number] = (fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 0), length)
        return number

    def remove_pool(self, number: int) -> None:
        """Forget a pool; raises `KeyError`."""
        descriptor, _ = self._pools.pop(number)
        os.close(descriptor)

    def add_namespace(self, namespace: Namespace) -> bool:
        """Keep a description; False if it is known."""
        known = self._namespaces.pop(namespace.digest, None)
        self._namespaces[namespace.digest] = namespace
        if len(self._namespaces) > KEPT_NAMESPACES:
            del self._namespaces[next(iter(self._namespaces))]
        return known is None

    def announce(self, connection: Connection) -> None:
        """Tell an agent everything. Raises `ConnectionLostError`."""
        for number in self._pools:
            self.announce_pool(connection, number)
        for namespace in self._namespaces.values():
            announce_namespace(connection, namespace)

    def announce_pool(self, connection: Connection, number: int) -> None:
        """Tell an agent of one pool. Raises `ConnectionLostError`."""
        descriptor, length = self._pools[number]
        _tell(connection, protocol.RegisterPool(number, length), descriptor)

    def close(self) -> None:
        """Forget all pools."""
        for number in list(self._pools):
            self.remove_pool(number)


def announce_namespace(connection: Connection, namespace: Namespace) -> None:
    """Tell an agent of one namespace. Raises `ConnectionLostError`."""
    _tell(connection, protocol.Describe(namespace.description))


def _tell(connection: Connection, request: protocol.Request, *descriptors: int) -> None:
    reply = connection.call(request, time.monotonic() + ANNOUNCE_LIMIT, descriptors)
    if isinstance(reply, protocol.Refused):
        name = type(request).__name__
        log.error("memkv: the agent refused what it must know (%s): %s", name, reply.reason)

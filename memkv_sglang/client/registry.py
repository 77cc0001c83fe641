"""The pools and namespaces that a client registers with each agent it connects to."""

import fcntl
import itertools
import logging
import os
import threading
import time

from memkv_sglang.agent import protocol
from memkv_sglang.agent.pools import check_descriptor
from memkv_sglang.client.connection import AgentConnection
from memkv_sglang.namespace import Namespace

log = logging.getLogger(__name__)

ANNOUNCE_LIMIT = 5.0
"""Seconds for the agent to register a pool or a description."""

KEPT_NAMESPACES = 64
"""Number of the newest descriptions to register with a new agent. A server has one per pool, and
new ones after each weight update."""


class Registry:
    """Pools by number, and namespaces by digest. Not thread-safe; hold `lock`."""

    def __init__(self) -> None:
        """Start empty."""
        self.lock = threading.Lock()
        """Hold it while using the registry, including while sending to an agent."""
        self._numbers = itertools.count()
        self._pools: dict[int, tuple[int, int]] = {}
        self._namespaces: dict[bytes, Namespace] = {}

    def add_pool(self, descriptor: int, length: int) -> int:
        """Add a pool and return its number. Duplicates the descriptor. Raises `RequestError`."""
        check_descriptor(descriptor, length)
        number = next(self._numbers)
        self._pools[number] = (fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 0), length)
        return number

    def remove_pool(self, number: int) -> None:
        """Remove a pool. Raises `KeyError`."""
        descriptor, _ = self._pools.pop(number)
        os.close(descriptor)

    def add_namespace(self, namespace: Namespace) -> bool:
        """Add a namespace; return whether it is new."""
        known = self._namespaces.pop(namespace.digest, None)
        self._namespaces[namespace.digest] = namespace
        if len(self._namespaces) > KEPT_NAMESPACES:
            del self._namespaces[next(iter(self._namespaces))]
        return known is None

    def announce(self, connection: AgentConnection) -> None:
        """Register all pools and namespaces with an agent. Raises `ConnectionLostError`."""
        for number in self._pools:
            self.announce_pool(connection, number)
        for namespace in self._namespaces.values():
            announce_namespace(connection, namespace)

    def announce_pool(self, connection: AgentConnection, number: int) -> None:
        """Register one pool with an agent. Raises `ConnectionLostError`."""
        descriptor, length = self._pools[number]
        _send(connection, protocol.RegisterPool(number, length), descriptor)

    def close(self) -> None:
        """Remove all pools."""
        for number in list(self._pools):
            self.remove_pool(number)


def announce_namespace(connection: AgentConnection, namespace: Namespace) -> None:
    """Register one namespace with an agent. Raises `ConnectionLostError`."""
    _send(connection, protocol.Describe(namespace.description))


def _send(connection: AgentConnection, request: protocol.Request, *descriptors: int) -> None:
    reply = connection.call(request, time.monotonic() + ANNOUNCE_LIMIT, descriptors)
    if isinstance(reply, protocol.Refused):
        name = type(request).__name__
        log.error("memkv: the agent refused %s: %s", name, reply.reason)

"""Clients that fork, violate the protocol, or write to memory that is not theirs."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import msgspec

from memkv_sglang.agent import protocol
from memkv_sglang.agent.wire import Channel, encode_frame
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.testing.pages import make_chain
from memkv_testbed.faults.base import Fault, leave_alone
from memkv_testbed.faults.cluster import NAMESPACE, PAGE_BYTES, Cluster
from memkv_testbed.faults.node import Node
from memkv_testbed.faults.traffic import LONGEST, Caller
from memkv_testbed.host_pool import HostPool

_CHILD_CALLS = 200
_CHILD_LIMIT = 30
"""Seconds after which a forked child counts as hung and ends."""

_CHAINS = 2
_ATTEMPTS = 10
"""Loads per chain and node that the client abandons."""
_READERS = 2
"""Number of well-behaved clients per node that load the same pages in the meantime."""
_ABANDON_WITHIN = 0.01
"""The client hangs up at a random moment within this many seconds, during its load or after it."""
_REPLY_LIMIT = 10.0


def _fork_clients(cluster: Cluster) -> None:
    """Make a forked child call its parent's clients, which must not work."""
    child = os.fork()
    if child == 0:
        signal.alarm(_CHILD_LIMIT)
        chain = make_chain(NAMESPACE, 1, "nobody's")
        answered = [
            node.client.lookup(chain).complete
            for node in cluster.nodes
            for _ in range(_CHILD_CALLS)
        ]
        os._exit(any(answered))
    if os.waitpid(child, 0)[1]:
        cluster.violations.append("a forked child got an answer, or hung")


class RudeClient:
    """A session with an agent, without the client library and its precautions."""

    def __init__(self, node: Node) -> None:
        """Connect, and register memory for one chain."""
        self.pool = HostPool(LONGEST, PAGE_BYTES, parts=1)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel = Channel(sock, msgspec.msgpack.Decoder(protocol.Reply))
        try:
            sock.connect(os.fspath(node.socket))
            self.ask(protocol.Hello(protocol.PROTOCOL_VERSION, b""))
            for descriptor in self._channel.claim_descriptors():
                os.close(descriptor)
            self.ask(protocol.RegisterPool(0, self.pool.length), self.pool.descriptor)
        except BaseException:
            self.close()
            raise

    def ask(self, request: protocol.Request, *descriptors: int) -> protocol.Reply:
        """Send a request; return the reply. Raises `OSError`, `EOFError` or `ProtocolError`."""
        self._channel.send(encode_frame(request), descriptors)
        reply: protocol.Reply = self._channel.receive(time.monotonic() + _REPLY_LIMIT)
        return reply

    def abandon_load(self, chain: Chain) -> None:
        """Request a load, and hang up before its reply or shortly after it."""
        buffers = self.pool.buffers(0, range(len(chain.hashes)))
        request = protocol.LoadPages(chain.namespace, b"".join(chain.hashes), buffers)
        self._channel.send(encode_frame(request))
        time.sleep(random.uniform(0.0, _ABANDON_WITHIN))  # noqa: S311 - not a secret
        self.close()

    def close(self) -> None:
        """Close the connection. The memory stays."""
        self._channel.close()


@contextmanager
def _scribbling(memory: memoryview) -> Iterator[None]:
    """Overwrite memory without pause in a thread, as a server does when it reuses its pages."""
    stopped = threading.Event()
    junk = b"\xee" * len(memory)

    def scribble() -> None:
        while not stopped.wait(0.0005):
            memory[:] = junk

    thread = threading.Thread(target=scribble, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@contextmanager
def _loading(callers: list[Caller], chains: list[Chain]) -> Iterator[None]:
    """Make each caller load and compare the chains without pause while the block runs."""
    stopped = threading.Event()

    def load(caller: Caller) -> None:
        while not stopped.is_set():
            for chain in chains:
                caller.load(chain)

    threads = [threading.Thread(target=load, args=(caller,), daemon=True) for caller in callers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def _hang_up_in_mid_load(cluster: Cluster) -> None:
    """Abandon loads and write to their memory, while other clients load the same pages."""
    with ExitStack() as stack:
        callers = [
            stack.enter_context(closing(Caller(node, f"reader {os.urandom(4).hex()}")))
            for node in cluster.nodes
            for _ in range(_READERS)
        ]
        for _ in range(_CHAINS):
            # Spill only to MinIO, because the other node reads the pages from there.
            callers[-1].spill()
        chains = list(callers[-1].acknowledged)
        with _loading(callers, chains):
            for chain in chains * _ATTEMPTS:
                for node in cluster.nodes:
                    _abandon(node, chain)
        for caller in callers:
            cluster.seen += caller.take()
        cluster.acknowledged += chains


def _abandon(node: Node, chain: Chain) -> None:
    with suppress(OSError, EOFError):  # the agent may be ending, because it is about to be replaced
        client = RudeClient(node)
        with _scribbling(client.pool.memory):
            client.abandon_load(chain)
            time.sleep(_ABANDON_WITHIN)


_OVERLAPS = [
    [[(0, PAGE_BYTES)], [(0, PAGE_BYTES)]],
    [[(0, PAGE_BYTES // 2), (0, PAGE_BYTES // 2)]],
    [[(0, PAGE_BYTES)], [(PAGE_BYTES - 1, PAGE_BYTES)]],
    [[((LONGEST - 1) * PAGE_BYTES, PAGE_BYTES * 2)]],
    [[(1 << 62, PAGE_BYTES)]],
]
"""Buffers (offset, length) of pages that overlap, or lie outside the pool."""


def _overlap_buffers(cluster: Cluster) -> None:
    """Spill and load with buffers that overlap, or lie outside the pool."""
    for node in cluster.nodes:
        with suppress(OSError, EOFError), closing(RudeClient(node)) as client:
            for overlap in _OVERLAPS:
                pages = [[Buffer(0, *buffer) for buffer in page] for page in overlap]
                chain = make_chain(NAMESPACE, len(pages), "overlapping")
                hashes = b"".join(chain.hashes)
                for request in (
                    protocol.SpillPages(chain.namespace, hashes, pages, b""),
                    protocol.LoadPages(chain.namespace, hashes, pages),
                ):
                    if not isinstance(client.ask(request), protocol.Refused):
                        cluster.violations.append(f"accepted: {request}")


FAULTS = [
    Fault("forks", "client", _fork_clients, leave_alone),
    Fault("sends overlapping buffers", "client", _overlap_buffers, leave_alone),
    Fault("hangs up in mid-load", "client", _hang_up_in_mid_load, leave_alone),
]

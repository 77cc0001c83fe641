"""Machines in network namespaces on one switch, each with a link of limited rate."""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from benchmarks.base import MissingToolError, tool

CLONE_NEWNET = 0x40000000
OWN_NETWORK = "/proc/thread-self/ns/net"
MTU = "9000"
_LIBC = ctypes.CDLL(None, use_errno=True)


class Machine(NamedTuple):
    """A network namespace, which exists as long as its descriptor is open."""

    address: str
    namespace: int


@contextmanager
def network(megabits: Sequence[int]) -> Iterator[list[Machine]]:
    """Yield machines whose links carry so many Mb/s in each direction (`tbf`).

    Nothing else reaches them. Raises `MissingToolError` without the rights or tools for this.
    """
    ip, tc = tool("ip"), tool("tc")
    if os.geteuid():
        raise MissingToolError("shaped links need root")
    with ExitStack() as stack:
        switch = _new_namespace(stack)
        machines = [
            Machine(f"198.18.0.{number}", _new_namespace(stack))
            for number in range(1, len(megabits) + 1)
        ]
        with inside(switch):
            _run(ip, "link", "add", "switch", "mtu", MTU, "type", "bridge")
            _run(ip, "link", "set", "switch", "up")
        for number, (machine, rate) in enumerate(zip(machines, megabits, strict=True)):
            port = f"port{number}"
            there = f"/proc/{os.getpid()}/fd/{machine.namespace}"
            with inside(switch):
                peer = ("peer", "name", "cable", "mtu", MTU, "netns", there)
                _run(ip, "link", "add", port, "mtu", MTU, "type", "veth", *peer)
                _run(ip, "link", "set", port, "master", "switch", "up")
                _limit(tc, port, rate)
            with inside(machine.namespace):
                _run(ip, "address", "add", f"{machine.address}/24", "dev", "cable")
                _run(ip, "link", "set", "lo", "up")
                _run(ip, "link", "set", "cable", "up")
                _limit(tc, "cable", rate)
        yield machines


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Let this thread, and what it starts, use the network of a namespace."""
    before = os.open(OWN_NETWORK, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_LIBC.setns(namespace, CLONE_NEWNET))
        try:
            yield
        finally:
            _check(_LIBC.setns(before, CLONE_NEWNET))
    finally:
        os.close(before)


def _new_namespace(stack: ExitStack) -> int:
    before = os.open(OWN_NETWORK, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_LIBC.unshare(CLONE_NEWNET))
        new = os.open(OWN_NETWORK, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, new)
        _check(_LIBC.setns(before, CLONE_NEWNET))
    finally:
        os.close(before)
    return new


def _check(status: int) -> None:
    if status:
        raise MissingToolError(f"shaped links: {os.strerror(ctypes.get_errno())}")


def _limit(tc: str, interface: str, megabits: int) -> None:
    shape = ("rate", f"{megabits}mbit", "burst", "64k", "latency", "50ms")
    _run(tc, "qdisc", "add", "dev", interface, "root", "tbf", *shape)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingToolError(f"shaped links: {' '.join(command)}: {done.stderr.strip()}")

"""Two machines for tests: network and shared memory of their own, and a cable between them."""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

CABLE = "cable"
"""Name of the interface that leads to the other machine."""

_SET_UP = """
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
exec cat
"""
"""Then waits for the end of its standard input, so that no namespace outlives the tests."""


class Machine(NamedTuple):
    """Namespaces of the kernel, which exist as long as the process that holds them."""

    address: str
    """Reachable from the other machine and from the test."""
    prefix: list[str]
    """Command that runs another command on this machine."""


class Pair(NamedTuple):
    first: Machine
    second: Machine
    outside: str
    """The test's own address, which both machines reach."""


def refusal() -> str:
    """Return why this system cannot have such machines; "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces with a cable need root"
    try:
        done = subprocess.run(["unshare", "--net", "--mount", "ip", "link"], capture_output=True)
    except FileNotFoundError as error:
        return f"needs {error.filename}"
    return done.stderr.decode().strip() if done.returncode else ""


@contextmanager
def two_machines() -> Iterator[Pair]:
    """Yield two machines that run until the block ends."""
    # Addresses reserved for benchmarks of networks (RFC 2544); each run picks some of them.
    number = random.SystemRandom().randrange(512)
    outside, *addresses = (f"198.{18 + number // 256}.{number % 256}.{host}" for host in (1, 2, 3))
    with ExitStack() as stack:
        holders = [stack.enter_context(_namespaces()) for _ in addresses]
        for pid, address in zip(holders, addresses, strict=True):
            name = f"memkv{pid}"
            _run("ip", "link", "add", name, "type", "veth", "peer", "outside", "netns", str(pid))
            _connect([], name, outside, address)
            _connect(_inside(pid), "outside", address, outside)
        first, second = (_inside(pid) for pid in holders)
        peer = ("type", "veth", "peer", CABLE, "netns", str(holders[1]))
        _run(*first, "ip", "link", "add", CABLE, *peer)
        _connect(first, CABLE, *addresses)
        _connect(second, CABLE, *reversed(addresses))
        yield Pair(Machine(addresses[0], first), Machine(addresses[1], second), outside)


@contextmanager
def _namespaces() -> Iterator[int]:
    """Yield the process that holds a machine's namespaces."""
    unshare = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec", _SET_UP]
    process = subprocess.Popen(unshare, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:  # closes its standard input and waits for its end
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid


def _inside(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--net", "--mount", f"--wdns={Path.cwd()}", "--"]


def _connect(prefix: list[str], interface: str, own: str, other: str) -> None:
    """Give one end of a cable its address, and a route to the other end."""
    _run(*prefix, "ip", "address", "add", own, "peer", other, "dev", interface)
    _run(*prefix, "ip", "link", "set", interface, "up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)

"""Machines with their own network and shared memory, and cables between them."""

import ctypes
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

CABLE = "cable"
"""Name of the interface that leads to the other machine, or to the switch."""

CLONE_NEWNET = 0x40000000

_SET_UP = """
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
exec cat
"""
"""Sets up a machine; `cat` then waits for the end of its standard input, when the test ends."""

_MTU = ("mtu", "9000")
_BRIDGE = "bridge"

_TOKEN_BUCKET = ("burst", "256k", "limit", "4m")
"""`burst` exceeds what the kernel hands over at once (64 KiB); `limit` fits many connections."""


class Machine(NamedTuple):
    """Namespaces of the kernel, which exist as long as the process that holds them."""

    address: str
    """Reachable from the other machines."""
    pid: int
    """The process that holds the namespaces."""

    @property
    def prefix(self) -> list[str]:
        """Command that runs another command on this machine."""
        return _inside(self.pid)

    @contextmanager
    def network(self) -> Iterator[None]:
        """Move this thread to the machine's network; threads and processes it starts are there too.

        Shared memory stays that of the caller.
        """
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter_network(f"/proc/{self.pid}/ns/net")
            try:
                yield
            finally:
                _enter_network(f"/proc/self/fd/{own}")
        finally:
            os.close(own)

    def received(self) -> int:
        """Return the bytes that have arrived over the cable."""
        with self.network():
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        values = next(line for line in lines if line.strip().startswith(f"{CABLE}:"))
        return int(values.partition(":")[2].split()[0])


class Pair(NamedTuple):
    """Two machines with a cable between them."""

    first: Machine
    second: Machine
    outside: str
    """The test's own address, which both machines reach."""


def refusal() -> str:
    """Return why this system cannot have such machines; "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces with a cable need root"
    try:
        done = subprocess.run(
            ["unshare", "--net", "--mount", "ip", "link"], capture_output=True, check=False
        )
        subprocess.run(["tc", "-V"], capture_output=True, check=False)
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
        machines = map(Machine, addresses, holders)
        yield Pair(next(machines), next(machines), outside)


@contextmanager
def switched_machines(megabits: Sequence[int]) -> Iterator[list[Machine]]:
    """Yield machines on one switch that run until the block ends.

    `megabits` is the rate of each machine's line in Mb/s, in either direction (`tbf`, MTU 9000).
    The machines reach each other only; enter one with `Machine.network`.
    """
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces())
        _run(*_inside(switch), "ip", "link", "add", _BRIDGE, "type", "bridge")
        _run(*_inside(switch), "ip", "link", "set", _BRIDGE, "up", *_MTU)
        machines = []
        for number, rate in enumerate(megabits, 1):
            machine = Machine(f"198.18.0.{number}", stack.enter_context(_namespaces()))
            port = f"port{number}"
            peer = ("type", "veth", "peer", "name", port, "netns", str(switch))
            _run(*machine.prefix, "ip", "link", "add", CABLE, *peer)
            address = (f"{machine.address}/24", "dev", CABLE)
            _run(*machine.prefix, "ip", "address", "add", *address)
            _run(*_inside(switch), "ip", "link", "set", port, "master", _BRIDGE)
            for prefix, interface in ((machine.prefix, CABLE), (_inside(switch), port)):
                _run(*prefix, "ip", "link", "set", interface, "up", *_MTU)
                limit = ("root", "tbf", "rate", f"{rate}mbit", *_TOKEN_BUCKET)
                _run(*prefix, "tc", "qdisc", "add", "dev", interface, *limit)
            machines.append(machine)
        yield machines


@contextmanager
def _namespaces() -> Iterator[int]:
    """Yield the process that holds a machine's namespaces."""
    unshare = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec", _SET_UP]
    process = subprocess.Popen(unshare, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:  # on exit, closes the process's standard input, which ends it, and waits
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid


def _enter_network(file: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}")
    finally:
        os.close(descriptor)


def _inside(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--net", "--mount", f"--wdns={Path.cwd()}", "--"]


def _connect(prefix: list[str], interface: str, own: str, other: str) -> None:
    """Give one end of a cable its address, and a route to the other end."""
    _run(*prefix, "ip", "address", "add", own, "peer", other, "dev", interface)
    _run(*prefix, "ip", "link", "set", interface, "up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)

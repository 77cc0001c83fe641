"""Addresses of this machine whose links are limited, each to the same rate."""

import ctypes
import os
import subprocess

from benchmarks.base import MissingToolError, tool

CLONE_NEWNET = 0x40000000


def limit_links(count: int, megabits: int) -> list[str]:
    """Move this process to its own network; return addresses, each with its own link.

    Traffic from an address is limited to `megabits` per second (`htb`, MTU 9000). Programs started
    later run in the same network. Raises `MissingToolError` without the rights or tools for this.
    """
    ip, tc = tool("ip"), tool("tc")
    if os.geteuid():
        raise MissingToolError("limited links need root")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise MissingToolError(f"limited links: {os.strerror(ctypes.get_errno())}")
    addresses = [f"127.0.0.{number + 2}" for number in range(count)]
    _run(ip, "link", "set", "lo", "up", "mtu", "9000")
    _run(tc, "qdisc", "add", "dev", "lo", "root", "handle", "1:", "htb", "default", "99")
    for number, address in enumerate(addresses, 2):
        parent, name, rate = ("dev", "lo", "parent", "1:"), f"1:{number}", f"{megabits}mbit"
        burst = ("burst", "64k", "cburst", "64k", "quantum", "60000")
        _run(tc, "class", "add", *parent, "classid", name, "htb", "rate", rate, *burst)
        match = ("u32", "match", "ip", "src", f"{address}/32", "flowid", name)
        _run(tc, "filter", "add", *parent, "protocol", "ip", *match)
    return addresses


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingToolError(f"limited links: {' '.join(command)}: {done.stderr.strip()}")

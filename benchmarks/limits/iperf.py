"""iperf3: the throughput that TCP reaches between machines."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from memkv_testbed.machines import Machine

from benchmarks.base import tool

PORT = 5201

SKIPPED = 1
"""Seconds at the start that do not count."""


class Stream(NamedTuple):
    """What one iperf3 client receives or sends."""

    client: Machine
    server: Machine


def iperf(
    streams: Sequence[Stream], connections: int, seconds: int, *, upload: bool
) -> list[float]:
    """Return the GB/s of TCP payload of each stream, all at once, each with some connections.

    The servers send, or the clients with `upload`. Raises `MissingToolError`.
    """
    with ExitStack() as stack:
        for number, stream in enumerate(streams):
            stack.enter_context(_serving(stream.server, PORT + number))
        clients = []
        for number, (client, server) in enumerate(streams):
            command = [
                *(tool("iperf3"), "--json", "--client", server.address),
                *("--port", str(PORT + number), "--parallel", str(connections)),
                *("--omit", str(SKIPPED), "--time", str(seconds)),
                *([] if upload else ["--reverse"]),
            ]
            with client.network():
                clients.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        outputs = [client.communicate()[0] for client in clients]
    return [_received(output) for output in outputs]


@contextmanager
def _serving(machine: Machine, port: int) -> Iterator[None]:
    command = [tool("iperf3"), "--server", "--bind", machine.address, "--port", str(port)]
    with machine.network():
        # Without --forceflush it would buffer its first line.
        server = subprocess.Popen([*command, "--forceflush"], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        while not server.stdout.readline().startswith(b"Server listening"):
            if server.poll() is not None:
                raise RuntimeError(f"iperf3 does not listen on {machine.address}")
        yield
    finally:
        server.kill()
        server.communicate()


def _received(output: bytes) -> float:
    result = json.loads(output)
    if "error" in result:
        raise RuntimeError(f"iperf3: {result['error']}")
    return float(result["end"]["sum_received"]["bits_per_second"]) / 8e9

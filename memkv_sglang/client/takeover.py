"""Replace an agent that a server cannot use, because its settings differ or it is an older version.

The agent is replaced only if a server started it and no other client uses it. It finishes its
uploads first. Agents that were started by hand or as a service keep running, and so does any other
process that serves the socket.
"""

import os
import signal
import socket
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from memkv_sglang.agent import protocol
from memkv_sglang.agent.peer import open_peer_pidfd, peer_of
from memkv_sglang.agent.settings import RunningSettings, make_nonce
from memkv_sglang.client.connection import (
    AgentConnection,
    AgentRefusedError,
    OtherVersionError,
    place_of,
)
from memkv_sglang.config.schema import Config

ANSWER_LIMIT = 5.0
"""Seconds for the agent to answer a request of this module."""

END_LIMIT = 15.0
"""Seconds that an agent may take to end, in addition to finishing its uploads."""

LONGEST_DRAIN = 3600.0
"""The upper bound of the setting `agent.drain_timeout`."""

_LISTENING, _ACCEPTING, _CONNECTED = "01", "02", "03"
"""Socket states in `/proc/net/unix`. A connection is `_ACCEPTING` until the server accepts it."""


class UnsuitableAgentError(AgentRefusedError):
    """The agent cannot be used, and cannot be replaced now."""


class Retired(NamedTuple):
    """An agent that was asked to stop."""

    reason: str
    seconds: float
    """Maximum seconds until it has ended."""


def join_or_retire(connection: AgentConnection, config: Config) -> Retired | None:
    """Join the agent if it runs with the settings in `config`; otherwise ask it to stop.

    Returns None if it was joined. Raises `UnsuitableAgentError` if it has other settings and keeps
    running, `AgentRefusedError` if it is about to stop, and `ConnectionLostError`.
    """
    nonce = make_nonce()
    report = _ask(connection, protocol.Settings(nonce))
    if not isinstance(report, protocol.SettingsReport):
        raise AgentRefusedError(_reason(report))
    difference = RunningSettings(report, nonce).first_difference(config, os.environ)
    if difference is None:
        reply = _ask(connection, protocol.Join())
        if not isinstance(reply, protocol.Done):
            raise AgentRefusedError(_reason(reply))
        return None
    reply = _ask(connection, protocol.Retire())
    if not isinstance(reply, protocol.Done):
        raise UnsuitableAgentError(
            f"{difference}; the agent ({place_of(connection.pid)}) keeps running: "
            f"{_reason(reply)}. Give all servers of this node the same settings, restart the "
            "agent, or set another agent.socket"
        )
    drain = float(report.values.get("agent.drain_timeout", LONGEST_DRAIN))
    return Retired(f"{difference} ({place_of(connection.pid)})", drain + END_LIMIT)


def end_older_agent(path: Path, module: str, error: OtherVersionError) -> int:
    """Send SIGTERM to an agent of an older version; return its pidfd, owned by the caller.

    Raises `UnsuitableAgentError` if the agent must keep running, `OSError` if it has ended.
    """
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
        sock.settimeout(ANSWER_LIMIT)
        sock.connect(os.fspath(path))
        pid, pidfd = peer_of(sock).pid, open_peer_pidfd(sock)
        try:
            _check_replaceable(pid, module, error)
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        except BaseException:
            os.close(pidfd)
            raise
    return pidfd


def _check_replaceable(pid: int, module: str, error: OtherVersionError) -> None:
    if problem := _why_not_replaceable(pid, module, error):
        stop = f"kill {pid}" if pid else "replace its container"
        raise UnsuitableAgentError(
            f"{error}; it keeps running: {problem}. Stop it ({stop}) once it is unused, or set "
            "another agent.socket"
        )


def _why_not_replaceable(pid: int, module: str, error: OtherVersionError) -> str:
    if pid == 0:
        return "it runs in another container"
    if pid != error.pid:
        return "another process serves the socket now"
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if [b"-m", os.fsencode(module)] not in [arguments[i : i + 2] for i in range(len(arguments))]:
        return "it was started by hand or as a service"
    others = _count_connections(pid) - 1  # ours
    return f"it serves {others} other connection{'s' * (others > 1)}" if others > 0 else ""


def _count_connections(pid: int) -> int:
    """Return how many clients are connected to the process's listening sockets.

    Includes connections that the process has not accepted yet, such as this client's.
    """
    own = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor was closed meanwhile
            own.add(str(entry.readlink()))
    named = [
        fields
        for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
        if len(fields := line.split(maxsplit=7)) == 8
    ]
    sockets = [fields for fields in named if f"socket:[{fields[6]}]" in own]
    listening = {fields[7] for fields in sockets if fields[5] == _LISTENING}
    accepted = sum(fields[5] == _CONNECTED and fields[7] in listening for fields in sockets)
    return accepted + sum(fields[5] == _ACCEPTING and fields[7] in listening for fields in named)


def _ask(connection: AgentConnection, request: protocol.Request) -> protocol.Reply:
    return connection.call(request, time.monotonic() + ANSWER_LIMIT)


def _reason(reply: protocol.Reply) -> str:
    return reply.reason if isinstance(reply, protocol.Refused) else f"no {type(reply).__name__}"

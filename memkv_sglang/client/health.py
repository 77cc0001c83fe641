"""Report in the server's own log where the agent logs and whether its tiers work."""

import logging
import time
from collections.abc import Sequence

from memkv_sglang.agent import protocol
from memkv_sglang.client.connection import AgentRefusedError, ConnectionLostError
from memkv_sglang.client.link import Link
from memkv_sglang.engine.status import TierStatus

log = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds between checks."""

FIRST_PERIOD = 0.5
"""Seconds between checks until every tier has answered once."""

STATUS_LIMIT = 1.0
"""Seconds to wait for the agent's status before trying again later."""

WORKS, UNKNOWN = "", None


class HealthLog:
    """Logs changes in one agent's state. Not thread-safe."""

    def __init__(self) -> None:
        """Start with nothing logged."""
        self._introduced = False
        self._logged: dict[str, str] = {}
        """Last logged problem of each tier; empty if it works."""

    def check(self, link: Link) -> float:
        """Query the agent and log what changed; return the seconds until the next check."""
        try:
            with link.connection() as connection:
                reply = connection.call(protocol.Status(), time.monotonic() + STATUS_LIMIT)
        except (AgentRefusedError, ConnectionLostError):  # the next call reports the failure
            return PERIOD
        if not isinstance(reply, protocol.StatusReport):
            return PERIOD
        self._introduce(reply.agent)
        self._report(reply.engine.tiers)
        unknown = any(tier.problem is UNKNOWN for tier in reply.engine.tiers)
        return FIRST_PERIOD if unknown else PERIOD

    def _introduce(self, agent: protocol.AgentStatus) -> None:
        if not self._introduced:
            place = agent.log or "its stderr"
            log.info("memkv: agent connected (pid %d); it logs to %s", agent.pid, place)
            self._introduced = True

    def _report(self, tiers: Sequence[TierStatus]) -> None:
        for tier in tiers:
            if tier.problem is UNKNOWN or tier.problem == self._logged.get(tier.name):
                continue
            self._logged[tier.name] = tier.problem
            if tier.problem == WORKS:
                log.info("memkv: tier %s works", tier.name)
            else:
                log.warning("memkv: tier %s does not work: %s", tier.name, tier.problem)

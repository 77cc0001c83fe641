"""What a server's own log says of the agent: where it logs to, and which of its tiers work."""

import logging
import time
from collections.abc import Sequence

from memkv_sglang.agent import protocol
from memkv_sglang.client.connection import AgentRefusedError, ConnectionLostError
from memkv_sglang.client.link import Link
from memkv_sglang.engine.status import TierStatus

log = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds from one look to the next."""

FIRST_PERIOD = 0.5
"""The same while a tier has not answered for the first time."""

STATUS_LIMIT = 1.0
"""Seconds for the agent to tell its state; it is asked again."""

WORKS, UNKNOWN = "", None


class HealthLog:
    """Logs each state of one agent once, until it changes. For one thread."""

    def __init__(self) -> None:
        """Begin with nothing said."""
        self._introduced = False
        self._said: dict[str, str] = {}
        """Why each tier does not work, as it was logged last; empty for one that does."""

    def look(self, link: Link) -> float:
        """Ask the agent, log what is new; returns the seconds until it should be asked again."""
        try:
            with link.connection() as connection:
                reply = connection.call(protocol.Status(), time.monotonic() + STATUS_LIMIT)
        except (AgentRefusedError, ConnectionLostError):  # others see to that
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
            if tier.problem is UNKNOWN or tier.problem == self._said.get(tier.name):
                continue
            self._said[tier.name] = tier.problem
            if tier.problem == WORKS:
                log.info("memkv: tier %s works", tier.name)
            else:
                log.warning("memkv: tier %s does not work: %s", tier.name, tier.problem)

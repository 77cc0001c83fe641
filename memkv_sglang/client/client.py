"""The client library: pages named by pool and offset, and the agent that moves them."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn, TypeVar

import msgspec

from memkv_sglang.agent import protocol
from memkv_sglang.agent.launch import MODULE
from memkv_sglang.agent.settings import RunningSettings, make_nonce
from memkv_sglang.client.connection import AgentRefusedError, Connection, ConnectionLostError
from memkv_sglang.client.keeper import LinkKeeper
from memkv_sglang.client.registry import announce_namespace
from memkv_sglang.client.withheld import withheld
from memkv_sglang.config.schema import Config
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.engine.results import PageLoad, Warming
from memkv_sglang.log_limit import LogLimit
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.printable import printable
from memkv_sglang.tiers.base import LoadResult, Lookup, SpillResult

log = logging.getLogger(__name__)

CALL_LIMIT = 7.0
"""Seconds after which a load or spill kills the agent; it returns `END_LIMIT` later at the latest.

The agent itself ends them after 5 s at most; SGLang waits 10 s for its storage threads when it
flushes its cache or detaches the storage, and does not survive a call that is still running then.
"""

LOOKUP_GRACE = 0.5
"""Seconds that a lookup's reply may come after its budget."""

REFUSAL_SECONDS = 60.0
"""Seconds between two log lines about one refusal."""

T = TypeVar("T")

_LOAD_RESULTS = tuple(LoadResult)
_SPILL_RESULTS = tuple(SpillResult)


class AgentClient:
    """Thread-safe; calls block, each on a connection of its own.

    While there is no agent, or none that answers, every call returns at once that there is
    nothing: lookups find 0 pages, loads fail, spills are refused. A new agent is found, or
    started, behind, and is told of this client's pools and namespaces.

    A client belongs to the process that made it. In a forked child it has no agent and never gets
    one (`problem` says so), and it cannot be pickled: each process makes its own.
    """

    def __init__(
        self, config: Config, *, start: bool, limit: float = CALL_LIMIT, module: str = MODULE
    ) -> None:
        """Begin to connect, which `wait` waits for; `start`: start an agent if none answers.

        `limit` is in seconds, see `CALL_LIMIT`; `module` is what a started agent runs. Raises
        `ConfigError`.
        """
        self._limit = limit
        self._budget = config.engine.lookup_budget
        self._keeper = LinkKeeper(config, start=start, module=module)
        self._refusal = ""
        self._refusals = LogLimit(REFUSAL_SECONDS)

    @property
    def problem(self) -> str:
        """Why there is no agent, in one line; empty while there is one."""
        return self._keeper.problem

    def wait(self, seconds: float) -> bool:
        """Wait for an agent; False if there is none in time."""
        return self._keeper.wait(seconds)

    def register_pool(self, descriptor: int, length: int) -> int:
        """Let the agent map `length` bytes of a memory file, return the pool's number for `Buffer`.

        The number stays the same over restarts of the agent. Keeps a duplicate of the descriptor.
        Raises `RequestError` if the memory cannot be a pool: see `pools.check_descriptor`.
        """
        registry = self._keeper.registry
        with registry.lock:
            number = registry.add_pool(descriptor, length)
            self._use(lambda connection: registry.announce_pool(connection, number))
        return number

    def release_pool(self, number: int) -> None:
        """Forget a pool; its mapping ends with the last call that uses it. Raises `KeyError`."""
        registry = self._keeper.registry
        with registry.lock:
            registry.remove_pool(number)
        self._call(protocol.ReleasePool(number), self._limit)

    def describe(self, namespace: Namespace) -> bytes:
        """Let every tier keep the namespace's description; returns its digest."""
        registry = self._keeper.registry
        with registry.lock:
            if registry.add_namespace(namespace):
                self._use(lambda connection: announce_namespace(connection, namespace))
        return namespace.digest

    def lookup(
        self, chain: Chain, budget: float | None = None, recompute: Recompute = UNKNOWN
    ) -> Lookup:
        """Return how many pages from the chain's start can be loaded; see `Engine.lookup`.

        Asks for `MAX_HASHES` pages at most; if all of these are there, what follows is not known.
        """
        seconds = (self._budget if budget is None else budget) + LOOKUP_GRACE
        asked = chain.hashes[: protocol.MAX_HASHES]
        hashes = b"".join(asked)
        request = protocol.LookupPages(chain.namespace, hashes, budget, recompute)
        reply = self._call(request, seconds)
        if isinstance(reply, protocol.FoundPages) and 0 <= reply.length <= len(asked):
            known = reply.length < len(asked) or len(asked) == len(chain.hashes)
            return Lookup(reply.length, reply.complete and known)
        return Lookup(0, complete=False)

    def present(self, chain: Chain, budget: float | None = None, tier: str = "") -> list[bool]:
        """Tell for each page whether it is there; see `Engine.present`.

        Asks for `MAX_HASHES` pages at most; those behind them are answered False.
        """
        seconds = (self._budget if budget is None else budget) + LOOKUP_GRACE
        hashes = chain.hashes[: protocol.MAX_HASHES]
        request = protocol.CheckPages(chain.namespace, b"".join(hashes), budget, tier)
        reply = self._call(request, seconds)
        there = []
        if isinstance(reply, protocol.CheckedPages) and len(reply.present) == len(hashes):
            there = [bool(one) for one in reply.present]
        return there + [False] * (len(chain.hashes) - len(there))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an AgentClient cannot be pickled or copied: it owns connections; make one in each "
            "process"
        )

    def load(self, chain: Chain, buffers: Sequence[Sequence[Buffer]]) -> list[PageLoad]:
        """Fill the buffers of each page of the chain, which until the return belong to the agent.

        Returns one result a page; see `Engine.load`. Afterwards the buffers are the caller's again,
        unless the agent was killed and its disk hangs: then every page has failed, `withholding` is
        true, and the agent may still write to the buffers of failed pages. Do not read, reuse or
        free them before `when_free` calls back. Unmapping them is safe.
        """
        hashes = b"".join(chain.hashes)
        reply = self._call_with_buffers(protocol.LoadPages(chain.namespace, hashes, buffers))
        if isinstance(reply, protocol.LoadedPages):
            with suppress(LookupError):
                loads = [
                    PageLoad(_LOAD_RESULTS[result], _origin(reply.tiers, origin))
                    for result, origin in zip(reply.results, reply.origins, strict=False)
                ]
                if len(loads) == len(buffers):
                    return loads
        return [PageLoad(LoadResult.FAILED)] * len(buffers)

    def spill(
        self, chain: Chain, buffers: Sequence[Sequence[Buffer]], before: Sequence[bytes] = ()
    ) -> list[SpillResult]:
        """Store the pages of the chain; their buffers must not change before the return.

        A killed agent whose disk hangs may still read them later. Whatever it writes then fails its
        checksum, so they need not be withheld.

        `before` are the hashes of the pages before the first, from the start of its sequence on;
        the last `MAX_HASHES` of them are sent. One result a page; see `Engine.spill`.
        """
        hashes, before = b"".join(chain.hashes), before[-protocol.MAX_HASHES :]
        request = protocol.SpillPages(chain.namespace, hashes, buffers, b"".join(before))
        reply = self._call_with_buffers(request)
        if isinstance(reply, protocol.SpilledPages) and len(reply.results) == len(buffers):
            with suppress(LookupError):
                return [_SPILL_RESULTS[result] for result in reply.results]
        return [SpillResult.REFUSED] * len(buffers)

    @property
    def withholding(self) -> bool:
        """Whether an ended agent may still write to buffers of loads that have failed.

        Counts all clients that this process has had, also those that are closed.
        """
        return withheld.pending

    def when_free(self, callback: Callable[[], None]) -> None:
        """Call back once nothing is withheld: at once, or later in another thread.

        The callback must not block. It runs before `withholding` turns false.
        """
        withheld.when_free(callback)

    def warm(self, chain: Chain, seconds: float) -> Warming | None:
        """Have pages copied from the shared tier to this node's disk; see `Engine.warm`.

        None if it was refused or lasted longer than `seconds`; `refusal` tells why. Name some
        hundred pages a call, so that it ends within that.
        """
        reply = self._call(protocol.WarmPages(chain.namespace, b"".join(chain.hashes)), seconds)
        if not isinstance(reply, protocol.WarmedPages):
            return None
        return Warming(*msgspec.structs.astuple(reply))

    @property
    def refusal(self) -> str:
        """What the agent said when it last refused a request; empty if it never did."""
        return self._refusal

    def clear(self, namespace: bytes) -> int:
        """Remove a namespace's pages, return how many copies; 0 if it lasts too long to tell."""
        reply = self._call(protocol.Clear(namespace), self._limit)
        return reply.pages if isinstance(reply, protocol.Cleared) else 0

    def empty(self, namespace: bytes, seconds: float) -> bool:
        """Remove a namespace's pages; whether within `seconds` every tier said that none is left.

        Gives up the connection to the agent if it lasts longer.
        """
        reply = self._call(protocol.Clear(namespace), seconds)
        return isinstance(reply, protocol.Cleared) and reply.complete

    def flush(self, timeout: float) -> bool:
        """Wait until no page waits for upload; False if it was not so within `timeout` seconds."""
        reply = self._call(protocol.Flush(timeout), timeout + self._limit)
        return isinstance(reply, protocol.Flushed) and reply.empty

    def status(self) -> protocol.StatusReport | None:
        """Return what the agent tells about itself; None without one."""
        reply = self._call(protocol.Status(), self._limit)
        return reply if isinstance(reply, protocol.StatusReport) else None

    def settings(self) -> RunningSettings | None:
        """Return the settings that the agent runs with; None without one."""
        nonce = make_nonce()
        reply = self._call(protocol.Settings(nonce), self._limit)
        if not isinstance(reply, protocol.SettingsReport):
            return None
        return RunningSettings(reply, nonce)

    def shutdown(self) -> bool:
        """Ask the agent to end as SIGTERM does; returns before it has, False if none heard it."""
        return isinstance(self._call(protocol.Shutdown(), self._limit), protocol.Done)

    def close(self) -> None:
        """Let go of the agent, which stays; idempotent. Calls in flight end as they would."""
        self._keeper.close()

    def _call(self, request: protocol.Request, seconds: float) -> protocol.Reply | None:
        deadline = time.monotonic() + seconds
        return self._use(lambda connection: connection.call(request, deadline))

    def _call_with_buffers(self, request: protocol.Request) -> protocol.Reply | None:
        deadline = time.monotonic() + self._limit
        return self._use(lambda connection: connection.call_with_buffers(request, deadline))

    def _use(self, call: Callable[[Connection], T]) -> T | None:
        """Call with a connection; None if there was no agent, or it did not answer or refused."""
        link = self._keeper.link
        if link is None:
            return None
        try:
            with link.connection() as connection:
                result = call(connection)
        except ConnectionLostError as error:
            self._keeper.drop(link, f"the agent did not answer: {error}")
        except AgentRefusedError as error:
            self._log_refusal(str(error))
        except Exception:
            log.exception("request could not be sent")
        else:
            if not isinstance(result, protocol.Refused):
                return result
            self._log_refusal(result.reason)
        return None

    def _log_refusal(self, reason: str) -> None:
        """Log a reason now and then, not for each call that meets it."""
        reason = printable(reason)
        self._refusal = reason
        if self._refusals.admit(reason) is not None:
            log.warning("memkv: the agent refused a request: %s", reason)


def _origin(tiers: Sequence[str], origin: int) -> str:
    return "" if origin == protocol.NO_TIER else tiers[origin]

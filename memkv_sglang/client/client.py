"""`AgentClient`: spill, look up and load pages through the node agent."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NoReturn, Self, TypeVar

import msgspec

from memkv_sglang.agent import protocol
from memkv_sglang.agent.launch import MODULE
from memkv_sglang.agent.settings import RunningSettings, make_nonce
from memkv_sglang.client.connection import AgentConnection, AgentRefusedError, ConnectionLostError
from memkv_sglang.client.reconnector import Reconnector
from memkv_sglang.client.registry import announce_namespace
from memkv_sglang.client.withheld import withheld
from memkv_sglang.config.schema import Config
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.engine.results import PageLoad, Warming
from memkv_sglang.engine.served import UNKNOWN_REQUEST, ServedRequest
from memkv_sglang.log_limit import LogLimit
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.printable import printable
from memkv_sglang.tiers.base import LoadResult, Lookup, SpillResult

log = logging.getLogger(__name__)

CALL_LIMIT = 7.0
"""Seconds after which a load or spill kills the agent. The call returns at most `END_LIMIT` later.

The agent's own deadline is 5 s. When SGLang flushes its cache or detaches the storage, it waits
10 s for its storage threads and fails if a call is still running then.
"""

LOOKUP_GRACE = 0.5
"""Seconds by which a lookup's reply may exceed the lookup's budget."""

REFUSAL_SECONDS = 60.0
"""Seconds until the same refusal is logged again."""

T = TypeVar("T")

_LOAD_RESULTS = tuple(LoadResult)
_SPILL_RESULTS = tuple(SpillResult)


class AgentClient:
    """A connection to the node agent, which moves pages between shared memory and the tiers.

    Example::

        with AgentClient(load_config(), start=True) as client:
            client.wait(30)
            pool = client.register_pool(memfd, length)
            client.describe(namespace)
            client.spill(Chain(namespace.digest, hashes), [[Buffer(pool, 0, page_bytes)], ...])

    Thread-safe. Calls block, and concurrent calls use separate connections. Leaving the `with`
    block closes the client; the agent keeps running.

    Calls never raise because of an agent or a tier. Without an agent they return at once: lookups
    find 0 pages, loads fail, spills are refused, and `problem` gives the reason. Meanwhile a
    background thread connects to a new agent, or starts one, and registers the client's pools and
    namespaces with it.

    A client works only in the process that created it. It cannot be pickled, and in a forked child
    it never has an agent.
    """

    def __init__(
        self, config: Config, *, start: bool, limit: float = CALL_LIMIT, module: str = MODULE
    ) -> None:
        """Connect in the background; call `wait` to block until there is an agent.

        Args:
            config: settings; `agent.socket` says where the agent is.
            start: start an agent if none is running, and replace one with other settings if no
                other client uses it. A started agent outlives this process.
            limit: seconds after which a load or spill gives up and kills the agent.
            module: Python module that a started agent runs.

        Raises:
            ConfigError: if the socket path is unusable.

        """
        self._limit = limit
        self._budget = config.engine.lookup_budget
        self._reconnector = Reconnector(config, start=start, module=module)
        self._refusal = ""
        self._refusals = LogLimit(REFUSAL_SECONDS)

    @property
    def problem(self) -> str:
        """Why there is no agent, in one line; empty while connected."""
        return self._reconnector.problem

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for an agent; return whether there is one."""
        return self._reconnector.wait(seconds)

    def register_pool(self, descriptor: int, length: int) -> int:
        """Share memory with the agent; return the pool number to use in `Buffer`.

        Args:
            descriptor: a memfd created with `MFD_ALLOW_SEALING`, without `MFD_HUGETLB`. The client
                seals it against shrinking and keeps a duplicate, so the caller may close it.
            length: bytes to share, from the start of the file.

        The number stays valid when the agent restarts.

        Raises:
            RequestError: if the memory cannot be shared.

        """
        registry = self._reconnector.registry
        with registry.lock:
            number = registry.add_pool(descriptor, length)
            self._use(lambda connection: registry.announce_pool(connection, number))
        return number

    def release_pool(self, number: int) -> None:
        """Stop sharing a pool. The agent unmaps it when the last call that uses it has ended.

        Raises `KeyError` for an unknown number.
        """
        registry = self._reconnector.registry
        with registry.lock:
            registry.remove_pool(number)
        self._call(protocol.ReleasePool(number), self._limit)

    def describe(self, namespace: Namespace) -> bytes:
        """Store the namespace's description in every tier; return its digest.

        Call it before the first spill, so that other tools can tell whose pages these are.
        """
        registry = self._reconnector.registry
        with registry.lock:
            if registry.add_namespace(namespace):
                self._use(lambda connection: announce_namespace(connection, namespace))
        return namespace.digest

    def lookup(
        self,
        chain: Chain,
        budget: float | None = None,
        recompute: Recompute = UNKNOWN,
        request: str = "",
    ) -> Lookup:
        """Return how many pages can be loaded, counted from the chain's start.

        Args:
            chain: namespace digest and page hashes in order.
            budget: seconds; the default is `engine.lookup_budget`.
            recompute: what recomputing a page costs. If known, the result is cut to the pages that
                load faster than the server can recompute them.
            request: id of the server's request, for the agent's log.

        `complete` is false if the budget ran out or a tier failed; `length` is then a lower bound.

        """
        found = Lookup(0, complete=True)
        for hashes, seconds in self._parts(chain, budget):
            call = protocol.LookupPages(
                chain.namespace, b"".join(hashes), seconds, recompute, _request_id(request)
            )
            reply = self._call(call, seconds + LOOKUP_GRACE)
            if not isinstance(reply, protocol.FoundPages) or not 0 <= reply.length <= len(hashes):
                return Lookup(found.length, complete=False)
            found = Lookup(found.length + reply.length, reply.complete)
            if reply.length < len(hashes) or not reply.complete:
                break
        return found

    def _parts(self, chain: Chain, budget: float | None) -> Iterator[tuple[Sequence[bytes], float]]:
        """Yield the chain in parts that fit in a message, each with the seconds left for it."""
        deadline = time.monotonic() + (self._budget if budget is None else budget)
        for begin in range(0, max(1, len(chain.hashes)), protocol.MAX_HASHES):
            left = max(0.0, deadline - time.monotonic())
            yield chain.hashes[begin : begin + protocol.MAX_HASHES], left

    def present(
        self, chain: Chain, budget: float | None = None, tier: str = "", request: str = ""
    ) -> list[bool]:
        """Return for each page of the chain whether a tier holds it, regardless of earlier pages.

        Args:
            chain: namespace digest and page hashes.
            budget: seconds; pages not checked in time count as absent.
            tier: check only this tier; empty checks all.
            request: as for `lookup`.

        """
        present: list[bool] = []
        for hashes, seconds in self._parts(chain, budget):
            call = protocol.CheckPages(
                chain.namespace, b"".join(hashes), seconds, tier, _request_id(request)
            )
            reply = self._call(call, seconds + LOOKUP_GRACE)
            if not isinstance(reply, protocol.CheckedPages) or len(reply.present) != len(hashes):
                break
            present += map(bool, reply.present)
        return present + [False] * (len(chain.hashes) - len(present))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an AgentClient cannot be pickled or copied, because it owns connections; create one "
            "in each process"
        )

    def load(
        self,
        chain: Chain,
        buffers: Sequence[Sequence[Buffer]],
        served: ServedRequest = UNKNOWN_REQUEST,
    ) -> list[PageLoad]:
        """Load pages into their buffers; return one result per page, in order.

        Args:
            chain: namespace digest and page hashes in order, at most 4,096.
            buffers: for each page, the buffers that together receive its bytes.
            served: the request that needs the pages, and what each saves it. The agent counts that
                in `memkv_saved_prefill_tokens_total` and `memkv_saved_prefill_seconds_total`.

        The first page that cannot be loaded ends the prefix; later pages are `SKIPPED`. Only the
        buffers of `LOADED` pages have defined content. Blocks for at most 8 s.

        The agent owns the buffers until the call returns, and the caller owns them again
        afterwards. There is one exception: if the agent was killed and its disk hangs, all pages
        are `FAILED`, `withholding` is true, and the dead agent's requests may still write to the
        buffers. Do not read, reuse or free them until `when_free` calls back. Unmapping is safe.

        """
        hashes = b"".join(chain.hashes)
        served = served._replace(id=_request_id(served.id))
        request = protocol.LoadPages(chain.namespace, hashes, buffers, served)
        reply = self._call_with_buffers(request)
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
        """Store pages from their buffers; return one result per page, in order.

        Args:
            chain: namespace digest and page hashes in order, at most 4,096.
            buffers: for each page, the buffers that together hold its bytes.
            before: hashes of the sequence's pages that precede the chain. They keep a parent page
                from being evicted before its children.

        Pages that are `STORED` or `PRESENT` can be loaded from now on, even after a restart.
        Uploads to the shared tier continue in the background; see `flush`. Blocks for at most 8 s.

        Do not change the buffers until the call returns. A killed agent whose disk hangs may read
        them later, but pages written that way fail their checksum.

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
        """Whether a dead agent may still write to buffers of failed loads; see `load`.

        Covers every client that this process has had, including closed ones.
        """
        return withheld.pending

    def when_free(self, callback: Callable[[], None]) -> None:
        """Call `callback` as soon as no buffers are withheld: now, or later from another thread.

        The callback must not block. `withholding` turns false after it returns.
        """
        withheld.when_free(callback)

    def warm(self, chain: Chain, seconds: float) -> Warming | None:
        """Copy pages from the shared tier to this node's disk; return how many.

        Returns None if the agent refused (`refusal` gives the reason) or did not finish within
        `seconds`. Pass a few hundred pages per call to stay within that time.
        """
        reply = self._call(protocol.WarmPages(chain.namespace, b"".join(chain.hashes)), seconds)
        if not isinstance(reply, protocol.WarmedPages):
            return None
        return Warming(*msgspec.structs.astuple(reply))

    @property
    def refusal(self) -> str:
        """The agent's reason when it last refused a request; empty if it never did."""
        return self._refusal

    def clear(self, namespace: bytes) -> int:
        """Delete a namespace's pages from all tiers; return the number of deleted copies.

        Returns 0 if the deletion takes longer than the client's limit.
        """
        reply = self._call(protocol.Clear(namespace), self._limit)
        return reply.pages if isinstance(reply, protocol.Cleared) else 0

    def empty(self, namespace: bytes, seconds: float) -> bool:
        """Delete a namespace's pages; return whether every tier confirmed it within `seconds`.

        Drops the connection to the agent if it takes longer.
        """
        reply = self._call(protocol.Clear(namespace), seconds)
        return isinstance(reply, protocol.Cleared) and reply.complete

    def hide(self, namespace: bytes, seconds: float) -> bool:
        """Treat a namespace's pages as missing on this node until they are stored again.

        Other nodes and the shared tier keep theirs. Returns whether every tier confirmed it within
        `seconds`. Drops the connection to the agent if it takes longer.
        """
        reply = self._call(protocol.Hide(namespace), seconds)
        return isinstance(reply, protocol.Cleared) and reply.complete

    def flush(self, timeout: float) -> bool:
        """Wait until all uploads have finished; False after `timeout` seconds."""
        reply = self._call(protocol.Flush(timeout), timeout + self._limit)
        return isinstance(reply, protocol.Flushed) and reply.empty

    def status(self) -> protocol.StatusReport | None:
        """Return the state of the agent and its tiers; None without an agent."""
        reply = self._call(protocol.Status(), self._limit)
        return reply if isinstance(reply, protocol.StatusReport) else None

    def metrics(self) -> str | None:
        """Return the agent's metrics in Prometheus' text format; None without an agent."""
        reply = self._call(protocol.Metrics(), self._limit)
        return reply.text if isinstance(reply, protocol.MetricsReport) else None

    def settings(self) -> RunningSettings | None:
        """Return the settings that the agent runs with; None without an agent."""
        nonce = make_nonce()
        reply = self._call(protocol.Settings(nonce), self._limit)
        if not isinstance(reply, protocol.SettingsReport):
            return None
        return RunningSettings(reply, nonce)

    def shutdown(self) -> bool:
        """Ask the agent to stop, as SIGTERM does; return whether it received the request.

        Does not wait for the agent to stop.
        """
        return isinstance(self._call(protocol.Shutdown(), self._limit), protocol.Done)

    def close(self) -> None:
        """Disconnect from the agent, which keeps running. Idempotent.

        Calls in flight complete normally; later calls behave as without an agent.
        """
        self._reconnector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, request: protocol.Request, seconds: float) -> protocol.Reply | None:
        deadline = time.monotonic() + seconds
        return self._use(lambda connection: connection.call(request, deadline))

    def _call_with_buffers(self, request: protocol.Request) -> protocol.Reply | None:
        deadline = time.monotonic() + self._limit
        return self._use(lambda connection: connection.call_with_buffers(request, deadline))

    def _use(self, call: Callable[[AgentConnection], T]) -> T | None:
        """Make a call on a connection; None without an agent, without a reply, or if refused."""
        link = self._reconnector.link
        if link is None:
            return None
        try:
            with link.connection() as connection:
                result = call(connection)
        except ConnectionLostError as error:
            self._reconnector.drop(link, f"the agent did not answer: {error}")
        except AgentRefusedError as error:
            self._log_refusal(str(error))
        except Exception:
            log.exception("memkv: request not sent")
        else:
            if not isinstance(result, protocol.Refused):
                return result
            self._log_refusal(result.reason)
        return None

    def _log_refusal(self, reason: str) -> None:
        """Log a refusal, but the same reason only once per `REFUSAL_SECONDS`."""
        reason = printable(reason)
        self._refusal = reason
        if self._refusals.admit(reason) is not None:
            log.warning("memkv: the agent refused a request: %s", reason)


def _request_id(text: str) -> str:
    """Return an id that the protocol accepts. A server's clients may have chosen any text."""
    return printable(text)[: protocol.MAX_REQUEST_ID]


def _origin(tiers: Sequence[str], origin: int) -> str:
    return "" if origin == protocol.NO_TIER else tiers[origin]

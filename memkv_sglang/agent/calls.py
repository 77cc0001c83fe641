"""Handle each kind of request."""

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from memkv_sglang.agent import protocol
from memkv_sglang.agent.pools import RequestError, split_hashes
from memkv_sglang.agent.request_log import RequestLog
from memkv_sglang.agent.sessions import Session, Sessions
from memkv_sglang.agent.settings import report_settings
from memkv_sglang.config.schema import Config
from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.recompute import Recompute
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.engine.served import ServedRequest
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page
from memkv_sglang.tiers.base import LoadResult, TierError

if TYPE_CHECKING:
    from memkv_sglang.agent.recorder import Recorder

log = logging.getLogger(__name__)

EXIT_BROKEN_ENGINE = 70
"""Exit status (EX_SOFTWARE) after a load or spill has raised an exception."""

OBSERVING = frozenset(
    {
        protocol.Status,
        protocol.Settings,
        protocol.Metrics,
        protocol.Retire,
        protocol.Shutdown,
    }
)
"""Requests that do not count as using the agent."""

Handler = Callable[[Session, Any, list[int]], protocol.Reply]


class Calls:
    """Executes requests on the engine, in the calling thread."""

    def __init__(
        self,
        engine: Engine,
        config: Config,
        sessions: Sessions,
        status: Callable[[], protocol.AgentStatus],
        metrics: Callable[[], bytes],
        stop: Callable[[], None],
        *,
        launched: bool,
        recorder: "Recorder | None" = None,
    ) -> None:
        """Handle requests for `engine`.

        `stop` asks the agent to stop and returns at once. `launched` says whether a server started
        the agent.
        """
        self._recorder = recorder
        self._requests = RequestLog(config.agent.log_requests)
        self._engine = engine
        self._config = config
        self._sessions = sessions
        self._launched = launched
        self._status = status
        self._metrics = metrics
        self._stop = stop
        self._handlers: dict[type[protocol.Request], Handler] = {
            protocol.RegisterPool: self._register_pool,
            protocol.ReleasePool: self._release_pool,
            protocol.Describe: self._describe,
            protocol.LookupPages: self._lookup,
            protocol.CheckPages: self._check,
            protocol.LoadPages: self._load,
            protocol.SpillPages: self._spill,
            protocol.WarmPages: self._warm,
            protocol.Clear: self._clear,
            protocol.Hide: self._hide,
            protocol.Flush: self._flush,
            protocol.Status: self._report,
            protocol.Shutdown: self._shutdown,
            protocol.Settings: self._settings,
            protocol.Join: self._join,
            protocol.Retire: self._retire,
            protocol.Metrics: self._report_metrics,
        }

    def answer(
        self, session: Session, request: protocol.Request, descriptors: list[int]
    ) -> protocol.Reply:
        """Execute a request; return the reply when no thread uses its buffers any more.

        Never raises. The caller keeps ownership of the descriptors.
        """
        try:
            handler = self._handlers.get(type(request))
            if handler is None:
                raise RequestError("this connection already has a session")  # noqa: TRY301
            if not session.joined and type(request) not in OBSERVING:
                self._sessions.join(session)
            return handler(session, request, descriptors)
        except RequestError as error:
            fields = {"request": type(request).__name__, "reason": str(error)}
            log.warning("request refused", extra={"fields": fields})
            return protocol.Refused(str(error))
        except Exception as error:
            fields = {"request": type(request).__name__}
            log.exception("request failed", extra={"fields": fields})
            if isinstance(request, protocol.LoadPages | protocol.SpillPages):
                # Engine threads may still use the buffers, and a reply would return them to the
                # client. Ending the process is the only other way to release them.
                os._exit(EXIT_BROKEN_ENGINE)
            return protocol.Refused(f"the agent failed: {error}")

    def _register_pool(
        self, session: Session, request: protocol.RegisterPool, descriptors: list[int]
    ) -> protocol.Reply:
        if len(descriptors) != 1:
            raise RequestError(f"a pool needs one descriptor, got {len(descriptors)}")
        session.pools.register(request.pool, request.length, descriptors[0])
        fields = {"pool": request.pool, "bytes": request.length}
        log.info("pool registered", extra={"fields": fields})
        return protocol.Done()

    def _release_pool(
        self, session: Session, request: protocol.ReleasePool, _: list[int]
    ) -> protocol.Reply:
        session.pools.release(request.pool)
        return protocol.Done()

    def _describe(
        self, session: Session, request: protocol.Describe, _: list[int]
    ) -> protocol.Reply:
        try:
            namespace = Namespace.parse(request.description)
        except msgspec.MsgspecError as error:
            raise RequestError(f"invalid namespace description: {error}") from None
        session.count_description()
        self._engine.describe(namespace)
        return protocol.Described(namespace.digest)

    def _lookup(
        self, session: Session, request: protocol.LookupPages, _: list[int]
    ) -> protocol.Reply:
        chain = Chain(request.namespace, split_hashes(request.namespace, request.hashes))
        recompute, pages = Recompute(*request.recompute), len(chain.hashes)
        with self._requests.call("lookup", request.request, session.pools.pid, pages) as call:
            found = self._engine.lookup(chain, request.budget, recompute)
            call.done, call.complete = found
        if self._recorder is not None:
            self._recorder.record(chain, found.length)
        return protocol.FoundPages(*found)

    def _check(
        self, session: Session, request: protocol.CheckPages, _: list[int]
    ) -> protocol.Reply:
        keys = Chain(request.namespace, split_hashes(request.namespace, request.hashes)).keys()
        with self._requests.call("check", request.request, session.pools.pid, len(keys)) as call:
            present = self._engine.present(keys, request.budget, request.tier)
            call.done = sum(present)
        return protocol.CheckedPages(bytes(present))

    def _load(self, session: Session, request: protocol.LoadPages, _: list[int]) -> protocol.Reply:
        served, pages = ServedRequest(*request.served), _pages(session, request)
        with self._requests.call("load", served.id, session.pools.pid, len(pages)) as call:
            loads = self._engine.load(pages, served)
            call.done = sum(load.result is LoadResult.LOADED for load in loads)
        return _loaded(loads)

    def _spill(
        self, session: Session, request: protocol.SpillPages, _: list[int]
    ) -> protocol.Reply:
        pages = _pages(session, request)
        before = split_hashes(request.namespace, request.before)
        return protocol.SpilledPages(bytes(self._engine.spill(pages, before)))

    def _warm(self, _session: Session, request: protocol.WarmPages, _: list[int]) -> protocol.Reply:
        chain = Chain(request.namespace, split_hashes(request.namespace, request.hashes))
        try:
            return protocol.WarmedPages(*self._engine.warm(chain.keys()))
        except TierError as error:
            raise RequestError(str(error)) from None

    def _hide(self, _session: Session, request: protocol.Hide, _: list[int]) -> protocol.Reply:
        return protocol.Cleared(*self._engine.hide(request.namespace))

    def _clear(self, _session: Session, request: protocol.Clear, _: list[int]) -> protocol.Reply:
        split_hashes(request.namespace, b"")
        return protocol.Cleared(*self._engine.clear(request.namespace))

    def _flush(self, _session: Session, request: protocol.Flush, _: list[int]) -> protocol.Reply:
        return protocol.Flushed(self._engine.flush(request.timeout))

    def _report(self, _session: Session, _request: object, _: list[int]) -> protocol.Reply:
        return protocol.StatusReport(self._status(), self._engine.status())

    def _report_metrics(self, _session: Session, _request: object, _: list[int]) -> protocol.Reply:
        return protocol.MetricsReport(self._metrics().decode())

    def _shutdown(self, _session: Session, _request: object, _: list[int]) -> protocol.Reply:
        self._stop()
        return protocol.Done()

    def _settings(
        self, _session: Session, request: protocol.Settings, _: list[int]
    ) -> protocol.Reply:
        return report_settings(self._config, os.environ, request.nonce)

    def _join(self, _session: Session, _request: object, _: list[int]) -> protocol.Reply:
        return protocol.Done()  # `answer` has already joined the session

    def _retire(self, _session: Session, _request: object, _: list[int]) -> protocol.Reply:
        if not self._launched:
            return protocol.Refused("it was started by hand or as a service")
        try:
            self._sessions.retire()
        except RequestError as error:  # clients retry often, so this is not logged
            return protocol.Refused(str(error))
        log.info("agent stops, so that an agent with other settings can replace it")
        self._stop()
        return protocol.Done()


def _pages(session: Session, request: protocol.LoadPages | protocol.SpillPages) -> list[Page]:
    pages = session.pools.pages(request.namespace, request.hashes, request.buffers)
    session.pools.check_disjoint(request.buffers)
    return pages


def _loaded(loads: list[PageLoad]) -> protocol.LoadedPages:
    names = sorted({load.tier for load in loads if load.tier})
    index = {name: i for i, name in enumerate(names)} | {"": protocol.NO_TIER}
    return protocol.LoadedPages(
        bytes(load.result for load in loads), bytes(index[load.tier] for load in loads), names
    )

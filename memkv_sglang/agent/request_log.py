"""Log lookups and loads with the server's request id, for `memkv explain`."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memkv_sglang.engine.trace import Trace, traced

SLOW = 0.1
"""A request is slow once its calls have taken this many seconds in total."""

MAX_REQUESTS = 4096
"""Maximum requests whose unlogged calls are remembered."""

log = logging.getLogger(__name__)


class LoggedCall:
    """A call in progress. The caller sets its result."""

    def __init__(self, pages: int) -> None:
        """Start with no page done."""
        self.pages = pages
        self.done = 0
        """Pages found or loaded."""
        self.complete = True
        """False if the call ran out of time or a tier failed."""


class RequestLog:
    """Logs one line per call of a request. Thread-safe.

    By default, it logs only calls of slow requests, which have spent `SLOW` seconds in calls. The
    first such line includes the totals of the request's earlier calls.
    """

    def __init__(self, which: str) -> None:
        """Log the calls of requests: of `all`, only of `slow` ones, or of `none`."""
        self._threshold = {"all": 0.0, "slow": SLOW}.get(which)
        self._lock = threading.Lock()
        # Number and seconds of the calls that were not logged, by request and client.
        self._before: OrderedDict[tuple[str, int], tuple[int, float]] = OrderedDict()

    @contextmanager
    def call(self, operation: str, request: str, client: int, pages: int) -> Iterator[LoggedCall]:
        """Time a call of the process `client` for a request, and log it at the end.

        Nothing is logged if the call raises; the agent logs the error.
        """
        call, began = LoggedCall(pages), time.perf_counter()
        with traced() as trace:
            yield call
        if self._threshold is None:
            return
        seconds = time.perf_counter() - began
        before = self._calls_before(request, client, seconds)
        if before is not None:
            fields = {
                "operation": operation,
                "request": request,
                "client": client,
                "pages": pages,
                "done": call.done,
                "seconds": seconds,
                "complete": call.complete,
                **_describe(trace),
            }
            if before[0]:
                fields |= {"calls_before": before[0], "seconds_before": before[1]}
            log.info("request", extra={"fields": fields})

    def _calls_before(self, request: str, client: int, seconds: float) -> tuple[int, float] | None:
        """Return number and seconds of the earlier calls; None if this call is not to be logged."""
        key = request, client
        with self._lock:
            calls, spent = self._before.pop(key, (0, 0.0)) if request else (0, 0.0)
            if spent + seconds >= (self._threshold or 0.0):
                if request and self._threshold:
                    # from now on, log every call of this request
                    self._remember(key, (0, self._threshold))
                return calls, spent if calls else 0.0
            if request:
                self._remember(key, (calls + 1, spent + seconds))
        return None

    def _remember(self, key: tuple[str, int], before: tuple[int, float]) -> None:
        self._before[key] = before
        if len(self._before) > MAX_REQUESTS:
            self._before.popitem(last=False)


def _describe(trace: Trace) -> dict[str, Any]:
    """Return the log fields for a call's steps. Steps of the same name are added up."""
    fields: dict[str, Any] = {}
    problems = []
    for step in trace.steps:
        for what, value in (("pages", step.pages), ("done", step.done), ("seconds", step.seconds)):
            name = f"{step.name}_{what}"
            fields[name] = fields.get(name, 0) + value
        if step.problem and step.problem not in problems:
            problems.append(step.problem)
    if trace.skipped:
        fields["skipped"] = trace.skipped
    if problems:
        fields["problem"] = ", ".join(problems)
    return fields

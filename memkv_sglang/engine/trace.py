"""Record what a lookup or load waits for, so that slow requests can be explained."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

EQUAL_LOADS = "equal_loads"
"""Name of the step in which a load waits for another call that loads the same pages."""


class Step(NamedTuple):
    """A part of a call: a call to one tier, or a wait."""

    name: str
    """Name of the tier, or `EQUAL_LOADS`."""
    pages: int
    done: int
    """Pages found or loaded."""
    seconds: float
    problem: str = ""


class Trace:
    """The steps of one call. Threads that work for the call may add steps at the same time."""

    def __init__(self) -> None:
        """Start without steps."""
        self.steps: list[Step] = []
        self.skipped = 0
        """Number of pages found but left out, because recomputing them is faster."""


_trace: ContextVar[Trace | None] = ContextVar("memkv_trace", default=None)


@contextmanager
def traced() -> Iterator[Trace]:
    """Collect the steps of this thread's calls during the context.

    A call passes its context to the threads that work for it (`contextvars.copy_context`).
    """
    trace = Trace()
    token = _trace.set(trace)
    try:
        yield trace
    finally:
        _trace.reset(token)


def record_step(name: str, pages: int, done: int, began: float, problem: str = "") -> None:
    """Add a step that began at `began` (`time.perf_counter`) and ends now."""
    trace = _trace.get()
    if trace is not None:
        trace.steps.append(Step(name, pages, done, time.perf_counter() - began, problem))


def record_skipped(pages: int) -> None:
    """Record that pages were found but left out."""
    trace = _trace.get()
    if trace is not None:
        trace.skipped += pages

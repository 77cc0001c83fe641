"""Read from logs how long each request waited for lookups and loads, and for which steps."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, Any

READ_LIMIT = 256 << 20
"""Maximum bytes to read, from the end of a file or from the beginning of a pipe."""

LINE_LIMIT = 64 << 10
"""Longer lines are skipped."""

MAX_REQUESTS = 50_000
"""Maximum requests held in memory. If there are more, the faster half is dropped."""

MAX_PROBLEMS = 5

_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')
_STEP_SUFFIX = "_seconds"
_OPERATIONS = ("lookup", "check", "load")
_SERVER = "server_"


@dataclass
class Times:
    """The sum of all calls of one kind."""

    calls: int = 0
    pages: int = 0
    done: int = 0
    """Pages found or loaded."""
    seconds: float = 0.0

    def add(self, pages: int, done: int, seconds: float) -> None:
        """Add the figures of a call."""
        self.calls += 1
        self.pages += pages
        self.done += done
        self.seconds += seconds


@dataclass
class RequestTimes:
    """How long one process of a server waited for one request, and for what."""

    request: str
    client: int
    """Process id. A server with several ranks has one per rank."""
    began: float
    """Unix time of the request's first line."""
    operations: dict[str, Times] = field(default_factory=dict)
    steps: dict[str, dict[str, Times]] = field(default_factory=dict)
    """Times by operation and step. Steps may overlap, because tiers load in parallel."""
    server: dict[str, float] = field(default_factory=dict)
    """Seconds by operation, as measured by the server. Empty unless its log was read."""
    calls_before: int = 0
    """Number of calls that were not logged, because the request was not slow yet."""
    seconds_before: float = 0.0
    skipped: int = 0
    incomplete: int = 0
    """Number of calls that ran out of time or met a failing tier."""
    problems: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of the agent's calls."""
        return self.seconds_before + sum(times.seconds for times in self.operations.values())

    def add(self, line: dict[str, Any]) -> None:
        """Add one line of the log. Raises `ValueError` if it is not valid."""
        operation = str(line["operation"])
        if operation.startswith(_SERVER):
            name = operation.removeprefix(_SERVER)
            self.server[name] = self.server.get(name, 0.0) + float(line["seconds"])
            return
        if operation not in _OPERATIONS:
            raise ValueError(f"unknown operation {operation}")
        times = self.operations.setdefault(operation, Times())
        times.add(int(line["pages"]), int(line["done"]), float(line["seconds"]))
        for name in line:
            if name.endswith(_STEP_SUFFIX):
                self._add_step(operation, name.removesuffix(_STEP_SUFFIX), line)
        self.calls_before += int(line.get("calls_before", 0))
        self.seconds_before += float(line.get("seconds_before", 0))
        self.skipped += int(line.get("skipped", 0))
        self.incomplete += str(line.get("complete")).lower() == "false"
        problem = str(line.get("problem", ""))
        if problem and problem not in self.problems and len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def _add_step(self, operation: str, step: str, line: dict[str, Any]) -> None:
        if f"{step}_pages" in line:
            times = self.steps.setdefault(operation, {}).setdefault(step, Times())
            seconds = float(line[step + _STEP_SUFFIX])
            times.add(int(line[f"{step}_pages"]), int(line[f"{step}_done"]), seconds)


def log_lines(log: IO[bytes]) -> Iterator[bytes]:
    """Yield those lines of a log that may be about requests, up to `READ_LIMIT` bytes."""
    if log.seekable():
        size = log.seek(0, 2)
        log.seek(max(0, size - READ_LIMIT))
        if size > READ_LIMIT:
            log.readline(LINE_LIMIT)  # skip the rest of the line
    left = READ_LIMIT
    while left > 0 and (line := log.readline(LINE_LIMIT)):
        left -= len(line)
        if b"operation" in line and line.endswith(b"\n"):
            yield line


def read_requests(
    lines: Iterable[bytes], *, request: str = "", since: float = 0.0
) -> list[RequestTimes]:
    """Return the times of the requests in a log, slowest first.

    With `request`, returns only those of that id. Ignores lines before the Unix time `since` and
    lines about anything else.
    """
    wanted = request.encode()
    found: dict[tuple[str, int], RequestTimes] = {}
    for line in lines:
        if wanted not in line:
            continue
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            values = _parse(line.decode(errors="backslashreplace"))
            moment = datetime.fromisoformat(str(values["time"])).timestamp()
            key = str(values["request"]), int(values["client"])
            if moment < since or not key[0] or (request and key[0] != request):
                continue
            found.setdefault(key, RequestTimes(*key, moment)).add(values)
            if len(found) > MAX_REQUESTS:
                kept = _slowest(found)[: MAX_REQUESTS // 2]
                found = {(one.request, one.client): one for one in kept}
    return _slowest(found)


def _slowest(found: dict[tuple[str, int], RequestTimes]) -> list[RequestTimes]:
    ranked = sorted(found.values(), key=lambda one: one.seconds, reverse=True)
    return [one for one in ranked if one.operations or one.server]


def _parse(line: str) -> dict[str, Any]:
    """Return the fields of a line, in either format. Ignores text before them."""
    start = line.find("{")
    if start >= 0 and line.rstrip().endswith("}"):
        values = json.loads(line[start:])
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return values
    return {
        name: json.loads(value) if value.startswith('"') else value
        for name, value in _FIELD.findall(line)
    }

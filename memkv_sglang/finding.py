"""The result of a check of `memkv doctor`, or of a probe of the S3 server."""

from typing import Literal, NamedTuple

Level = Literal["ok", "skip", "warn", "FAIL"]
"""`skip`: the check could not run, so it says nothing."""


class Finding(NamedTuple):
    """A result that a command prints."""

    level: Level
    what: str
    """What was checked, in a word or two."""
    detail: str
    """The result."""
    advice: str = ""
    """What to do about it; may be empty."""


def split_problem(what: str, problem: str, level: Level = "FAIL") -> Finding:
    """Return a finding from an error message of the form `problem; fix`."""
    detail, _, advice = problem.partition("; ")
    return Finding(level, what, detail, advice)

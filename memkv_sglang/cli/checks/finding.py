"""The result of a check."""

from typing import Literal, NamedTuple

Level = Literal["ok", "warn", "FAIL"]


class Finding(NamedTuple):
    """A result that `memkv doctor` prints."""

    level: Level
    what: str
    """What was checked, in a word or two."""
    detail: str
    """The result."""
    advice: str = ""
    """What to do about it; may be empty."""


def split_problem(what: str, problem: str) -> Finding:
    """Return a failure from an error message of the form `problem; fix`."""
    detail, _, advice = problem.partition("; ")
    return Finding("FAIL", what, detail, advice)

"""What a check finds."""

from typing import Literal, NamedTuple

Level = Literal["ok", "warn", "FAIL"]


class Finding(NamedTuple):
    """One line of `memkv doctor`."""

    level: Level
    what: str
    """What was looked at, in a word or two."""
    detail: str
    """What was seen."""
    advice: str = ""
    """What to do; empty where nothing needs doing."""


def split_problem(what: str, problem: str) -> Finding:
    """Return the failure that a `ConfigError`'s line tells: it is `complaint; way out`."""
    detail, _, advice = problem.partition("; ")
    return Finding("FAIL", what, detail, advice)

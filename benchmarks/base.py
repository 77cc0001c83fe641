"""The interface of a benchmark: a module with `run(options) -> Report`, listed in `__main__`."""

import shutil
from pathlib import Path
from typing import NamedTuple


class MissingToolError(Exception):
    """A required program is missing. The message says what to install."""


class Options(NamedTuple):
    """Options of a benchmark."""

    directory: Path
    """Directory on the disk to measure."""
    repetitions: int
    """Number of rounds. Every contestant runs once per round."""
    quick: bool = False
    """Whether to finish in less than a minute, with fewer sizes and rounds but the same keys in
    `figures`."""
    rounds: int | None = None
    """Number of faults to inject; None for the benchmark's own number."""


def tool(name: str) -> str:
    """Return the path of a program. Raises `MissingToolError`."""
    path = shutil.which(name)
    if path is None:
        raise MissingToolError(f"{name} is missing; install it: apt-get install {name}")
    return path

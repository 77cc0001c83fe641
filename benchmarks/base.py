"""What every benchmark is: a module with `run(options) -> Report`, named in `__main__`."""

import shutil
from pathlib import Path
from typing import NamedTuple


class MissingToolError(Exception):
    """A program that a benchmark cannot do without; the text names what to install."""


class Options(NamedTuple):
    """How a benchmark is to be run."""

    directory: Path
    """Where the disk to measure is mounted."""
    repetitions: int
    """Rounds in which every contestant has its turn."""
    quick: bool = False
    """Whether to finish in under a minute: fewer sizes and rounds, the same keys in `figures`."""
    rounds: int | None = None
    """Faults to inject, for the benchmark that does; None for its default."""


def tool(name: str) -> str:
    """Return the path of a program. Raises `MissingToolError`."""
    path = shutil.which(name)
    if path is None:
        raise MissingToolError(f"{name} is missing; install it: apt-get install {name}")
    return path

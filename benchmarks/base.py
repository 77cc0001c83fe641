"""Interface of a benchmark: a module with `run(options) -> Report`, listed in `__main__`."""

import shutil
from pathlib import Path
from typing import NamedTuple


class MissingToolError(Exception):
    """A required program is missing; the text says what to install."""


class Options(NamedTuple):
    """Options of a benchmark."""

    directory: Path
    """Directory on the disk to measure."""
    repetitions: int
    """Rounds in which every contestant runs once."""
    quick: bool = False
    """Whether to finish in under a minute: fewer sizes and rounds, the same keys in `figures`."""
    rounds: int | None = None
    """Number of faults to inject; None for the benchmark's default."""


def tool(name: str) -> str:
    """Return the path of a program. Raises `MissingToolError`."""
    path = shutil.which(name)
    if path is None:
        raise MissingToolError(f"{name} is missing; install it: apt-get install {name}")
    return path

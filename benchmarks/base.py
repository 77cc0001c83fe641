"""What every benchmark is: a module with `run(options) -> Report`, named in `__main__`."""

from pathlib import Path
from typing import NamedTuple


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

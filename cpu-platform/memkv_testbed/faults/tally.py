"""Count what clients saw during a fault."""

from dataclasses import dataclass, field


@dataclass
class Tally:
    """The counts of some clients."""

    calls: int = 0
    hits: int = 0
    misses: int = 0
    wrong: int = 0
    changed: int = 0
    """Pages that changed after the load that failed to fill them had returned."""
    hung: int = 0
    errors: list[str] = field(default_factory=list)
    lookups: list[float] = field(default_factory=list)
    """Seconds of each lookup."""
    moves: list[float] = field(default_factory=list)
    """Seconds of each load and spill."""

    def __iadd__(self, other: "Tally") -> "Tally":
        """Add the counts of another tally."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

"""What a repeated use is worth: the family of eviction orders to choose from.

A page's rank is the tick of its last use plus what its repeated uses are worth, in ticks; the
lowest rank leaves first. Whoever uses a page uses its chain's earlier pages as well, a tick later
each towards the root. So no page ranks below one that follows it in a chain, whatever a use is
worth: every member of the family takes leaves before roots.
"""

from typing import NamedTuple

MOST_USES = 255
"""Repeated uses of a page are counted up to here."""

ALWAYS = 1 << 48
"""Worth of a use that outweighs any difference in age."""


class ReusePolicy(NamedTuple):
    """How repeated uses count."""

    name: str
    lifetimes: float | None
    """Worth of one, in lifetimes: as many ticks as the tier holds pages. None for `ALWAYS`."""
    most: int
    """Uses beyond these count nothing."""

    def bonuses(self, pages: int) -> list[int]:
        """Return what is added to the tick of a page, by its repeated uses, 0 to `MOST_USES`."""
        worth = ALWAYS if self.lifetimes is None else round(self.lifetimes * pages)
        return [worth * min(uses, self.most) for uses in range(MOST_USES + 1)]


VALUATIONS = (
    ReusePolicy("recency", lifetimes=0, most=0),
    ReusePolicy("reuse_delays", lifetimes=1, most=1),
    ReusePolicy("reuse_first", lifetimes=None, most=1),
    ReusePolicy("frequency", lifetimes=None, most=MOST_USES),
)
"""Least recently used; a page used again lives a lifetime longer; pages used once leave first;
least frequently used. The first is followed until another one proves better."""

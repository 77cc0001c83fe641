"""The eviction policies to choose from. They differ in how much they value reuse.

A page's rank is the tick of its last use plus a bonus for its reuses, in ticks. The page with the
lowest rank is evicted first. Using a page also uses all its ancestors, each one tick later than its
child. So a parent never ranks below its child, and every policy evicts leaves before roots.
"""

from typing import NamedTuple

MOST_USES = 255
"""Maximum of a page's count of reuses."""

DOMINANT = 1 << 48
"""A bonus that is larger than any difference in age."""


class ReusePolicy(NamedTuple):
    """How much a page's reuses raise its rank."""

    name: str
    lifetimes: float | None
    """Bonus per reuse in lifetimes (a lifetime has as many ticks as the tier holds pages); None for
    `DOMINANT`."""
    most: int
    """Maximum number of reuses that earn a bonus."""

    def bonuses(self, pages: int) -> list[int]:
        """Return the bonuses for 0 to `MOST_USES` reuses in a tier of `pages` pages."""
        bonus = DOMINANT if self.lifetimes is None else round(self.lifetimes * pages)
        return [bonus * min(uses, self.most) for uses in range(MOST_USES + 1)]


REUSE_POLICIES = (
    ReusePolicy("recency", lifetimes=0, most=0),
    ReusePolicy("reuse_delays", lifetimes=1, most=1),
    ReusePolicy("reuse_first", lifetimes=None, most=1),
    ReusePolicy("frequency", lifetimes=None, most=MOST_USES),
)
"""In this order: least recently used; reused pages live one lifetime longer; pages that were used
only once are evicted first; least frequently used. The first policy applies until another one has
more hits."""

"""Compute max-min fair shares of links."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_TOLERANCE = 1 + 1e-12


def max_min(counts: Floats, links: Ints, uses: Floats, capacities: Floats) -> Floats:
    """Return the max-min fair rate of one flow of each class.

    All rates rise together. A flow stops when one of its links is full; the others go on (Bertsekas
    and Gallager, "Data Networks", 1992, section 6.5.2). A link that is the bottleneck of all its
    flows stays their bottleneck, so each round fills all such links at once.

    Args:
        counts: number of flows in each class, shape (n,).
        links: indices of the links that a class uses, shape (n, k). Pad with the index of a link of
            infinite capacity.
        uses: how much capacity of each of those links a rate of 1 takes, shape (n, k).
        capacities: capacity of each link, shape (m,).

    Raises `ValueError` if a class uses no finite link.

    """
    free = capacities.astype(np.float64)
    demand = counts[:, None] * uses
    rates = np.zeros(len(counts))
    active = np.flatnonzero(counts > 0)
    while active.size:
        used = links[active]
        load = np.bincount(used.ravel(), demand[active].ravel(), minlength=len(free))
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.where(load > 0, np.maximum(free, 0) / load, np.inf)
        own = level[used].min(axis=1)
        if np.isinf(own).any():
            raise ValueError("a flow uses no link of finite capacity")
        lowest = np.full(len(free), np.inf)
        np.minimum.at(lowest, used.ravel(), np.repeat(own, used.shape[1]))
        is_tightest = level <= lowest * _TOLERANCE
        stops = (is_tightest[used] & (level[used] <= own[:, None] * _TOLERANCE)).any(axis=1)
        stopped = active[stops]
        rates[stopped] = own[stops]
        taken = demand[stopped] * rates[stopped][:, None]
        free -= np.bincount(links[stopped].ravel(), taken.ravel(), minlength=len(free))
        active = active[~stops]
    return rates

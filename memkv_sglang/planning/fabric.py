"""Simulate flows of bytes over links, which they share max-min fairly."""

import heapq
import math
from collections.abc import Sequence

import numpy as np

from memkv_sglang.planning.events import Action, EventLoop
from memkv_sglang.planning.fairness import max_min

_DONE = 1e-6
"""A flow counts as done if at most this many bytes are left."""


class Fabric:
    """Moves flows along routes. Flows on one route have equal rates and are handled together.

    A link is anything with a limited rate: a network card, a disk, a CPU. A route says how much
    capacity of each link one byte per second takes. Build all links and routes before the first
    `send`.

    With a `quantum`, flows start and end at multiples of it, which bounds the work per simulated
    second. A quantum of 0 is exact.
    """

    def __init__(self, loop: EventLoop, quantum: float = 0.0) -> None:
        """Start without links; `quantum` is in seconds."""
        self._loop = loop
        self._quantum = quantum
        self.link_names: list[str] = []
        self._link_capacities: list[float] = []
        self._route_links: list[Sequence[int]] = []
        self._route_uses: list[Sequence[float]] = []
        self._heaps: list[list[tuple[float, int, float, Action]]] = []
        """One heap per route, of (end, number, size, action) for each flow. The end is the number
        of bytes that the route has then served to each of its flows."""
        self._sent = 0
        self._settled_at = 0.0
        self._next_settle = math.inf
        self._built = False

    def add_link(self, name: str, capacity: float) -> int:
        """Add a link; return its number."""
        self.link_names.append(name)
        self._link_capacities.append(capacity)
        return len(self.link_names) - 1

    def add_route(self, uses: dict[int, float]) -> int:
        """Add a route that takes the given capacity of each link per byte; return its number."""
        self._route_links.append(tuple(uses))
        self._route_uses.append(tuple(uses.values()))
        self._heaps.append([])
        return len(self._heaps) - 1

    def set_capacity(self, link: int, capacity: float) -> None:
        """Change a link's capacity from now on."""
        self._link_capacities[link] = capacity
        if self._built:
            self._capacities[link] = capacity
            self._request_settle(self._loop.now)

    def _build(self) -> None:
        self._built = True
        routes, width = len(self._heaps), max(map(len, self._route_links), default=1)
        pad = len(self._link_capacities)
        self._capacities = np.array([*self._link_capacities, math.inf])
        self._links = np.full((routes, width), pad, dtype=np.int64)
        self._uses = np.zeros((routes, width))
        for i, (links, uses) in enumerate(zip(self._route_links, self._route_uses, strict=True)):
            self._links[i, : len(links)] = links
            self._uses[i, : len(uses)] = uses
        self._counts = np.zeros(routes)
        self._served = np.zeros(routes)
        """Bytes served to each flow since the route was last idle."""
        self._rates = np.zeros(routes)
        self._targets = np.full(routes, math.inf)
        self._finished = np.zeros(routes)
        """Bytes of the finished flows."""

    def send(self, route: int, size: float, done: Action) -> None:
        """Move `size` bytes along a route, then run `done`."""
        if not self._built:
            self._build()
        self._advance()
        self._sent += 1
        heapq.heappush(self._heaps[route], (self._served[route] + size, self._sent, size, done))
        self._targets[route] = self._heaps[route][0][0]
        self._counts[route] += 1
        self._request_settle(self._loop.now)

    def flows(self, route: int) -> int:
        """Return the number of flows on a route."""
        return len(self._heaps[route])

    def bytes_left(self, route: int) -> float:
        """Return the bytes that the flows on a route still have to move."""
        if not self._built:
            return 0.0
        self._advance()
        served = float(self._served[route])
        return sum(max(end - served, 0.0) for end, *_ in self._heaps[route])

    def bytes_moved(self, route: int) -> float:
        """Return the bytes of a route's finished flows."""
        return float(self._finished[route]) if self._built else 0.0

    def use_by_link(self) -> dict[str, float]:
        """Return how many seconds finished flows have occupied each link, at full capacity."""
        if not self._built:
            return dict.fromkeys(self.link_names, 0.0)
        taken = np.bincount(
            self._links.ravel(),
            (self._uses * self._finished[:, None]).ravel(),
            minlength=len(self._capacities),
        )
        shares = taken / self._capacities
        return dict(zip(self.link_names, map(float, shares[:-1]), strict=True))

    def _advance(self) -> None:
        elapsed = self._loop.now - self._settled_at
        if elapsed > 0:
            self._served += self._rates * elapsed
            self._settled_at = self._loop.now

    def _request_settle(self, time: float) -> None:
        if self._quantum:
            time = math.ceil(time / self._quantum - 1e-9) * self._quantum
        if time < self._next_settle:
            self._next_settle = time
            self._loop.at(time, lambda: self._settle(time))

    def _settle(self, time: float) -> None:
        """End finished flows, recompute the rates, and schedule the next end."""
        if time != self._next_settle:
            return  # an earlier call has scheduled another end
        self._next_settle = math.inf
        self._advance()
        finished: list[Action] = []
        # Rates have rounding errors, and the clock cannot advance by less than 1e-12 of its value.
        slack = _DONE + self._rates * (1e-12 * max(1.0, self._loop.now))
        for route in np.flatnonzero(self._targets <= self._served + slack).tolist():
            self._finish(route, float(self._served[route] + slack[route]), finished)
        self._share()
        for action in finished:
            action()

    def _finish(self, route: int, served: float, finished: list[Action]) -> None:
        heap = self._heaps[route]
        while heap and heap[0][0] <= served:
            _, _, size, done = heapq.heappop(heap)
            self._finished[route] += size
            self._counts[route] -= 1
            finished.append(done)
        self._targets[route] = heap[0][0] if heap else math.inf
        if not heap:
            self._served[route] = self._rates[route] = 0.0

    def _share(self) -> None:
        routes = np.flatnonzero(self._counts)
        if not routes.size:
            return
        rates = max_min(
            self._counts[routes], self._links[routes], self._uses[routes], self._capacities
        )
        self._rates[routes] = rates
        with np.errstate(divide="ignore"):
            left = (self._targets[routes] - self._served[routes]) / rates
        if math.isfinite(soonest := float(left.min())):
            self._request_settle(self._loop.now + max(soonest, 0.0))

"""Synthetic requests with other characteristics than the trace's."""

import random
from collections.abc import Callable, Iterator
from itertools import count

from benchmarks.trace.requests import Workload

Request = list[int]


def _chain(pages: Iterator[int], length: int) -> Request:
    return [next(pages) for _ in range(length)]


def conversations(seed: int, turns: int = 700, live: int = 30, start: int = 0) -> Workload:
    """Return conversations that grow with each turn and then end, so that only recency matters."""
    rng, pages = random.Random(seed), count(start)
    going: list[Request] = []
    requests = []
    for _ in range(turns):
        if len(going) < live or rng.random() < 0.12:
            going.append(_chain(pages, rng.randint(5, 30)))
            talk = going[-1]
            del going[:-live]
        else:
            talk = rng.choice(going)
            talk += _chain(pages, rng.randint(2, 10))
        requests.append(list(talk))
    return Workload("conversations", requests)


def popular_documents(seed: int, reads: int = 1200, start: int = 0) -> Workload:
    """Return questions about documents whose popularity follows Zipf's law."""
    rng, pages = random.Random(seed), count(start)
    documents = [_chain(pages, rng.randint(5, 40)) for _ in range(200)]
    weights = [1 / rank**0.8 for rank in range(1, 201)]
    chosen = rng.choices(documents, weights, k=reads)
    return Workload("popular documents", [d + _chain(pages, 3) for d in chosen])


def one_hit_wonders(seed: int, reads: int = 1200, start: int = 0) -> Workload:
    """Return prompts that occur once, mixed with prompts about a few documents."""
    rng, pages = random.Random(seed), count(start)
    documents = [_chain(pages, rng.randint(5, 40)) for _ in range(40)]
    requests = [
        _chain(pages, rng.randint(10, 40)) if rng.random() < 0.7 else list(rng.choice(documents))
        for _ in range(reads)
    ]
    return Workload("one-hit wonders", requests)


def scans(seed: int, reads: int = 1200, start: int = 0) -> Workload:
    """Return a loop over many documents, mixed with questions about a few."""
    rng, pages = random.Random(seed), count(start)
    looped = [_chain(pages, 20) for _ in range(150)]
    favourites = [_chain(pages, 20) for _ in range(10)]
    requests = [
        list(rng.choice(favourites)) if rng.random() < 0.4 else list(looped[i % 150])
        for i in range(reads)
    ]
    return Workload("scans", requests)


def phases(seed: int) -> Workload:
    """Return a workload that consists of several kinds of traffic, one after the other."""
    parts = [
        conversations(seed, start=0),
        popular_documents(seed, start=1 << 32),
        one_hit_wonders(seed, start=2 << 32),
        conversations(seed + 1, start=3 << 32),
    ]
    return Workload("phases", [request for part in parts for request in part.requests])


MAKERS: tuple[Callable[[int], Workload], ...] = (
    conversations,
    popular_documents,
    one_hit_wonders,
    scans,
    phases,
)

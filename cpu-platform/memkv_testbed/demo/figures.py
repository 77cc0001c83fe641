"""Compute the figures: whether each claim holds, and median times to first token."""

from collections.abc import Callable, Sequence
from statistics import median

from memkv_testbed.demo.record import Request
from memkv_testbed.demo.scenario import CHANGED_STEP, TENANT_STEP

Figures = dict[str, bool | int | float | None]

SOURCES = ("recompute", "minio", "nvme", "host", "top_tier")
"""Slowest first."""


def source_of(request: Request, page_size: int) -> str | None:
    """Return the farthest tier that served the prompt, if it served most of it.

    Returns None if the request measures no single source, because more than a page was computed or
    the farthest tier served less than half.
    """
    prompt, reused = len(request.prompt), request.reused
    if reused.total == 0:
        return "recompute"
    if prompt - reused.total > page_size:
        return None
    far_first = {"minio": reused.minio, "nvme": reused.nvme, "host": reused.host}
    for source, tokens in far_first.items():
        if tokens:
            return source if tokens > prompt / 2 else None
    return "top_tier"


def samples(requests: Sequence[Request], page_size: int) -> dict[str, list[float]]:
    """Return the times to first token in seconds, by source.

    They include the first prompt on the server without a cache.
    """
    found: dict[str, list[float]] = {source: [] for source in SOURCES}
    for request in requests:
        source = source_of(request, page_size)
        if source is not None:
            found[source].append(request.ttft_s)
    found["recompute"] += [r.reference.ttft_s for r in requests[:1] if r.reference is not None]
    return found


def compute_figures(requests: Sequence[Request], page_size: int, changed_at: int) -> Figures:
    """Return the figures of the JSON file. Times are medians in seconds, None if unmeasured.

    `changed_at` is the position of the changed token.
    """
    times = samples(requests, page_size)
    medians = {name: median(values) if values else None for name, values in times.items()}
    recompute = medians["recompute"]
    return {
        "identical_text": all(request.identical for request in requests),
        "reuse_page_exact": all(request.exact for request in requests),
        "changed_token_isolated": _all_of(
            requests,
            CHANGED_STEP,
            lambda request: request.reported == changed_at // page_size * page_size,
        ),
        "tenant_isolated": _all_of(
            requests, TENANT_STEP, lambda request: request.reported == request.reused.total == 0
        ),
        "every_source_seen": all(times.values()),
        **{f"ttft_{name}_s": value for name, value in medians.items()},
        **{
            f"{name}_speedup": recompute / value if recompute and value else None
            for name, value in medians.items()
            if name != "recompute"
        },
        "prompt_tokens": len(requests[0].prompt),
        "page_size": page_size,
    }


def _all_of(requests: Sequence[Request], step: str, holds: Callable[[Request], bool]) -> bool:
    """Return whether the step was run, and each of its answers is right and meets the condition."""
    chosen = [request for request in requests if request.step == step]
    return bool(chosen) and all(request.identical and holds(request) for request in chosen)


def failed(figures: Figures) -> list[str]:
    """Return the names of the claims that are false."""
    return [name for name, value in figures.items() if value is False]

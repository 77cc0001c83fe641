"""The figures: what was claimed and is true or not, and medians of the times."""

from collections.abc import Callable, Sequence
from statistics import median

from memkv_testbed.demo.record import Request
from memkv_testbed.demo.scenario import CHANGED_AT, CHANGED_STEP, TENANT_STEP

Figures = dict[str, bool | int | float | None]

SOURCES = ("recompute", "minio", "nvme", "host", "top_tier")
"""Slowest first."""


def source_of(request: Request, page_size: int) -> str | None:
    """Return where the prompt came from: the farthest tier, if that gave most of it.

    None for what is no example of one source: more than a page was computed, or a far tier gave
    little.
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
    """Return the times to first token (s) by source; the reference's too, for the first prompt."""
    found: dict[str, list[float]] = {source: [] for source in SOURCES}
    for request in requests:
        source = source_of(request, page_size)
        if source is not None:
            found[source].append(request.ttft_s)
    found["recompute"] += [r.reference.ttft_s for r in requests[:1] if r.reference is not None]
    return found


def compute_figures(requests: Sequence[Request], page_size: int) -> Figures:
    """Return the flat object of the JSON file; times are seconds, medians, None where unseen."""
    times = samples(requests, page_size)
    medians = {name: median(values) if values else None for name, values in times.items()}
    recompute = medians["recompute"]
    return {
        "identical_text": all(request.identical for request in requests),
        "reuse_page_exact": all(request.exact for request in requests),
        "changed_token_isolated": _all_of(
            requests,
            CHANGED_STEP,
            lambda request: request.reported == CHANGED_AT // page_size * page_size,
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
    """Tell whether there is such a step, its answers are right, and the condition holds."""
    chosen = [request for request in requests if request.step == step]
    return bool(chosen) and all(request.identical and holds(request) for request in chosen)


def failed(figures: Figures) -> list[str]:
    """Return the names of what ought to be true and is not."""
    return [name for name, value in figures.items() if value is False]

"""Count what loads save the servers."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from memkv_sglang.engine.results import PageLoad

if TYPE_CHECKING:
    from memkv_sglang.metrics import Metrics


class ServedRequest(NamedTuple):
    """A server's request that pages are loaded for, and what each loaded page saves it."""

    id: str = ""
    page_tokens: int = 0
    """Tokens that need not be computed; 0 if another call counts them."""
    page_seconds: float = 0.0
    """Seconds of prefill; 0 if the server does not know its speed yet."""


UNKNOWN_REQUEST = ServedRequest()


def count_savings(loads: Sequence[PageLoad], served: ServedRequest, metrics: "Metrics") -> None:
    """Count the tokens and seconds of prefill that the loaded pages save, by tier."""
    if not served.page_tokens:
        return
    for tier, pages in Counter(load.tier for load in loads if load.tier).items():
        metrics.saved_tokens.labels(tier).inc(pages * served.page_tokens)
        metrics.saved_seconds.labels(tier).inc(pages * served.page_seconds)

"""The results of requests, and where their tokens came from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple


class Sources(NamedTuple):
    """The prompt's tokens by source of their KV, nearest first."""

    device: int = 0
    host: int = 0
    nvme: int = 0
    minio: int = 0

    @property
    def total(self) -> int:
        """Number of prompt tokens that were reused."""
        return sum(self)


@dataclass(frozen=True, slots=True)
class Reference:
    """The result of the same prompt on a server without any cache."""

    ttft_s: float
    output_ids: list[int]


@dataclass(frozen=True, slots=True)
class Request:
    """The result of one request. Requests with the same `step` are repetitions."""

    step: str
    node: str
    via: str
    """How the request was sent: `router` or `direct`."""
    tenant: str | None
    """The request's cache salt."""
    prompt: list[int]
    output_ids: list[int]
    ttft_s: float
    reported: int
    """Tokens that SGLang reports as cached."""
    reused: Sources
    expected: int
    """Number of tokens that could be reused; see `History.reusable`."""
    reference: Reference | None = None

    @property
    def identical(self) -> bool:
        """Whether a server without any cache gave the same answer."""
        return self.reference is not None and self.reference.output_ids == self.output_ids

    @property
    def exact(self) -> bool:
        """Whether exactly the reusable pages were reused, each from a known source."""
        return self.reported == self.expected == self.reused.total

    def as_json(self) -> dict[str, Any]:
        """Return the request's entry in the JSON file."""
        values = asdict(self)
        reference = self.reference
        del values["prompt"], values["reference"]
        return {
            **values,
            "reused": self.reused._asdict(),
            "prompt_tokens": len(self.prompt),
            "ttft_recompute_s": reference.ttft_s if reference else None,
            "identical_text": self.identical if reference else None,
        }


class Row(NamedTuple):
    """The summary of a step's repetitions."""

    first: Request
    times: int
    ttft_s: float
    """Median."""
    reused: Sources
    """Sources of the first repetition."""
    recompute_s: float | None
    """Whether all answers are right; None before the reference has answered."""
    identical: bool


def rows(requests: Sequence[Request]) -> list[Row]:
    """Return one row per step, in order."""
    steps: dict[str, list[Request]] = {}
    for request in requests:
        steps.setdefault(request.step, []).append(request)
    return [_row(repetitions) for repetitions in steps.values()]


def _row(repetitions: list[Request]) -> Row:
    first = repetitions[0]
    return Row(
        first,
        len(repetitions),
        median(request.ttft_s for request in repetitions),
        first.reused,
        first.reference.ttft_s if first.reference else None,
        all(request.identical for request in repetitions),
    )

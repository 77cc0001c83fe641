"""Compare answers with those of a server that has no storage."""

from collections.abc import Iterable, Mapping

from sglang_cpu_platform.server import CpuServer

from benchmarks.serving import Tokens
from benchmarks.traffic.systems import ANSWER_TOKENS, Answered


class Reference:
    """A server without HiCache. It computes each prompt once."""

    def __init__(self, server: CpuServer) -> None:
        self._server = server
        self._known: dict[tuple[int, ...], Tokens] = {}

    def wrong(self, answered: Mapping[str, Iterable[Answered]]) -> dict[str, int]:
        """Count wrong answers by contestant."""
        return {
            name: sum(not self._is_right(tokens, answer.output_ids) for tokens, answer in requests)
            for name, requests in answered.items()
        }

    def _is_right(self, tokens: Tokens, output: Tokens) -> bool:
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = self._compute(tokens)
        if self._known[key] == output:
            return True
        # Float sums depend on how a prompt is split, so two texts can be equally right.
        self._server.client.flush_cache()
        return self._compute(tokens) == output

    def _compute(self, tokens: Tokens) -> Tokens:
        return self._server.client.generate(tokens, max_new_tokens=ANSWER_TOKENS).output_ids

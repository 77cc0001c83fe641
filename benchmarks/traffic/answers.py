"""Compare answers with those of servers that have no storage."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sglang_cpu_platform.server import CpuServer

from benchmarks.serving import Tokens
from benchmarks.traffic.systems import ANSWER_TOKENS, Answered


class Reference:
    """Servers without storage. Each prompt is computed once, by one of them."""

    def __init__(self, servers: Sequence[CpuServer]) -> None:
        self._servers = servers
        self._known: dict[tuple[int, ...], Tokens] = {}

    def wrong(self, conversations: Sequence[Sequence[Answered]]) -> int:
        """Count wrong answers."""
        count = len(self._servers)
        with ThreadPoolExecutor(count) as pool:
            shares = [conversations[number::count] for number in range(count)]
            return sum(pool.map(self._wrong_on, self._servers, shares))

    def _wrong_on(self, server: CpuServer, conversations: Sequence[Sequence[Answered]]) -> int:
        answered = [one for conversation in conversations for one in conversation]
        return sum(
            not self._is_right(server, tokens, answer.output_ids) for tokens, answer in answered
        )

    def _is_right(self, server: CpuServer, tokens: Tokens, output: Tokens) -> bool:
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = _compute(server, tokens)
        if self._known[key] == output:
            return True
        # Float sums depend on how a prompt is split, so two texts can be equally right.
        server.client.flush_cache()
        return _compute(server, tokens) == output


def _compute(server: CpuServer, tokens: Tokens) -> Tokens:
    return server.client.generate(tokens, max_new_tokens=ANSWER_TOKENS).output_ids

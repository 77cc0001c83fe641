"""Concurrent requests from several threads; each answer is compared with the expected one."""

import random
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from sglang_cpu_platform.client import Answer

from tests.serving.node import Tokens, prompt, wait_until

PROMPTS = [prompt(f"traffic {i}", 300 + 37 * i) for i in range(24)]
"""Prompts with more tokens than a device pool holds, so that pages are evicted and loaded again."""


Expected = Mapping[int, Sequence[list[int]]]
"""The correct answers, by the prompt's number."""


class Target(Protocol):
    """A node, or a router in front of several."""

    def generate(self, tokens: Tokens, **request: Any) -> Answer: ...


class Traffic:
    """Runs from entry to exit, which waits until every request is answered, or raises its error."""

    def __init__(self, nodes: Sequence[Target], expected: Expected, threads: int = 4) -> None:
        self.answered = 0
        """Requests that were answered correctly."""
        self.wrong: list[tuple[int, list[int]]] = []
        self.errors: list[Exception] = []
        self._nodes = nodes
        self._expected = expected
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(threads)]

    def goes_on(self, more: int = 12) -> None:
        """Wait until that many more requests have been answered, or one has failed."""
        goal = self.answered + more
        wait_until(lambda: self.answered >= goal or bool(self.wrong or self.errors))

    def _ask(self, seed: int) -> None:
        choose = random.Random(f"traffic {seed}")
        while not self._stop.is_set():
            number = choose.choice(list(self._expected))
            try:
                answer = choose.choice(self._nodes).generate(PROMPTS[number])
            except Exception as error:
                self.errors.append(error)
                return
            if answer.output_ids in self._expected[number]:
                self.answered += 1
            else:
                self.wrong.append((number, answer.output_ids))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if error is None:
            assert not self.errors, self.errors
            assert not self.wrong, self.wrong

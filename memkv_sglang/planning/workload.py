"""Generate sessions: synthetic ones, and copies of those in published traces."""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple, Protocol

SESSION_BITS = 24
"""Number of low bits of a run's number that distinguish the runs of one session."""


Blocks = Sequence[tuple[int, int]]
"""The pages of a chain as blocks (first number, count) of consecutive numbers."""


def as_blocks(pages: Sequence[int]) -> Blocks:
    """Return page numbers as blocks."""
    blocks: list[tuple[int, int]] = []
    for page in pages:
        if blocks and page == sum(blocks[-1]):
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + 1)
        else:
            blocks.append((page, 1))
    return blocks


def count_pages(blocks: Blocks) -> int:
    """Return the number of pages."""
    return sum(count for _, count in blocks)


def first_pages(blocks: Blocks, run: int) -> list[int]:
    """Return the first page of each run of `run` pages, which names the run.

    Chains that diverge within a run still share the whole run. So for each branch of a session,
    hits are overestimated by half a run on average.
    """
    pages = chain.from_iterable(range(first, first + count) for first, count in blocks)
    return list(islice(pages, 0, None, run))


class Turn(NamedTuple):
    """One request of a session."""

    think: float
    """Seconds since the answer to the previous turn."""
    runs: Sequence[int]
    """The prompt's complete pages, in the form of `SimulatedDisk`."""
    pages: int
    tokens: int
    """Tokens of the prompt."""
    output: int
    """Tokens of the answer."""
    shared_pages: int = 0
    """Number of leading pages that other sessions share."""


class Session(Protocol):
    """Yields turns; the session ends when there are no more."""

    def before(self) -> Turn | None:
        """Return the turn before the first one; None if there was none."""

    def __iter__(self) -> Iterator[Turn]: ...


class Think(NamedTuple):
    """Think times, which are log-normal with this median and mean, in seconds."""

    median: float
    mean: float

    def draw(self, rng: random.Random) -> float:
        """Return one think time. It is constant if mean and median are equal."""
        return self.median * math.exp(rng.gauss(0, self._sigma))

    def rest(self, rng: random.Random) -> float:
        """Return the remaining think time at a random moment.

        A random moment falls into long think times more often than into short ones: their lengths
        have the density x f(x) / mean, which is again log-normal. The moment is uniform within the
        think time.
        """
        length = self.median * math.exp(rng.gauss(self._sigma**2, self._sigma))
        return rng.random() * length

    @property
    def _sigma(self) -> float:
        return math.sqrt(2 * math.log(max(self.mean / self.median, 1.0)))


_TAIL_RUNS = 1 << (SESSION_BITS - 2)
"""Numbers available for the runs that a steady session does not keep. Then they repeat."""


class SteadySession:
    """A context of constant length: each turn appends new tokens, and the next turn drops them.

    The load therefore does not depend on the session's age.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        *,
        context: int,
        new: int,
        output: int,
        think: Think,
        page_tokens: int,
        run: int,
    ) -> None:
        """Begin a context of about `context` tokens. The last `new` of them differ in each turn.

        The other tokens are rounded to whole runs.
        """
        self._rng = random.Random(f"{seed} {number}")
        self._first = number << SESSION_BITS
        self._think = think
        self._output = output
        count = max(1, round((context - new) / page_tokens / run))
        known, added = count * run, -(-new // page_tokens)
        self._pages = known + added
        self._tokens = known * page_tokens + new
        self._stable = list(range(self._first, self._first + count))
        self._tail = -(-added // run)
        self._offset = 0

    def before(self) -> Turn:
        """Return the turn before the first one."""
        return self._turn(0.0)

    def __iter__(self) -> Iterator[Turn]:
        """Yield turns without end. The first one comes after the remaining part of a think time."""
        yield self._turn(self._think.rest(self._rng))
        while True:
            yield self._turn(self._think.draw(self._rng))

    def _turn(self, think: float) -> Turn:
        first = self._first + len(self._stable) + self._offset
        self._offset = (self._offset + self._tail) % _TAIL_RUNS
        tail = range(first, first + self._tail)
        return Turn(think, [*self._stable, *tail], self._pages, self._tokens, self._output)


class TemplateTurn(NamedTuple):
    """A turn of a recorded session."""

    think: float
    blocks: Blocks
    pages: int
    tokens: int
    output: int


class Template(NamedTuple):
    """A recorded session. Many simulated sessions repeat it, each with pages of its own."""

    turns: Sequence[TemplateTurn]
    group: int
    """Group of the session. The sessions of a group begin with the same pages."""
    shared_pages: int
    """Number of pages that the group shares."""

    @property
    def seconds(self) -> float:
        """Total think time of all turns, in seconds."""
        return sum(turn.think for turn in self.turns)


class RepeatedSession:
    """A session that repeats a template, beginning at one of its turns."""

    def __init__(
        self,
        number: int,
        template: Template,
        first: int,
        scale: float,
        run: int,
        rest: float | None = None,
    ) -> None:
        """Multiply think times by `scale`. `rest` is the remaining part of the first one."""
        self._rest = rest
        self._number = number
        self._template = template
        self._first = first
        self._scale = scale
        self._run = run

    def before(self) -> Turn | None:
        """Return the turn before the first one; None if the session begins with that."""
        turns = self._template.turns[: self._first]
        return self._turn(turns[-1], 0.0) if turns else None

    def __iter__(self) -> Iterator[Turn]:
        """Yield the rest of the template's turns."""
        for number, turn in enumerate(self._template.turns[self._first :]):
            is_rest = not number and self._rest is not None
            yield self._turn(turn, self._rest if is_rest else turn.think)

    def _turn(self, turn: TemplateTurn, think: float | None) -> Turn:
        base = (self._number + 1) << SESSION_BITS
        shared = self._template.shared_pages // self._run
        group = -((self._template.group + 1) << SESSION_BITS)
        runs = [base + page for page in first_pages(turn.blocks, self._run)]
        common = min(shared, len(runs))
        runs[:common] = range(group, group + common)
        pages = min(common * self._run, turn.pages)
        seconds = (think or 0.0) * self._scale
        return Turn(seconds, runs, turn.pages, turn.tokens, turn.output, pages)


class Population:
    """Keeps the number of sessions constant: when a session ends, another one begins."""

    def __init__(self, templates: Sequence[Template], seed: int, *, scale: float, run: int) -> None:
        """Weight templates by duration, so that the first sessions are typical of any moment."""
        self._templates = templates
        self._rng = random.Random(seed)
        self._scale = scale
        self._run = run
        self._weights = [template.seconds for template in templates]
        self._count = 0

    def running(self) -> RepeatedSession:
        """Return a session that is already under way."""
        template = self._rng.choices(self._templates, self._weights)[0]
        at = self._rng.random() * template.seconds
        for first, turn in enumerate(template.turns):
            if at <= turn.think:
                return self._make(template, first, turn.think - at)
            at -= turn.think
        return self._make(template, 0)

    def new(self) -> RepeatedSession:
        """Return a session that begins now."""
        return self._make(self._rng.choice(self._templates), 0)

    def _make(self, template: Template, first: int, rest: float | None = None) -> RepeatedSession:
        self._count += 1
        return RepeatedSession(self._count, template, first, self._scale, self._run, rest)

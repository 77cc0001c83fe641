"""Measure how many conversations a server sustains if its top tier holds only a few of them."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from sglang_cpu_platform.server import CpuServer

from benchmarks.base import Options
from benchmarks.report import Measure, Panel, Report
from benchmarks.serving import ANSWER_TOKENS, PAGE, Servers, prompt, tell, tell_medians

CONTEXT, QUICK_CONTEXT = 16_000, 8_000
"""Tokens of a conversation's initial context."""

TURN_TOKENS = 48
"""Tokens of a user's or tool's turn. The answer has `ANSWER_TOKENS` more. The context keeps both.
"""

SESSIONS = 6
"""Number of conversations. The host pool cannot hold all of them, so each has been evicted when it
continues, as with many users."""

TOP_TIER = 2.5
"""Number of contexts that fit in the top tier, so that one can be loaded while another is computed.
SGLang's host pool holds twice as many."""

IN_FLIGHT = 2
"""Concurrent requests."""

THINK_SECONDS = 60.0
"""Seconds from an answer to the next turn, in which tools run or a user reads."""

LOAD = 0.8
"""Share of full speed at which times to first token are measured."""

PATIENCE = 1.5
"""Bound on the time to first token, relative to computing the prompt on an idle server. Below 1, a
server without storage could not keep it."""

NONE, HOST, OURS, LIMIT = "no storage", "host pool only", "memkv", "all in the top tier"
HELD, FIRST, IDLE = "sessions sustained", "first token", "computed by an idle server"


class Conversation:
    """A context that grows with each turn."""

    def __init__(self, seed: str, context: int, name: str = "") -> None:
        """Begin with the seed's context; after it, conversations of different names diverge."""
        self._seed = f"{seed} {name}"
        self._tokens = prompt(seed, context)
        self._turns = 0

    def turn(self, server: CpuServer) -> float:
        """Run a turn; return its time to first token in seconds."""
        self._turns += 1
        self._tokens += prompt(f"{self._seed}, turn {self._turns}", TURN_TOKENS)
        answer = server.client.generate(self._tokens, max_new_tokens=ANSWER_TOKENS)
        self._tokens += answer.output_ids
        return answer.ttft_s


class Seats:
    """The conversations of one server."""

    def __init__(self, server: CpuServer, conversations: Iterable[Conversation]) -> None:
        self._server = server
        self._waiting = deque(conversations)

    def open(self) -> None:
        """Send every conversation to the server once."""
        for conversation in self._waiting:
            conversation.turn(self._server)

    def seconds_a_turn(self, turns: int, in_flight: int = IN_FLIGHT) -> float:
        """Return seconds per turn under full load. Each turn continues the oldest conversation."""
        began = time.perf_counter()
        _at_once([partial(self._some, turns // in_flight)] * in_flight)
        return (time.perf_counter() - began) / (turns // in_flight * in_flight)

    def _some(self, turns: int) -> None:
        for _ in range(turns):
            conversation = self._waiting.popleft()
            conversation.turn(self._server)
            self._waiting.append(conversation)

    def first_tokens(self, seconds_a_turn: float, turns: int) -> list[float]:
        """Return the times to first token while every conversation thinks between its turns.

        A few conversations with short pauses load a server like many with long pauses.
        """
        cycle = len(self._waiting) * seconds_a_turn / LOAD
        times: list[float] = []
        began = time.monotonic()

        def converse(number: int, conversation: Conversation) -> None:
            for turn in range(turns):
                due = began + cycle * (turn + number / len(self._waiting))
                time.sleep(max(0.0, due - time.monotonic()))
                times.append(conversation.turn(self._server))

        _at_once([partial(converse, *numbered) for numbered in enumerate(self._waiting)])
        return times


def _at_once(calls: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(calls)) as pool:
        for running in [pool.submit(call) for call in calls]:
            running.result()


def run(options: Options) -> Report:
    """Measure three servers, each with its own conversations. Takes about 6 GiB of memory.

    With `--quick`, contexts have half the length and there is one round. That still takes minutes,
    mostly to start the servers and to compute each conversation once.
    """
    report = Report("sessions", "seconds per turn")
    context = QUICK_CONTEXT if options.quick else CONTEXT
    room = ["--max-total-tokens", str(int(context * TOP_TIER) // PAGE * PAGE)]
    with Servers(options.directory) as servers:
        node = servers.node("a", extra=room)
        plain, host = servers.peer("plain", room), servers.host_pool(room)
        servers.wait()

        def seats(name: str, server: CpuServer) -> Seats:
            return Seats(server, (Conversation(f"{name} {i}", context) for i in range(SESSIONS)))

        none, pool, ours = seats("none", plain), seats("pool", host), seats("ours", node.server)
        # All conversations share one context, so it is never evicted.
        few = Seats(node.server, (Conversation("few", context, f"{i}") for i in range(IN_FLIGHT)))
        tell(f"computing {SESSIONS} contexts of {context} tokens on each of two servers")
        _at_once([pool.open, ours.open])

        def in_top_tier() -> float:
            few.open()
            return few.seconds_a_turn(8)

        measures: dict[str, Measure] = {
            NONE: lambda: none.seconds_a_turn(1, 1),
            HOST: lambda: pool.seconds_a_turn(1, 1),
            OURS: lambda: ours.seconds_a_turn(4 * SESSIONS),
            LIMIT: in_top_tier,
        }
        case = f"{context} tokens"
        for _ in range(1 if options.quick else options.repetitions):
            report.compete(case, measures, 1)
            tell_medians(report, case)
        loads = node.loads("nvme")
        report.runs[FIRST] = {
            OURS: ours.first_tokens(report.median(case, OURS), 5),
            IDLE: [Conversation("first", context).turn(plain)],
        }
    load = context / PAGE * loads.seconds / loads.pages
    claim(report, case, context, load=load, bandwidth=loads.bytes / loads.seconds)
    return report


def claim(report: Report, case: str, context: int, *, load: float, bandwidth: float) -> None:
    """Add the ratios, and the bound that follows from computing a turn and loading its context.

    `load` is in seconds per context, `bandwidth` in bytes per second.
    """
    none, ours, compute = (report.median(case, name) for name in (NONE, OURS, LIMIT))
    least = max(compute, load)
    patience = PATIENCE * report.median(FIRST, IDLE)
    slowest = statistics.quantiles(report.runs[FIRST][OURS], n=20)[-1]
    report.runs[FIRST]["bound"] = [patience]
    report.runs[HELD] = {
        name: [THINK_SECONDS / seconds for seconds in report.runs[case][name]]
        for name in (NONE, HOST, OURS)
    } | {"bound": [THINK_SECONDS / least]}
    report.figures |= {
        "sessions_over_no_storage": none / ours,
        "sessions_over_host_pool": report.median(case, HOST) / ours,
        "sessions_bound_over_no_storage": none / least,
        "sessions_held": THINK_SECONDS / ours,
        "sessions_held_bound": THINK_SECONDS / least,
        "sessions_held_no_storage": THINK_SECONDS / none,
        "sessions_p95_first_token_over_bound": slowest / patience,
    }
    report.panels += [
        Panel("a turn at full speed", "s", {case: case}),
        Panel(f"sessions that think {THINK_SECONDS:.0f} s", "sessions", {case: HELD}),
        Panel(f"first token at {LOAD:.0%} of full speed", "s", {case: FIRST}),
    ]
    report.notes += [
        f"model: a session of {context} tokens thinks {THINK_SECONDS:.0f} s between turns of "
        f"{TURN_TOKENS} + {ANSWER_TOKENS} tokens; a server that needs s seconds a turn at full "
        f"speed holds {THINK_SECONDS:.0f} / s of them; the ratio of two servers does not depend on "
        "how long they think",
        "assumptions: every context is evicted from top tier and host pool between two turns; "
        "loads overlap with computing; idle sessions cost nothing; the bound on first tokens does "
        "not apply to a server without storage",
        f"bound: the longer of computing a turn whose context is in the top tier ({compute:.2f} s) "
        f"and loading the context at the measured {bandwidth / 1e9:.2f} GB/s ({load:.2f} s): "
        f"{THINK_SECONDS / least:.0f} sessions, {none / least:.1f} times those without storage",
        f"measured: {THINK_SECONDS / ours:.0f} sessions beside {THINK_SECONDS / none:.1f} without "
        f"storage; at {LOAD:.0%} of full speed 95 % of first tokens come within {slowest:.1f} s, "
        f"where {patience:.1f} s ({PATIENCE:g} times computing) is the bound",
    ]

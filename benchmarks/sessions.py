"""How many agent conversations one server holds, when its top tier has room for few of them."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from sglang_cpu_platform.server import CpuServer

from benchmarks.base import Options
from benchmarks.report import Report
from benchmarks.serving import ANSWER_TOKENS, PAGE, Servers, prompt

CONTEXT, QUICK_CONTEXT = 16_000, 8_000
"""Tokens that a conversation begins with."""

TURN_TOKENS = 48
"""Of a user's (or a tool's) turn; the answer has `ANSWER_TOKENS` more, and both stay."""

SESSIONS = 4
"""Conversations in turn: more than the host pool holds, so that each finds itself evicted, as it
would among many. The top tier has room for one and a half, the host pool for three."""

THINK_SECONDS = 60.0
"""From an answer to the next turn: an agent's tools at work, or a user who reads."""

IN_FLIGHT = 2
"""Requests at a time, so that one can be loaded while another is computed."""

LOAD = 0.8
"""Share of its full speed at which a server's times to first token are looked at."""

PATIENCE = 1.5
"""The bound on the time to first token, over that of a prompt computed on an idle server: less
than one no server without storage could keep."""

MODEL = (
    f"a session thinks {THINK_SECONDS:.0f} s between turns of {TURN_TOKENS} + {ANSWER_TOKENS} "
    f"tokens, so a server that needs s seconds a turn at full speed holds {THINK_SECONDS:.0f} / s "
    f"of them; the ratio of two servers does not depend on how long they think. The bound is a "
    f"server whose contexts are all in its top tier; loads overlap with computing."
)


class Conversation:
    """A context that grows with each turn; one turn at a time."""

    def __init__(self, seed: str, context: int) -> None:
        self._seed = seed
        self._tokens = prompt(seed, context)
        self._turns = 0

    def turn(self, server: CpuServer) -> float:
        """Take a turn, return the seconds to its first token."""
        self._turns += 1
        self._tokens += prompt(f"{self._seed}, turn {self._turns}", TURN_TOKENS)
        answer = server.client.generate(self._tokens, max_new_tokens=ANSWER_TOKENS)
        self._tokens += answer.output_ids
        return answer.ttft_s


class Seats:
    """The conversations of one server."""

    def __init__(self, name: str, server: CpuServer, context: int, count: int = SESSIONS) -> None:
        self._server = server
        self._waiting = deque(Conversation(f"{name} {i}", context) for i in range(count))

    def open(self) -> None:
        """Let the server see every conversation once."""
        for conversation in self._waiting:
            conversation.turn(self._server)

    def seconds_a_turn(self, turns: int) -> float:
        """Return the seconds a turn at full speed: always the one that has waited longest."""
        began = time.perf_counter()
        in_flight = min(IN_FLIGHT, len(self._waiting))
        with ThreadPoolExecutor(in_flight) as pool:
            for each in [pool.submit(self._one, turns // in_flight) for _ in range(in_flight)]:
                each.result()
        return (time.perf_counter() - began) / (turns // in_flight * in_flight)

    def _one(self, turns: int) -> None:
        for _ in range(turns):
            conversation = self._waiting.popleft()
            conversation.turn(self._server)
            self._waiting.append(conversation)

    def first_tokens(self, seconds_a_turn: float, turns: int) -> list[float]:
        """Return the times to first token while every conversation thinks between its turns.

        Few that think shortly load a server as many do that think long.
        """
        cycle = len(self._waiting) * seconds_a_turn / LOAD
        times: list[float] = []
        began = time.monotonic()

        def converse(number: int, conversation: Conversation) -> None:
            for turn in range(turns):
                due = began + cycle * (turn + number / len(self._waiting))
                time.sleep(max(0.0, due - time.monotonic()))
                times.append(conversation.turn(self._server))

        threads = [
            threading.Thread(target=converse, args=numbered)
            for numbered in enumerate(self._waiting)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return times


def run(options: Options) -> Report:
    """Measure three servers, each with conversations of its own; takes about 6 GiB of memory.

    Quickly: contexts of half the length, and one round; two to three minutes.
    """
    report = Report("sessions", "seconds a turn at full speed")
    context = QUICK_CONTEXT if options.quick else CONTEXT
    room = ["--max-total-tokens", str(context * 3 // 2 // PAGE * PAGE)]
    with Servers(options.directory) as servers:
        node = servers.node("a", extra=room)
        plain, host = servers.peer("plain", room), servers.host_pool(room)
        servers.wait()
        contestants = {
            "no storage": Seats("plain", plain, context),
            "host pool only": Seats("host", host, context),
            "NVMe and MinIO": Seats("ours", node.server, context),
        }
        alone = Seats("alone", node.server, context, 1)
        for seats in (contestants["host pool only"], contestants["NVMe and MinIO"]):
            seats.open()
        turns = {"no storage": 2, "host pool only": 2, "NVMe and MinIO": 4 * SESSIONS}
        measures: dict[str, Callable[[], float]] = {
            name: partial(contestants[name].seconds_a_turn, turns[name]) for name in contestants
        }
        measures["all in the top tier"] = lambda: _warm(alone)
        report.compete(f"{context} tokens", measures, 1 if options.quick else options.repetitions)
        loads = node.loads("nvme")
        ours = report.median(f"{context} tokens", "NVMe and MinIO")
        times = contestants["NVMe and MinIO"].first_tokens(ours, 5)
        recompute = Conversation("first", context).turn(plain)
    page = loads.bytes / max(1, loads.pages)
    _claim(report, f"{context} tokens", context / PAGE * page / (loads.bytes / loads.seconds))
    report.figures |= {
        "sessions_p95_first_token_over_bound": statistics.quantiles(times, n=20)[-1]
        / (PATIENCE * recompute),
    }
    report.notes.append(MODEL)
    return report


def _warm(alone: Seats) -> float:
    """Return the seconds of turns that find their whole context in the top tier."""
    alone.open()
    return alone.seconds_a_turn(6)


def _claim(report: Report, case: str, load_seconds: float) -> None:
    """State the ratios, and the bounds: no storage over what a turn takes at the least."""
    none, ours = report.median(case, "no storage"), report.median(case, "NVMe and MinIO")
    least = report.median(case, "all in the top tier")
    report.figures |= {
        "sessions_over_no_storage": none / ours,
        "sessions_over_host_pool": report.median(case, "host pool only") / ours,
        "sessions_bound_top_tier": none / least,
        "sessions_bound_bandwidth": none / max(least, load_seconds),
        "sessions_held": THINK_SECONDS / ours,
        "sessions_held_without_storage": THINK_SECONDS / none,
    }

"""Predict the benchmarks `ttft` and `sessions` from measurements with shorter prompts."""

from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from benchmarks import sessions, ttft
from benchmarks.predictions.calibrate import ServingNumbers
from benchmarks.serving import ANSWER_TOKENS, PAGE
from memkv_sglang.planning.calibration import PrefillCost, StepCost, fit_prefill
from memkv_sglang.planning.events import EventLoop
from memkv_sglang.planning.fabric import Fabric
from memkv_sglang.planning.gpu import Job, Replica

CALIBRATION = Path(__file__).with_name("calibration.json")


class LoadCost(NamedTuple):
    """Seconds of a load: fixed + per_page x pages."""

    fixed: float
    per_page: float


class Costs(NamedTuple):
    """Fitted costs of one server."""

    prefill: PrefillCost
    step: float
    loads: Mapping[str, LoadCost]
    """By tier."""


def read_costs(file: Path = CALIBRATION) -> Costs:
    """Fit the costs to a file of `benchmarks.predictions.calibrate`."""
    numbers = msgspec.json.decode(file.read_bytes(), type=ServingNumbers)
    prefill = fit_prefill(numbers.prefill)
    loads = {}
    for tier in {row.tier for row in numbers.loads}:
        rows = [row for row in numbers.loads if row.tier == tier]
        pages = np.array([float(row.pages) for row in rows])
        seconds = [row.seconds - prefill.seconds(row.new, row.pages * PAGE) for row in rows]
        per_page, fixed = np.polyfit(pages, np.maximum(seconds, 0), 1)
        loads[tier] = LoadCost(max(float(fixed), 0.0), max(float(per_page), 0.0))
    return Costs(prefill, numbers.step_seconds, loads)


def predict_ttft(costs: Costs, *, quick: bool) -> dict[str, dict[str, float]]:
    """Return seconds to the first token by case and contestant of the benchmark."""
    found = {}
    for name, length in (ttft.QUICK if quick else ttft.LENGTHS).items():
        pages = (length - 1) // PAGE
        held = costs.prefill.seconds(length - pages * PAGE, pages * PAGE)
        found[name] = {
            "recompute": costs.prefill.seconds(length, 0),
            ttft.FAR: _load_seconds(costs.loads["minio"], pages) + held,
            "NVMe": _load_seconds(costs.loads["nvme"], pages) + held,
            "top tier": held,
        }
        for each in (ttft.FAR, "NVMe", "top tier"):
            found[name][f"{each} / recompute"] = found[name][each] / found[name]["recompute"]
    return found


def _load_seconds(cost: LoadCost, pages: int) -> float:
    return cost.fixed + cost.per_page * pages


def predict_sessions(costs: Costs, *, quick: bool) -> dict[str, float]:
    """Return seconds per turn at full speed by contestant of the benchmark, and the ratio."""
    context = sessions.QUICK_CONTEXT if quick else sessions.CONTEXT
    none = _seconds_per_turn(costs, context, conversations=1, in_flight=1, held="none")
    ours = _seconds_per_turn(
        costs, context, conversations=sessions.SESSIONS, in_flight=sessions.IN_FLIGHT, held="nvme"
    )
    limit = _seconds_per_turn(
        costs,
        context,
        conversations=sessions.IN_FLIGHT,
        in_flight=sessions.IN_FLIGHT,
        held="device",
    )
    return {
        sessions.NONE: none,
        sessions.OURS: ours,
        sessions.LIMIT: limit,
        "ratio": none / ours,
    }


def _seconds_per_turn(
    costs: Costs, context: int, *, conversations: int, in_flight: int, held: str, turns: int = 24
) -> float:
    """Simulate turns at full speed, as `sessions.Seats.seconds_a_turn` measures them.

    `held` is the tier that has each context: `none`, `nvme` or `device`.
    """
    loop = EventLoop()
    replica = Replica(loop, costs.prefill, StepCost(costs.step, 0.0), 1e9)
    fabric = Fabric(loop)
    cost = costs.loads["nvme"]
    disk = fabric.add_route({fabric.add_link("loads", 1 / max(cost.per_page, 1e-9)): 1.0})
    waiting = deque([context] * conversations)
    ended: list[float] = []
    started = 0

    def turn() -> None:
        nonlocal started
        if started >= turns:
            return
        started += 1
        before = waiting.popleft()
        tokens = before + sessions.TURN_TOKENS
        cached = 0 if held == "none" else before // PAGE * PAGE
        job = Job(
            new=tokens - cached,
            cached=cached,
            output=ANSWER_TOKENS - 1,
            first_token=lambda: None,
            done=partial(done, tokens + ANSWER_TOKENS),
        )
        submit = partial(replica.submit, job)
        if held == "nvme":
            loop.after(cost.fixed, partial(fabric.send, disk, cached / PAGE, submit))
        else:
            submit()

    def done(tokens: int) -> None:
        ended.append(loop.now)
        waiting.append(tokens)
        turn()

    for _ in range(in_flight):
        turn()
    loop.run(1e7)
    return ended[-1] / turns

"""Feed millions of damaged inputs to every parser that reads external bytes."""

import time

from memkv_testbed.fuzz import TARGETS, fuzz
from memkv_testbed.fuzz_plans import PLAN_TARGETS
from rich.progress import track

from benchmarks.base import Options
from benchmarks.report import Report

INPUTS = 1_000_000
QUICK_INPUTS = 20_000


def run(options: Options) -> Report:
    """Damage `--rounds` inputs for each parser. Any exception that no parser may raise ends it."""
    inputs = options.rounds or (QUICK_INPUTS if options.quick else INPUTS)
    report = Report("fuzz", "thousand inputs per second")
    for target in track([*TARGETS, *PLAN_TARGETS], "fuzz"):
        began = time.perf_counter()
        # The date is the seed, so that each day tries other inputs but failures can be reproduced.
        outcome = fuzz(target, inputs, seed=int(time.time() // 86400))
        rate = outcome.inputs / (time.perf_counter() - began) / 1e3
        report.runs[target.name] = {"damaged": [rate]}
        name = target.name.lower().replace(" ", "_")
        report.figures[f"{name}_inputs"] = outcome.inputs
        report.figures[f"{name}_taken"] = outcome.taken
    report.figures["inputs"] = sum(
        value for name, value in report.figures.items() if name.endswith("_inputs")
    )
    report.figures["wrong_or_crashed"] = 0  # A failure would have raised an exception.
    return report

"""Measure what predictions of servers need: `python -m benchmarks.predictions.calibrate FILE`.

Prompts have at most `LENGTHS[-1]` tokens; the benchmarks that are predicted use longer ones.
"""

import statistics
import time
from pathlib import Path

import click
import msgspec
from memkv_testbed.demo.node import Node

from benchmarks.machine import machine
from benchmarks.serving import PAGE, Servers, prompt, tell
from memkv_sglang.planning.calibration import PrefillRow

LENGTHS = (4 * PAGE, 8 * PAGE, 16 * PAGE, 24 * PAGE)
QUESTION = 32
ROUNDS, LOADS = 4, 9
ANSWER_TOKENS = 16
GPU = "one core"


class LoadRow(msgspec.Struct, frozen=True):
    """Seconds to the first token of a prompt of which `pages` pages are in `tier`."""

    tier: str
    pages: int
    new: int
    seconds: float


class ServingNumbers(msgspec.Struct, frozen=True):
    """Measurements of one server of the benchmarks.

    Times to first token are the shortest of several, because other programs on the machine only add
    to them.
    """

    machine: dict[str, object]
    prefill: list[PrefillRow]
    loads: list[LoadRow]
    step_seconds: float
    """Seconds of a decode step: the median, because several tokens can arrive together."""


def measure(directory: Path) -> ServingNumbers:
    """Measure with two servers."""
    prefill: list[PrefillRow] = []
    loads: list[LoadRow] = []
    steps: list[float] = []
    with Servers(directory) as servers:
        one, other = servers.node("a"), servers.node("b")
        servers.wait()
        for length in LENGTHS:
            tell(f"{length} tokens")
            tokens = [prompt(f"calibrate {i} {length}", length + QUESTION) for i in range(ROUNDS)]
            computed = [_ask(one, each) for each in tokens]
            held = [_ask(one, tokens[-1]) for _ in range(LOADS)]
            steps += [step for _, step in [*computed, *held]]
            one.server.client.flush_cache()
            one.wait_for_spill(0)
            prefill.append(_row(length + QUESTION, 0, [first for first, _ in computed]))
            prefill.append(_row(QUESTION, length, [first for first, _ in held]))
            for tier, node in (("nvme", one), ("minio", other)):
                times = [_load(node, tokens[i % ROUNDS]) for i in range(LOADS)]
                loads.append(LoadRow(tier, length // PAGE, QUESTION, min(times)))
    return ServingNumbers(machine(), prefill, loads, statistics.median(steps))


def _row(new: int, cached: int, seconds: list[float]) -> PrefillRow:
    return PrefillRow(GPU, new, cached, min(seconds), "benchmarks.predictions")


def _ask(node: Node, tokens: list[int]) -> tuple[float, float]:
    """Return the seconds to the first token, and of each further one."""
    answer = node.server.client.generate(tokens, max_new_tokens=ANSWER_TOKENS)
    return answer.ttft_s, (answer.total_s - answer.ttft_s) / (ANSWER_TOKENS - 1)


def _load(node: Node, tokens: list[int]) -> float:
    node.server.client.flush_cache()
    return _ask(node, tokens)[0]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--directory", type=click.Path(path_type=Path), default=Path("/var/tmp"))
def main(file: Path, directory: Path) -> None:
    """Measure and write a JSON file."""
    began = time.monotonic()
    file.write_bytes(msgspec.json.format(msgspec.json.encode(measure(directory)), indent=1))
    tell(f"done after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

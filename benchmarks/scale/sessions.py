"""Sessions per GPU by model and context, with and without each tier."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import Panel, Report
from benchmarks.scale.cases import base, tell
from memkv_sglang.planning.scenario import Scenario
from memkv_sglang.planning.sizing import TIERS, first_token_bound, most_sessions, run_for
from memkv_sglang.planning.workload import Think

MODELS = ("llama-8b", "llama-70b", "qwen3-235b", "gpt-oss-120b")
"""Models with prefill times for H200 up to 256K tokens; DeepSeek's end at 32K."""
CONTEXTS = {"8K": 8192, "32K": 32_768, "128K": 131_072, "256K": 262_144}
QUICK_MODELS, QUICK_CONTEXTS = ("llama-70b",), ("32K", "128K")
THINK = Think(60.0, 99.0)
ALONE, ALL = "device memory only", "and MinIO"
BALANCED = "and MinIO, balanced"
"""With `engine.balance_loads`."""
HEADLINE = 43
FASTER = (1, 4)
"""Factors by which disks, networks and servers are faster than the headline's."""
ANSWERS, QUICK_ANSWERS = (216, 64, 16, 1), (216, 16)
"""Tokens per answer. Device memory holds a context until its answer is complete."""
REGION_CONTEXTS = ("32K", "128K", "256K")


def compare_sessions(report: Report, *, quick: bool) -> None:
    """Find the most sessions for each model, context and set of tiers."""
    models = QUICK_MODELS if quick else MODELS
    contexts = QUICK_CONTEXTS if quick else tuple(CONTEXTS)
    for model in models:
        for context in contexts:
            _compare(report, model, context)
        cases = {context: f"{model}, {context}" for context in contexts}
        report.panels.append(
            Panel(f"sessions per GPU, {model}", "sessions", cases, lines=True, log=True)
        )
    for model in models:
        for context in set(contexts) & set(REGION_CONTEXTS):
            explore(report, model, context, QUICK_ANSWERS if quick else ANSWERS)
    claim(report)


def claim(report: Report) -> None:
    """Add the figures, and the plot of the region where the headline is reached."""
    found = report.facts["sessions"]
    ratios = {case: _ratio(fact["found"], BALANCED) for case, fact in found.items()}
    best = max(ratios, key=ratios.__getitem__)
    report.figures |= {
        "scale_sessions_over_no_storage": ratios[best],
        "scale_sessions_over_no_storage_70b_128k": ratios.get("llama-70b, 128K", 0.0),
        "scale_sessions_nearest_tier_70b_128k": _ratio(
            found.get("llama-70b, 128K", {}).get("found", {}), ALL
        ),
    }
    reached = []
    for model, by_context in report.facts["region"].items():
        for context, by_factor in by_context.items():
            cases = {}
            for factor, by_answer in by_factor.items():
                for answer, ratio in by_answer.items():
                    case = cases[answer] = f"{model}, {context}, answers of {answer} tokens"
                    report.record(case, f"storage {factor} x", ratio)
                    if ratio >= HEADLINE:
                        reached.append(f"{case}, storage {factor} x")
            for case in cases.values():
                report.record(case, str(HEADLINE), HEADLINE)
            title = f"{model}, {context}: all tiers / device memory, by answer tokens"
            report.panels.append(Panel(title, "times", cases, lines=True, log=True))
    report.notes.append(
        f"{HEADLINE} times the sessions without storage: {'; '.join(reached) or 'in no case'}"
    )


def _ratio(found: Mapping[str, Mapping[str, Any]], tiers: str) -> float:
    if tiers not in found:
        return 0.0
    return float(found[tiers]["sessions"] / max(found[ALONE]["sessions"], 1))


def _scenario(model: str, name: str) -> Scenario:
    context = CONTEXTS[name]
    return base(model, context=context, think=THINK, run_pages=run_for(context, 720, 64), moves=0.0)


def _compare(report: Report, model: str, name: str) -> None:
    scenario = _scenario(model, name)
    bound = first_token_bound(scenario)
    case = f"{model}, {name}"
    sets = {**TIERS, BALANCED: {"balance_loads": True}}
    found = {
        tiers: most_sessions(scenario.replace(**changes), bound) for tiers, changes in sets.items()
    }
    for tiers, capacity in found.items():
        report.record(case, tiers, max(capacity.sessions, 0.5) / scenario.gpus)
    fact: dict[str, Any] = {
        "bound_s": bound,
        "found": {tiers: capacity._asdict() for tiers, capacity in found.items()},
    }
    report.facts.setdefault("sessions", {})[case] = fact
    tell(
        f"{case}: {_ratio(fact['found'], ALL):.1f} times, balanced "
        f"{_ratio(fact['found'], BALANCED):.1f}, limit: {found[BALANCED].bottleneck}"
    )


def explore(report: Report, model: str, name: str, answers: Sequence[int]) -> None:
    """Record the ratio for shorter answers, and for faster disks, networks and servers."""
    facts = report.facts.setdefault("region", {}).setdefault(model, {}).setdefault(name, {})
    for answer in answers:
        scenario = _scenario(model, name).replace(balance_loads=True, output_tokens=answer)
        bound = first_token_bound(scenario)
        alone = most_sessions(scenario.replace(**TIERS[ALONE]), bound).sessions
        for factor in FASTER:
            faster = scenario.replace(
                nvme_read=factor * scenario.nvme_read,
                nvme_write=factor * scenario.nvme_write,
                nic=factor * scenario.nic,
                agent_cores=factor * scenario.agent_cores,
                host_to_device=factor * scenario.host_to_device,
                servers=factor * scenario.servers,
            )
            found = most_sessions(faster, bound)
            ratio = found.sessions / max(alone, 1)
            facts.setdefault(str(factor), {})[str(answer)] = ratio
            tell(f"{model}, {name}, {answer}, {factor} x: {ratio:.1f} times, {found.bottleneck}")

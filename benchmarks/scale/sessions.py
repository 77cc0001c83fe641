"""Sessions per GPU by model and context, with and without each tier."""

from benchmarks.report import Panel, Report
from benchmarks.scale.cases import base, tell
from memkv_sglang.planning.sizing import TIERS, first_token_bound, most_sessions, run_for
from memkv_sglang.planning.workload import Think

MODELS = ("llama-8b", "llama-70b", "qwen3-235b", "gpt-oss-120b")
"""Models with prefill times for H200 up to 256K tokens; DeepSeek's end at 32K."""
CONTEXTS = {"8K": 8192, "32K": 32_768, "128K": 131_072, "256K": 262_144}
QUICK_MODELS, QUICK_CONTEXTS = ("llama-70b",), ("32K", "128K")
THINK = Think(60.0, 99.0)
ALONE, ALL = "device memory only", "and MinIO"
HEADLINE = 43


def compare_sessions(report: Report, *, quick: bool) -> None:
    """Find the most sessions for each model, context and set of tiers."""
    ratios: dict[str, float] = {}
    for model in QUICK_MODELS if quick else MODELS:
        for name in QUICK_CONTEXTS if quick else CONTEXTS:
            ratios[f"{model}, {name}"] = _compare(report, model, name)
    best = max(ratios, key=ratios.__getitem__)
    report.figures |= {
        "scale_sessions_over_no_storage": ratios[best],
        "scale_sessions_over_no_storage_70b_128k": ratios.get("llama-70b, 128K", 0.0),
    }
    reached = [case for case, ratio in ratios.items() if ratio >= HEADLINE]
    report.notes.append(
        f"{HEADLINE} times the sessions without storage: reached with {', '.join(reached)}"
        if reached
        else f"{HEADLINE} times the sessions without storage: in no case; most with {best}"
    )
    for model in QUICK_MODELS if quick else MODELS:
        cases = {name: f"{model}, {name}" for name in (QUICK_CONTEXTS if quick else CONTEXTS)}
        report.panels.append(
            Panel(f"sessions per GPU, {model}", "sessions", cases, lines=True, log=True)
        )
    report.runs["sessions over device memory only"] = {
        case: [ratio] for case, ratio in ratios.items()
    }
    report.panels.append(
        Panel(
            "sessions with all tiers, over device memory only",
            "times",
            {"": "sessions over device memory only"},
        )
    )


def _compare(report: Report, model: str, name: str) -> float:
    context = CONTEXTS[name]
    scenario = base(
        model, context=context, think=THINK, run_pages=run_for(context, 720, 64), moves=0.0
    )
    bound = first_token_bound(scenario)
    case = f"{model}, {name}"
    found = {
        tiers: most_sessions(scenario.replace(**without), bound) for tiers, without in TIERS.items()
    }
    for tiers, capacity in found.items():
        report.record(case, tiers, max(capacity.sessions, 0.5) / scenario.gpus)
    report.facts.setdefault("sessions", {})[case] = {
        "bound_s": bound,
        "found": {tiers: capacity._asdict() for tiers, capacity in found.items()},
    }
    ratio = found[ALL].sessions / max(found[ALONE].sessions, 1)
    tell(f"{case}: {ratio:.1f} times, limit: {found[ALL].bottleneck}")
    return ratio

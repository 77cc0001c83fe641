"""`memkv plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memkv_sglang.cli.output import human_size, human_time, make_console, make_progress, print_json
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.units import parse_size, parse_time

if TYPE_CHECKING:
    from rich.table import Table

    from memkv_sglang.planning.replay import Hits
    from memkv_sglang.planning.scenario import Scenario
    from memkv_sglang.planning.sizing import Plan
    from memkv_sglang.planning.traces import Trace

MOST_NODES, MOST_SESSIONS, MOST_TOKENS = 2_000, 1_000_000, 1 << 21
_QUIET_NODES = 16
"""With up to this many nodes, a plan takes seconds and needs no progress bar."""
_CURVE = (0.125, 0.25, 0.5, 1.0, 2.0)
"""The NVMe sizes at which a trace's hits are shown, relative to the given size."""


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return parse_size(value)
    except ValueError:
        raise click.BadParameter(f"{value[:60]!r} is not a size such as 2TiB") from None


def _time(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = parse_time(value)
    except ValueError:
        raise click.BadParameter(f"{value[:60]!r} is not a time such as 30s") from None
    if not 0 < seconds <= 86_400:
        raise click.BadParameter(f"{value[:60]!r} is out of range; use 1ms to 1d")
    return seconds


@click.command(short_help="Estimate what the tier gains, and what hardware it needs.")
@click.option(
    "--model",
    default="llama-70b",
    show_default=True,
    help="A model's name (memkv plan --model help lists them) or its config.json.",
)
@click.option("--gpu", default="h200", show_default=True, help="Kind of GPU: h200 or b200.")
@click.option(
    "--gpus",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Number of GPUs per node.",
)
@click.option("--nodes", type=click.IntRange(1, MOST_NODES), default=1, show_default=True)
@click.option(
    "--context",
    type=click.IntRange(1024, MOST_TOKENS),
    default=131_072,
    show_default=True,
    help="Number of tokens in a session's prompt.",
)
@click.option(
    "--new",
    "new_tokens",
    type=click.IntRange(1),
    default=720,
    show_default=True,
    help="Number of new tokens in a turn.",
)
@click.option(
    "--output",
    "output_tokens",
    type=click.IntRange(1),
    default=216,
    show_default=True,
    help="Number of tokens in an answer.",
)
@click.option(
    "--sessions",
    type=click.IntRange(1, MOST_SESSIONS),
    help="Number of concurrent sessions of all nodes. [default: 64 per node]",
)
@click.option(
    "--think",
    callback=_time,
    default="60s",
    show_default=True,
    help="Median time from an answer to the next turn. The mean is 1.65 times as long.",
)
@click.option(
    "--moves",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Share of turns that the router sends to another node.",
)
@click.option(
    "--servers",
    type=click.IntRange(0, 10_000),
    help="Number of storage servers. [default: 2 per node]",
)
@click.option(
    "--shards",
    is_flag=True,
    help="Each storage server is a shard of its own (`[[minio.shards]]`). [default: one cluster]",
)
@click.option(
    "--copies",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="Number of shards that store each page (`minio.replicas`).",
)
@click.option(
    "--balance-loads",
    is_flag=True,
    help="Load from NVMe and the servers at once (`engine.balance_loads`).",
)
@click.option("--nvme", callback=_size, help="Size of the NVMe disks per node. [default: 30.7 TB]")
@click.option("--minio", callback=_size, help="Size of the bucket.  [default: unlimited]")
@click.option("--host", callback=_size, help="Size of the host pool per node. [default: 1 TB]")
@click.option(
    "--nic",
    type=click.FloatRange(0.1, 10_000),
    help="Network throughput per node in Gb/s. [default: 800]",
)
@click.option(
    "--page-tokens",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Tokens per page, as in SGLang's `--page-size`.",
)
@click.option(
    "--first-token",
    callback=_time,
    help="Time to first token that 95 % of requests must not exceed. [default: 1.5 times computing "
    "the prompt on an idle server]",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Replay a trace instead of simulating sessions: Mooncake's, one of coding agents, or one "
    "that `[recorder]` wrote.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Measurements of your machine, from `memkv bench --calibration`.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, including all inputs.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw a picture (PNG or SVG).")
def plan(**options: Any) -> None:
    """Estimate by simulation what the tier gains for a model and traffic, and what it needs.

    Every number comes from a calibration file that names its source; see docs/planning.md. With
    `--trace`, the command shows how many pages of that traffic each tier would have served.
    """
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise click.ClickException(
            "memkv plan needs numpy; install it: pip install 'sglang-memkv[plan]'"
        ) from None
    _check_plot(options["plot"])
    if options["model"] == "help":
        _list_models()
    elif options["trace"] is not None:
        _plan_trace(options)
    else:
        _plan_cluster(options)


def _check_plot(file: Path | None) -> None:
    if file is None:
        return
    if file.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {file}: unknown format; give a name that ends in .png or .svg")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot {file}: its directory does not exist; create it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plot: needs matplotlib; install it: pip install 'sglang-memkv[plan]'"
        ) from None


def _list_models() -> None:
    from memkv_sglang.planning.calibration import published

    for name, model in published().models.items():
        gpus = ", ".join(sorted({row.gpu for row in model.prefill}))
        click.echo(f"{name}: {model.name}, {gpus}")


def _scenario(options: dict[str, Any]) -> "Scenario":
    from memkv_sglang.planning.calibration import MEASURED, measured, published
    from memkv_sglang.planning.config_json import read_config
    from memkv_sglang.planning.scenario import gpu_named, make_scenario, model_named
    from memkv_sglang.planning.sizing import run_for
    from memkv_sglang.planning.workload import Think

    numbers, nodes = published(), options["nodes"]
    gpu_named(numbers, options["gpu"])
    context, page_tokens = options["context"], options["page_tokens"]
    for name in ("new_tokens", "page_tokens"):
        if options[name] >= context:
            flag = "--new" if name == "new_tokens" else "--page-tokens"
            raise ConfigError(f"{flag} {options[name]}: not below --context {context}; lower it")
    file = Path(options["model"])
    model = (
        read_config(file, numbers, options["gpu"], options["gpus"])
        if file.suffix == ".json" or file.exists()
        else model_named(numbers, options["model"])
    )
    machine = measured(options["calibration"] or MEASURED)
    servers = options["servers"]
    if options["copies"] > 1 and not options["shards"]:
        raise ConfigError("--copies: only shards keep copies; add --shards")
    changes: dict[str, Any] = {
        "layout": "shards" if options["shards"] else "cluster",
        "copies": options["copies"],
        "balance_loads": options["balance_loads"],
        "sessions": options["sessions"] or 64 * nodes,
        "servers": 2 * nodes if servers is None else servers,
        "context": context,
        "new_tokens": options["new_tokens"],
        "output_tokens": options["output_tokens"],
        "think": Think(options["think"], 1.65 * options["think"]),
        "moves": options["moves"],
        "seed": options["seed"],
        "run_pages": run_for(context, options["new_tokens"], page_tokens),
    }
    sizes = {"nvme": "nvme_bytes", "minio": "shared_bytes", "host": "host_bytes"}
    changes |= {name: options[key] for key, name in sizes.items() if options[key] is not None}
    if options["nic"] is not None:
        changes["nic"] = options["nic"] / 8 * 1e9 * numbers.node.link_share.value
    if machine.disk and options["calibration"]:
        best = max(machine.disk, key=lambda row: row.load_bytes_per_s)
        changes |= {"nvme_read": best.load_bytes_per_s, "nvme_write": best.spill_bytes_per_s}
    return make_scenario(
        numbers,
        machine,
        model=model,
        gpu=options["gpu"],
        gpus=options["gpus"],
        nodes=nodes,
        page_tokens=page_tokens,
        changes=changes,
    )


def _plan_cluster(options: dict[str, Any]) -> None:
    from memkv_sglang.planning.sizing import REQUESTS, make_plan

    scenario = _scenario(options)
    rate = scenario.sessions / scenario.think.mean
    seconds = min(max(REQUESTS * min(scenario.nodes, 2) / rate, 60.0), 3600.0)
    scenario = scenario.replace(seconds=seconds, warm_up=seconds / 2)
    with make_progress() as progress:
        progress.disable = progress.disable or scenario.nodes <= _QUIET_NODES
        task = progress.add_task("plan", total=1.0)
        made = make_plan(
            scenario,
            bound=options["first_token"],
            tell=lambda share: progress.update(task, completed=share),
        )
    if options["plot"] is not None:
        from memkv_sglang.planning.plot import draw_plan

        draw_plan(made, options["plot"])
    if options["as_json"]:
        from memkv_sglang.planning.sizing import plan_document

        print_json(plan_document(made))
    else:
        make_console().print(_plan_table(made))


def _plan_table(made: "Plan") -> "Table":
    result, scenario = made.result, made.result.scenario
    layout = "a cluster" if scenario.layout == "cluster" else "shards"
    table = _two_columns()
    rows = {
        "model": f"{scenario.model} on {scenario.nodes} x {scenario.gpus} {scenario.gpu}",
        "traffic": f"{scenario.sessions} sessions of {scenario.context} tokens, thinking "
        f"{human_time(scenario.think.median)} (median)",
        "KV per token": human_size(made.bytes_per_token),
        "page; object": f"{human_size(made.page_bytes)}; {human_size(made.object_bytes)}",
        "KV of all sessions": human_size(made.live_bytes),
        "NVMe needed per node": human_size(made.nvme_bytes_per_node),
        "bucket: sessions and a day's uploads": human_size(made.bucket_bytes),
        "storage servers": f"{made.servers} in {layout} (limit: {made.server_limit})",
        "network per node": f"{made.node_gbit_s:.3g} Gb/s",
        "pages from": ", ".join(f"{name} {share:.1%}" for name, share in result.hits.items()),
        "first token, median; 95 %": f"{human_time(result.first_token_p50)}; "
        f"{human_time(result.first_token_p95)} (bound: {human_time(made.bound)})",
        "first bottleneck": f"{result.bottleneck}, {result.use[result.bottleneck]:.0%} used",
        "NVMe writes per day": f"{result.nvme_writes_per_day:.2g} of the drives' rating",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for name, sessions in made.sessions_per_gpu.items():
        table.add_row(f"sessions per GPU, {name}", f"{sessions:.3g} ({made.bottlenecks[name]})")
    return table


def _two_columns() -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("what")
    table.add_column("value")
    return table


def _plan_trace(options: dict[str, Any]) -> None:
    from memkv_sglang.planning.replay import recorded_hits
    from memkv_sglang.planning.traces import read_trace

    scenario = _scenario(options)
    trace = read_trace(options["trace"], page_tokens=options["page_tokens"])
    page = trace.page_tokens * scenario.kv_bytes_per_token
    with make_progress() as progress:
        task = progress.add_task("replay", total=len(_CURVE))
        curve = {}
        for share in _CURVE:
            curve[share * scenario.nvme_bytes] = _replay(trace, scenario, page, share)
            progress.advance(task)
    found = curve[scenario.nvme_bytes]
    document = {
        "trace": trace.name,
        "requests": len(trace.requests),
        "page_tokens": trace.page_tokens,
        "pages_asked": found.asked,
        "host_bytes": scenario.host_bytes if options["host"] else 0,
        "nvme_bytes_per_node": scenario.nvme_bytes,
        "bucket_bytes": scenario.shared_bytes if options["minio"] else None,
        "nodes": scenario.nodes,
        "model": scenario.model,
        "hits": {
            "host": found.host / max(found.asked, 1),
            "nvme": found.nvme / max(found.asked, 1),
            "minio": found.minio / max(found.asked, 1),
        },
        "ideal_hits": found.ideal / max(found.asked, 1),
        "recorded_hits": recorded_hits(trace.requests),
        "nvme_written_bytes": found.written * page,
        "nvme_hits_by_size": {
            str(round(size)): hits.nvme / max(hits.asked, 1) for size, hits in curve.items()
        },
    }
    if options["plot"] is not None:
        from memkv_sglang.planning.plot import draw_curve

        draw_curve(curve, options["plot"])
    if options["as_json"]:
        print_json(document)
    else:
        make_console().print(_trace_table(document, found))


def _replay(trace: "Trace", scenario: "Scenario", page: float, share: float) -> "Hits":
    from memkv_sglang.planning.replay import Tiers, replay, run_of

    tiers = Tiers(
        host=int(scenario.host_bytes / page) if trace.name != "recorder" else 0,
        nvme=int(share * scenario.nvme_bytes / page),
        minio=scenario.shared_bytes / page,
    )
    return replay(trace, tiers, nodes=scenario.nodes, run=run_of(trace))


def _trace_table(document: dict[str, Any], found: "Hits") -> "Table":
    table = _two_columns()
    bucket = document["bucket_bytes"]
    table.add_row("trace", f"{document['trace']}, {document['requests']} requests")
    table.add_row(
        "tiers",
        f"{document['nodes']} x {human_size(document['nvme_bytes_per_node'])} of NVMe, "
        f"{human_size(bucket) if bucket else 'unlimited'} MinIO",
    )
    for tier, share in document["hits"].items():
        table.add_row(f"hits, {tier}", f"{share:.1%}")
    table.add_row("hits with unlimited space", f"{document['ideal_hits']:.1%}")
    if document["recorded_hits"] is not None:
        recorded = document["recorded_hits"] / max(found.asked, 1)
        table.add_row("hits when the trace was recorded", f"{recorded:.1%}")
    table.add_row("written to NVMe", human_size(document["nvme_written_bytes"]))
    for size, share in document["nvme_hits_by_size"].items():
        table.add_row(f"NVMe hits with {human_size(float(size))}", f"{share:.1%}")
    return table

"""Generate the Grafana dashboards: `python tools/dashboards.py` writes deploy/grafana/*.json."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "deploy" / "grafana"

SOURCE = {"type": "prometheus", "uid": "${source}"}

LINK = {
    "title": "memkv",
    "type": "dashboards",
    "tags": ["memkv"],
    "asDropdown": False,
    "icon": "external link",
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "tooltip": "",
}
"""From each dashboard to the other, with all fields that Grafana's schema requires."""

WIDTH, HEIGHT = 24, 8
"""Number of columns in Grafana's grid, and the height of a panel with a time axis."""

STAT_HEIGHT = 4


class Query(NamedTuple):
    """A PromQL query, and the legend of its series."""

    expression: str
    legend: str = ""


class Panel(NamedTuple):
    """One panel. `unit` is Grafana's name of a unit."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    help: str = ""
    stack: bool = False
    top: float | None = None
    """Fixed upper limit of the axis."""
    warn_above: float | None = None
    width: int = 8


class Row(NamedTuple):
    """A headline and the panels below it."""

    title: str
    panels: Sequence[Panel]


def hit_rate(window: str, scope: str) -> str:
    """Return the query for the share of pages that lookups found."""
    found = f'sum(increase(memkv_lookup_pages_total{{{scope}, found="yes"}}[{window}]))'
    return f"{found} / sum(increase(memkv_lookup_pages_total{{{scope}}}[{window}]))"


def quantile(share: float, operation: str, scope: str) -> str:
    """Return the query for a quantile of the duration of a tier's calls."""
    buckets = f'memkv_call_duration_seconds_bucket{{{scope}, operation="{operation}"}}'
    return f"histogram_quantile({share}, sum by (tier, le) (rate({buckets}[$__rate_interval])))"


def rate(metric: str, scope: str, labels: str = "", by: str = "tier") -> str:
    """Return the query for a counter's rate, summed by a label."""
    selector = ", ".join(filter(None, (scope, labels)))
    return f"sum by ({by}) (rate({metric}{{{selector}}}[$__rate_interval]))"


def savings(scope: str) -> Row:
    """Return the panels that show what the tiers save."""
    seconds = f"sum(increase(memkv_saved_prefill_seconds_total{{{scope}}}[$__range]))"
    tokens = f"sum(increase(memkv_saved_prefill_tokens_total{{{scope}}}[$__range]))"
    asked = f"sum(increase(memkv_lookup_pages_total{{{scope}}}[$__range]))"
    return Row(
        "Savings",
        [
            Panel(
                "Prefill time saved",
                [Query(seconds)],
                "s",
                "stat",
                "Time that servers would have needed to compute what they loaded",
                width=6,
            ),
            Panel("Tokens not computed", [Query(tokens)], "short", "stat", width=6),
            Panel(
                "Pages found by lookups",
                [Query(hit_rate("$__range", scope))],
                "percentunit",
                "stat",
                width=6,
            ),
            Panel("Pages looked up", [Query(asked)], "short", "stat", width=6),
            Panel(
                "Prefill saved, seconds per second",
                [Query(rate("memkv_saved_prefill_seconds_total", scope), "{{tier}}")],
                "short",
                help="Number of servers that would be busy computing what is loaded",
                stack=True,
            ),
            Panel(
                "Pages found by lookups",
                [Query(hit_rate("$__rate_interval", scope), "found")],
                "percentunit",
                top=1,
            ),
            Panel(
                "Pages found but recomputed, because that is faster",
                [
                    Query(
                        f"sum(rate(memkv_skipped_slow_pages_total{{{scope}}}[$__rate_interval]))",
                        "pages per second",
                    )
                ],
            ),
        ],
    )


def traffic(scope: str) -> Row:
    """Return the panels for throughput and latency of the tiers."""
    return Row(
        "Traffic",
        [
            Panel(
                "Loaded",
                [Query(rate("memkv_bytes_total", scope, 'operation="load"'), "{{tier}}")],
                "Bps",
                stack=True,
            ),
            Panel(
                "Load calls, median and 99th percentile",
                [
                    Query(quantile(0.5, "load", scope), "{{tier}} median"),
                    Query(quantile(0.99, "load", scope), "{{tier}} 99 %"),
                ],
                "s",
            ),
            Panel(
                "Lookup calls, median and 99th percentile",
                [
                    Query(quantile(0.5, "lookup", scope), "{{tier}} median"),
                    Query(quantile(0.99, "lookup", scope), "{{tier}} 99 %"),
                ],
                "s",
            ),
            Panel(
                "Stored",
                [Query(rate("memkv_bytes_total", scope, 'operation="spill"'), "{{tier}}")],
                "Bps",
                stack=True,
            ),
            Panel(
                "Pages that could not be loaded or stored",
                [
                    Query(
                        rate(
                            "memkv_pages_total",
                            scope,
                            'result=~"corrupt|failed|refused"',
                            by="tier, operation, result",
                        ),
                        "{{tier}} {{operation}} {{result}}",
                    )
                ],
            ),
            Panel(
                "Incomplete lookups",
                [
                    Query(
                        f"sum(rate(memkv_incomplete_lookups_total{{{scope}}}[$__rate_interval]))",
                        "per second",
                    )
                ],
                help="Time ran out or a tier failed",
            ),
        ],
    )


def fleet() -> dict[str, Any]:
    """Return the dashboard for all nodes of a job."""
    scope = 'job=~"$job"'
    queue = (
        f"memkv_upload_queue_bytes{{{scope}}} / (memkv_upload_queue_capacity_bytes{{{scope}}} > 0)"
    )
    opened = f'memkv_breaker_state{{{scope}, memkv_breaker_state!="closed"}}'
    full = f"memkv_tier_bytes{{{scope}}} / memkv_tier_capacity_bytes{{{scope}}}"
    last = f"max(max_over_time(memkv_collection_last_success_timestamp_seconds{{{scope}}}[1d]))"
    health = Row(
        "Health",
        [
            Panel(
                "Agents",
                [Query(f"count(memkv_build_info{{{scope}}})", "agents")],
                kind="stat",
                width=6,
            ),
            Panel(
                "Tiers that do not work",
                [Query(f"count(memkv_tier_works{{{scope}}} == 0) or vector(0)")],
                kind="stat",
                warn_above=0,
                width=6,
            ),
            Panel(
                "Open circuits",
                [Query(f"sum({opened})")],
                kind="stat",
                warn_above=0,
                width=6,
            ),
            Panel(
                "Alerts firing",
                [Query('count(ALERTS{alertname=~"Memkv.*", alertstate="firing"}) or vector(0)')],
                kind="stat",
                warn_above=0,
                width=6,
            ),
            Panel(
                "Upload queue, fullest nodes",
                [Query(f"topk(5, {queue})", "{{instance}}")],
                "percentunit",
                top=1,
            ),
            Panel(
                "Oldest page waiting for upload",
                [Query(f"topk(5, memkv_upload_queue_age_seconds{{{scope}}})", "{{instance}}")],
                "s",
            ),
            Panel(
                "Pages dropped from upload queues",
                [Query(rate("memkv_upload_dropped_pages_total", scope, by="reason"), "{{reason}}")],
            ),
        ],
    )
    space = Row(
        "Space",
        [
            Panel(
                "Disks, fullest nodes",
                [Query(f"topk(5, {full})", "{{instance}}")],
                "percentunit",
                top=1,
                width=6,
            ),
            Panel(
                "Evicted from disks",
                [
                    Query(
                        rate("memkv_tier_evicted_pages_total", scope, 'tier="nvme"'),
                        "pages per second",
                    )
                ],
                width=6,
            ),
            Panel(
                "Deleted from the bucket",
                [
                    Query(
                        f"sum(rate(memkv_collected_bytes_total{{{scope}}}[$__rate_interval]))",
                        "bytes per second",
                    )
                ],
                "Bps",
                width=6,
            ),
            Panel(
                "Time since the last collection of the bucket",
                [Query(f"(time() - {last}) and ({last} > 0)", "any node")],
                "s",
                width=6,
                help="Empty if no limit is set (collector.capacity, collector.max_age)",
            ),
        ],
    )
    return dashboard("memkv fleet", "memkv-fleet", [savings(scope), health, traffic(scope), space])


def node() -> dict[str, Any]:
    """Return the dashboard for one node."""
    scope = 'job=~"$job", instance="$instance"'
    opened = f'memkv_breaker_state{{{scope}, memkv_breaker_state!="closed"}}'
    health = Row(
        "Health",
        [
            Panel(
                "Tiers: 1 works, 0 does not",
                [Query(f"memkv_tier_works{{{scope}}}", "{{tier}}")],
                top=1,
            ),
            Panel(
                "Circuit breaker: 1 open or half open, 0 closed",
                [Query(f"sum by (tier) ({opened})", "{{tier}}")],
                top=1,
            ),
            Panel(
                "Events inside tiers, per second",
                [Query(rate("memkv_tier_events_total", scope, by="tier, event"), "{{event}}")],
                help="Empty before the first event",
            ),
            Panel(
                "Upload queue",
                [
                    Query(f"memkv_upload_queue_bytes{{{scope}}}", "waiting"),
                    Query(f"memkv_upload_deferred_bytes{{{scope}}}", "deferred"),
                    Query(f"memkv_upload_queue_capacity_bytes{{{scope}}}", "limit"),
                ],
                "bytes",
            ),
            Panel(
                "Oldest page waiting for upload",
                [Query(f"memkv_upload_queue_age_seconds{{{scope}}}", "age")],
                "s",
            ),
            Panel(
                "Dropped uploads and promotions not stored",
                [
                    Query(
                        rate("memkv_upload_dropped_pages_total", scope, by="reason"),
                        "upload: {{reason}}",
                    ),
                    Query(
                        rate(
                            "memkv_promotion_pages_total",
                            scope,
                            'result!~"stored|present"',
                            by="result",
                        ),
                        "promotion: {{result}}",
                    ),
                ],
            ),
        ],
    )
    process = Row(
        "Disk and process",
        [
            Panel(
                "Disk",
                [
                    Query(f'memkv_tier_bytes{{{scope}, tier="nvme"}}', "used"),
                    Query(f'memkv_tier_capacity_bytes{{{scope}, tier="nvme"}}', "capacity"),
                ],
                "bytes",
            ),
            Panel(
                "Pages stored in and evicted from the disk, per second",
                [
                    Query(
                        rate(
                            "memkv_pages_total",
                            scope,
                            'tier="nvme", operation="spill", result="stored"',
                            by="result",
                        ),
                        "spilled",
                    ),
                    Query(
                        rate("memkv_promotion_pages_total", scope, 'result="stored"', by="result"),
                        "copied from MinIO",
                    ),
                    Query(rate("memkv_tier_evicted_pages_total", scope, 'tier="nvme"'), "evicted"),
                ],
            ),
            Panel(
                "Pages copied from an equal load",
                [
                    Query(
                        f"sum(rate(memkv_merged_pages_total{{{scope}}}[$__rate_interval]))",
                        "pages per second",
                    )
                ],
            ),
            Panel(
                "Agent's CPU, cores",
                [Query(f"rate(process_cpu_seconds_total{{{scope}}}[$__rate_interval])", "cores")],
            ),
            Panel(
                "Agent's memory, with mapped host pools",
                [Query(f"process_resident_memory_bytes{{{scope}}}", "resident")],
                "bytes",
            ),
            Panel(
                "Agent's open files",
                [
                    Query(f"process_open_fds{{{scope}}}", "open"),
                ],
            ),
        ],
    )
    rows = [savings(scope), health, traffic(scope), process]
    return dashboard("memkv node", "memkv-node", rows, per_node=True)


def dashboard(
    title: str, uid: str, rows: Sequence[Row], *, per_node: bool = False
) -> dict[str, Any]:
    """Return a dashboard in Grafana's JSON model."""
    variables = [
        {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"},
        _variable("job", "Job", "label_values(memkv_build_info, job)", several=True),
    ]
    if per_node:
        query = 'label_values(memkv_build_info{job=~"$job"}, instance)'
        variables.append(_variable("instance", "Node", query, several=False))
    return {
        "title": title,
        "uid": uid,
        "tags": ["memkv"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": variables},
        "links": [LINK],
        "panels": list(_layout(rows)),
    }


def _variable(name: str, label: str, query: str, *, several: bool) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "includeAll": several,
        "multi": several,
        **({"current": {"text": "All", "value": "$__all"}, "allValue": ".+"} if several else {}),
    }


def _layout(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    number, top = 1, 0
    for row in rows:
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
        }
        number, top, left, height = number + 1, top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                top, left = top + height, 0
            height = STAT_HEIGHT if panel.kind == "stat" else HEIGHT
            place = {"x": left, "y": top, "w": panel.width, "h": height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            number, left = number + 1, left + panel.width
        top += height


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.top is not None:
        defaults["max"] = panel.top
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.warn_above is not None:
        steps.append({"color": "red", "value": panel.warn_above + 1})
    defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    is_stat = panel.kind == "stat"
    if not is_stat:
        defaults["custom"] = {
            "fillOpacity": 30 if panel.stack else 5,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stack else "none"},
        }
    options: dict[str, Any] = (
        {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "none"}
        if is_stat
        else {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    )
    return {
        "title": panel.title,
        "description": panel.help,
        "type": panel.kind,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend or "__auto",
                "instant": is_stat,
                "range": not is_stat,
            }
            for i, query in enumerate(panel.queries)
        ],
    }


def text(board: dict[str, Any]) -> str:
    """Return the content of a dashboard's file."""
    return json.dumps(board, indent=2) + "\n"


BOARDS = {"fleet.json": fleet, "node.json": node}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, make in BOARDS.items():
        (FOLDER / name).write_text(text(make()))

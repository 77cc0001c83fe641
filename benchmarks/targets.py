"""Targets for the figures on a 2-core machine."""

import enum
import operator
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Comparison(enum.Enum):
    """How a figure that meets its target compares to it."""

    AT_LEAST = "at least"
    AT_MOST = "at most"
    UNDER = "under"


_MET = {
    Comparison.AT_LEAST: operator.ge,
    Comparison.AT_MOST: operator.le,
    Comparison.UNDER: operator.lt,
}


class Target(NamedTuple):
    """A figure and its target."""

    key: str
    what: str
    comparison: Comparison
    value: float
    bound: str = ""
    """Key of the figure that is the physical limit. If that is lower, it replaces the target."""

    def within(self, figures: Mapping[str, float]) -> "Target":
        """Return the target, or the physical limit if that is lower."""
        return self._replace(value=min(self.value, figures.get(self.bound, self.value)))

    def met(self, measured: float) -> bool:
        """Return whether the figure meets the target."""
        return bool(_MET[self.comparison](measured, self.value))


_LEAST, _MOST, _UNDER = Comparison

TARGETS = (
    Target("nvme_load_over_fio_256k", "load / fio read", _LEAST, 0.9),
    Target("nvme_load_over_fio_1m", "load / fio read", _LEAST, 0.95),
    Target("nvme_load_over_fio_4m", "load / fio read", _LEAST, 0.95),
    Target("nvme_load_over_nixl_1m", "load / SGLang nixl", _LEAST, 1.0),
    Target("nvme_load_over_nixl_4m", "load / SGLang nixl", _LEAST, 1.0),
    Target("nvme_load_over_file_1m", "load / SGLang file, both cold", _LEAST, 3),
    Target("nvme_spill_over_fio_1m", "spill / fio write", _LEAST, 0.9),
    Target("nvme_spill_over_fio_4m", "spill / fio write", _LEAST, 0.9),
    Target("minio_load_over_wrk_1m", "load / wrk", _LEAST, 1.1),
    Target("minio_load_over_wrk_4m", "load / wrk", _LEAST, 1.25),
    Target("minio_load_over_wrk_16m", "load / wrk", _LEAST, 1.2),
    Target("minio_load_over_seaweedfs_256k", "load / SGLang seaweedfs", _LEAST, 4),
    Target("minio_load_over_seaweedfs_1m", "load / SGLang seaweedfs", _LEAST, 3),
    Target("minio_load_over_seaweedfs_8m", "load / SGLang seaweedfs", _LEAST, 1.7),
    Target("minio_cpu_per_gb_over_seaweedfs_1m", "client CPU per GB / seaweedfs", _MOST, 0.4),
    Target("minio_spill_over_seaweedfs_1m", "spill / SGLang seaweedfs", _LEAST, 1.4),
    Target("minio_spill_over_seaweedfs_8m", "spill / SGLang seaweedfs", _LEAST, 1.3),
    Target("spill_visible_over_direct_put", "spill until another node sees it", _MOST, 1.2),
    Target("lookup_minio_2048_cold_over_seaweedfs", "time, cold presence cache", _MOST, 1 / 300),
    Target("lookup_minio_2048_warm_ms", "time, warm presence cache", _UNDER, 2),
    Target("lookup_nvme_2048_ms", "time, index in memory", _UNDER, 0.5),
    Target("lookup_miss_round_trips", "nothing present", _MOST, 1),
    Target("lookup_repeated_miss_round_trips", "nothing present, again", _MOST, 0),
    Target("scheduler_speed_kept_nvme", "loop under load / alone", _LEAST, 0.95),
    Target("scheduler_speed_kept_minio", "loop under load / alone", _LEAST, 0.95),
    Target("ttft_minio_over_recompute_16k", "other node's pages / recompute", _MOST, 1 / 40),
    Target("ttft_minio_over_seaweedfs_16k", "other node's pages / seaweedfs", _MOST, 1 / 4),
    Target(
        "ttft_minio_over_documented_seaweedfs_16k",
        "the same / seaweedfs with the pages its documentation says to start with",
        _MOST,
        1 / 3,
    ),
    Target("ttft_minio_minus_top_tier_ms_16k", "cost of the tier", _UNDER, 120),
    Target(
        "sessions_over_no_storage",
        "within the first-token bound",
        _LEAST,
        43,
        bound="sessions_bound_over_no_storage",
    ),
    Target("trace_hits_over_ideal", "capacity for all pages", _LEAST, 0.97),
    Target("trace_hits_over_best_online", "best of LRU, S3-FIFO, LRU-2", _LEAST, 1.0),
    Target("trace_nvme_bytes_over_write_everything", "written / no admission", _MOST, 0.7),
    Target("agent_calls_per_core_second", "no-op tiers", _LEAST, 8000),
    Target("index_bytes_per_page", "NVMe index", _UNDER, 250),
    Target("agent_idle_cpu_percent", "no calls", _UNDER, 0.5),
    *(
        Target(f"node_{key}_{size}", what, comparison, value)
        for key, what, comparison, values in (
            ("load_8_over_1", "eight callers / one", _LEAST, (1.0, 1.0, 1.0)),
            ("load_cpu_8_over_1", "CPU per GB, eight / one", _MOST, (1.1, 1.1, 1.1)),
            ("load_over_floor", "CPU per GB / a C program", _MOST, (None, 1.5, 1.25)),
            ("load_slowest_over_mean", "slowest of eight calls / mean", _MOST, (1.5, 1.5, 1.5)),
            ("lock_ms_per_gb", "GIL held, eight callers", _MOST, (40, 10, 3)),
            ("upload_8_over_1", "uploads, eight callers / one", _LEAST, (1.0, 1.0, 1.0)),
            ("upload_lock_ms_per_gb", "GIL held, uploads", _MOST, (None, 15, None)),
            ("ceiling_gb_s", "derived for 112 cores", _LEAST, (None, 60, 97)),
            ("load_over_wrk_8", "MinIO, eight callers / wrk", _LEAST, (1.0, 1.0, 1.0)),
            ("tls_over_plain", "https / http, eight callers", _LEAST, (0.8, 0.8, 0.8)),
            ("encrypted_over_plain", "encrypted / plain", _LEAST, (0.6, 0.6, 0.6)),
        )
        for size, value in zip(("256k", "1m", "4m"), values, strict=True)
        if value is not None
    ),
)


def show_targets(figures: Mapping[str, float]) -> None:
    """Print every target with its measurement, and mark those that are missed."""
    table = Table(title="targets", title_justify="left")
    table.add_column("key", no_wrap=True)
    table.add_column("what")
    for column in ("target", "measured"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for target in (target.within(figures) for target in TARGETS):
        bound = f"{target.comparison.value} {target.value:.3g}"
        if target.key not in figures:
            table.add_row(target.key, target.what, bound, "", "[yellow]not measured[/]")
            continue
        measured = figures[target.key]
        verdict = "[green]met[/]" if target.met(measured) else "[bold red]MISSED[/]"
        table.add_row(target.key, target.what, bound, f"{measured:.3g}", verdict)
    Console().print(table)

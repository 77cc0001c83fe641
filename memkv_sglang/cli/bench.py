"""`memkv bench`."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click
from typing_extensions import override

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import human_size, human_time, make_console, make_progress, print_json
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import KIB, MIB
from memkv_sglang.config.units import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from memkv_sglang.cli.measure import Measurement

MAX_PAGE = 64 * MIB
MAX_VOLUME = 1 << 40
BLOCK = 4 * KIB


class Size(click.ParamType[int]):
    """A size such as `1MiB`, within bounds."""

    name = "size"

    @override
    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            size = parse_size(value)
        except ValueError:
            self.fail(f"{value!r} is not a size such as 1MiB", param, ctx)
        if size < BLOCK:
            self.fail(f"{value!r} is less than {human_size(BLOCK)}", param, ctx)
        if size > MAX_VOLUME:
            self.fail(f"{value!r} is more than {human_size(MAX_VOLUME)}", param, ctx)
        return size


@click.command(
    cls=SettingsCommand,
    shown=("nvme", "minio"),
    short_help="Benchmark this node's tiers by page size.",
)
@click.option(
    "--page",
    "pages",
    type=Size(),
    multiple=True,
    default=("256KiB", "1MiB", "4MiB"),
    metavar="SIZE",
    help="Page size. May be repeated.  [default: 256KiB, 1MiB, 4MiB]",
)
@click.option(
    "--volume",
    type=Size(),
    default="256MiB",
    metavar="SIZE",
    help="Bytes to spill and load per page size. [default: 256MiB]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the results to a TOML file for `memkv plan --calibration`.",
)
def bench(
    loaded: LoadedConfig,
    pages: tuple[int, ...],
    volume: int,
    as_json: bool,
    calibration: Path | None,
) -> None:
    """Measure throughput and latency of this node's tiers by page size.

    The benchmark uses a temporary directory and prefix, next to those of the cache, and removes
    them afterwards. An agent may be running, but its traffic affects the results.
    """
    from memkv_sglang.cli.measure import measure

    check_environment(loaded)
    if calibration is not None:
        _require_planning(calibration)
    for page in pages:
        if page > min(volume, MAX_PAGE):
            limit = human_size(min(volume, MAX_PAGE))
            raise ConfigError(f"--page: {human_size(page)} is more than {limit}; use less")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also clean up after SIGTERM
    with make_progress() as progress:
        results = measure(loaded.config, pages, volume, progress)
    if calibration is not None:
        _write_calibration(results, calibration)
    if as_json:
        print_json([result._asdict() for result in results])
    else:
        make_console().print(_table(results))


def _require_planning(file: Path) -> None:
    """Raise before the measurement if its results could not be written."""
    try:
        import memkv_sglang.planning.calibration_file  # noqa: F401
    except ImportError:
        raise click.ClickException(
            "--calibration needs numpy; install it: pip install 'sglang-memkv[plan]'"
        ) from None
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--calibration {file}: its directory does not exist; create it first")


def _write_calibration(results: list["Measurement"], file: Path) -> None:
    from memkv_sglang.planning.calibration_file import TierSpeed, write_calibration

    speeds = [
        TierSpeed(
            result.tier,
            result.page_bytes,
            result.load_gb_s * 1e9,
            result.spill_gb_s * 1e9,
            result.load_cpu_s_per_gb,
        )
        for result in results
    ]
    write_calibration(speeds, file)


def _table(results: list["Measurement"]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tier")
    for title in ("page", "spill GB/s", "load GB/s", "load p50", "load p99"):
        table.add_column(title, justify="right")
    for result in results:
        table.add_row(
            result.tier,
            human_size(result.page_bytes),
            f"{result.spill_gb_s:.2f}",
            f"{result.load_gb_s:.2f}",
            human_time(result.load_p50_s),
            human_time(result.load_p99_s),
        )
    return table

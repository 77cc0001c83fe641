"""`memkv patch`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from memkv_sglang.cli.output import print_line
from memkv_sglang.patching.change import apply_series, revert_series
from memkv_sglang.patching.errors import PatchError
from memkv_sglang.patching.installation import find_sglang
from memkv_sglang.patching.series import Series, read_series, series_folder
from memkv_sglang.patching.state import State, overall, read_states

Command = Callable[..., Any]


class Refusal(click.ClickException):
    """A command failed. The message is one line."""


@click.group(short_help="Make `memkv` one of SGLang's own storage backends, without the plugin.")
def patch() -> None:
    """Make `memkv` one of SGLang's own storage backends.

    Use these commands if you prefer not to use the plugin. `apply` checks every file, then changes
    the installed SGLang in place; `revert` undoes it. Stop SGLang's servers first.
    """


def _site_packages(command: Command) -> Command:
    return click.option(
        "--site-packages",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="Directory that contains the package sglang.  [default: this Python's]",
    )(command)


@patch.command()
@_site_packages
def status(site_packages: Path | None) -> int:
    """Show whether SGLang is patched.

    The exit status is 1 if it is only partly patched, or changed in another way.
    """
    root, series = _find(site_packages)
    states = read_states(root, series)
    state = overall(states)
    print_line(f"SGLang {series.version} in {root}: {state.value}")
    for path, file_state in states.items():
        print_line(f"  {file_state.value:<8}  {path}")
    return 0 if state in (State.ORIGINAL, State.PATCHED) else 1


@patch.command()
@_site_packages
def apply(site_packages: Path | None) -> None:
    """Patch SGLang. Changes all files or none."""
    root, series = _find(site_packages)
    changed = _attempt(apply_series, root, series)
    print_line(_report(root, series, changed, "patched"))
    if changed:
        print_line("Start servers with --enable-memkv or --hicache-storage-backend memkv.")


@patch.command()
@_site_packages
def revert(site_packages: Path | None) -> None:
    """Restore SGLang's original files, byte for byte."""
    root, series = _find(site_packages)
    changed = _attempt(revert_series, root, series)
    print_line(_report(root, series, changed, "not patched"))


def _find(site_packages: Path | None) -> tuple[Path, Series]:
    try:
        installation = find_sglang(site_packages)
        return installation.root, read_series(series_folder(), installation.version)
    except PatchError as error:
        raise Refusal(str(error)) from None


def _attempt(change: Callable[[Path, Series], int], root: Path, series: Series) -> int:
    try:
        return change(root, series)
    except PatchError as error:
        raise Refusal(str(error)) from None


def _report(root: Path, series: Series, changed: int, state: str) -> str:
    how = f"{changed} files changed" if changed else "nothing to do"
    return f"SGLang {series.version} in {root}: {state} ({how})"

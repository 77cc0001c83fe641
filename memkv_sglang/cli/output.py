"""Print the output of commands. `rich` is imported only when needed, because that is slow.

All text passes through `memkv_sglang.printable` and is never interpreted as markup.
"""

import math
import os
import time
from typing import TYPE_CHECKING, Any

import click

from memkv_sglang.printable import LINE_LIMIT, json_text, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.text import Text

_PIPED_WIDTH = 120


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console. If the output is not a terminal, it has no colors and 120 columns."""
    from rich.console import Console

    class PrintableConsole(Console):
        """A console that escapes unprintable characters in all strings, including table cells."""

        def render_str(self, text: str, **options: Any) -> "Text":
            return super().render_str(printable(text), **options)

    console = PrintableConsole(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def make_progress() -> "Progress":
    """Return a progress bar on stderr, which shows nothing if stderr is not a terminal."""
    from rich.progress import Progress

    console = make_console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


NOTICE_SECONDS = 30.0
"""Seconds after which an operation that waits for another node says so on stderr."""


class PhaseProgress:
    """Shows a progress bar for each phase of a long operation, which may have a time limit."""

    def __init__(self, progress: "Progress", timeout: float | None = None) -> None:
        """Show the phases in `progress`; end the operation after `timeout` seconds."""
        self._progress = progress
        self._timeout = math.inf if timeout is None else timeout
        self._began = self._phase_began = time.monotonic()
        self._phase = ""
        self._noticed = False
        self._tasks: dict[str, TaskID] = {}

    def step(self, what: str, done: int, total: int | None) -> None:
        """Show how much of the phase named `what` is done.

        Raises `click.ClickException` once the time is over.
        """
        now = time.monotonic()
        if now - self._began > self._timeout:
            raise click.ClickException(
                f"not done after {human_time(self._timeout)} ({what}); run it again to continue"
            )
        if what != self._phase:
            self._phase, self._phase_began, self._noticed = what, now, False
        if what.startswith("waiting") and now - self._phase_began > NOTICE_SECONDS:
            self._notice(what)
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)

    def _notice(self, what: str) -> None:
        """Say once what the operation waits for, unless a progress bar shows it."""
        if self._progress.disable and not self._noticed:
            print_line(f"note: {what}", err=True)
        self._noticed = True


def print_line(line: str, *, err: bool = False) -> None:
    """Print one line, with unprintable characters escaped."""
    click.echo(printable(line, LINE_LIMIT), err=err)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json_text(value))


def human_date(moment: float) -> str:
    """Format a Unix time as date, hour and minute."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (OverflowError, ValueError, OSError):
        return "never" if moment > 0 else "long ago"


def human_size(size: float) -> str:
    """Format bytes with about three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


def human_time(seconds: float) -> str:
    """Format seconds with about three digits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"

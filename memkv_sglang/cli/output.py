"""Print for all commands. `rich` is imported late: it takes longer than the rest together.

Text is printed as it is, never as markup, and always through `memkv_sglang.printable`.
"""

import os
import time
from typing import TYPE_CHECKING, Any

import click

from memkv_sglang.printable import LINE_LIMIT, json_text, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

_PIPED_WIDTH = 120


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console; into a pipe it writes without colours, 120 columns wide."""
    from rich.console import Console

    class PrintableConsole(Console):
        """Makes every string printable, cells of tables included."""

        def render_str(self, text: str, **options: Any) -> "Text":
            return super().render_str(printable(text), **options)

    console = PrintableConsole(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def make_progress() -> "Progress":
    """Return a progress bar on stderr, which shows nothing where stderr is no terminal."""
    from rich.progress import Progress

    console = make_console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def print_line(line: str, *, err: bool = False) -> None:
    """Print one line, whatever the values in it hold."""
    click.echo(printable(line, LINE_LIMIT), err=err)


def print_json(value: Any) -> None:
    """Print a value for programs."""
    click.echo(json_text(value))


def human_date(moment: float) -> str:
    """Write a time of the clock to the minute."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (OverflowError, ValueError, OSError):
        return "never" if moment > 0 else "long ago"


def human_size(size: float) -> str:
    """Write bytes with about three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


def human_time(seconds: float) -> str:
    """Write seconds with about three digits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"

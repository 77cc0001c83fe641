"""Show the table and the current activity while the demo runs."""

from collections.abc import Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from memkv_testbed.demo.record import Request
from memkv_testbed.demo.table import make_table


class Screen:
    """A context manager. Updates live on a terminal; otherwise prints lines and a final table."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._requests: Sequence[Request] = ()
        self._progress = Progress(
            SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
        )
        self._task = self._progress.add_task("")
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=4,
            vertical_overflow="visible",
        )

    def set_status(self, text: str) -> None:
        """Show the current activity."""
        self._progress.update(self._task, description=text)
        if not (self._live.is_started and self._console.is_terminal):
            self._console.print(text)

    def show(self, requests: Sequence[Request]) -> None:
        """Show these requests in the table."""
        self._requests = requests

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._requests:
            parts.append(make_table(self._requests, self._console.width))
        if not self._progress.finished:
            parts.append(self._progress)
        return Group(*parts)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.update(self._task, total=1, completed=1)
        self._live.stop()
        if not self._console.is_terminal:
            self._console.line()  # `Live` prints it only on a terminal

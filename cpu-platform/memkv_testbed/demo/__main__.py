"""The command line of the demo."""

import signal
import sys
from pathlib import Path

import click
from rich.console import Console

from memkv_testbed.demo.needs import DemoError, check_needs
from memkv_testbed.demo.prompts import CONTEXT_TOKENS, LEAST_CONTEXT_TOKENS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

FILE = click.Path(path_type=Path, dir_okay=False, writable=True)


@click.command()
@click.option("--json", "json_path", metavar="FILE", type=FILE, help="Write figures to this file.")
@click.option(
    "--picture",
    metavar="FILE",
    type=FILE,
    default="memkv-demo.png",
    show_default=True,
    help="Write the picture (PNG) to this file.",
)
@click.option(
    "--tokens",
    type=click.IntRange(LEAST_CONTEXT_TOKENS, CONTEXT_TOKENS),
    default=CONTEXT_TOKENS,
    show_default=True,
    help="Length of the shared context in tokens. A shorter one takes less time and saves less.",
)
@click.option(
    "--s3",
    type=click.Choice(("minio", "seaweedfs", "versitygw")),
    default="minio",
    show_default=True,
    help="S3 server on which the nodes share pages. It is fetched or built on first use.",
)
@click.option("--keep", is_flag=True, help="Leave the servers running until Ctrl-C.")
def main(json_path: Path | None, picture: Path, tokens: int, s3: str, keep: bool) -> None:
    """Show that two SGLang servers behind a router share every prefix.

    The exit status is 1 if a claim is false or could not be tested. Nothing is left behind.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    console = Console()
    try:
        for path in (json_path, picture):
            _check_directory(path)
        check_needs()
        from memkv_testbed.demo.run import FAULTS, run
    except DemoError as error:
        _fail(console, error)
    try:
        sys.exit(run(console, json_path, picture, tokens, s3, keep))
    except KeyboardInterrupt as interrupt:
        console.print("interrupted; nothing is left running")
        sys.exit(128 + interrupt.args[0])
    except FAULTS as error:
        _fail(console, error)


def _interrupt(number: int, _: object) -> None:
    """End the demo. Further signals are ignored, so that they do not interrupt the cleanup."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def _check_directory(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise DemoError(f"{path}: {path.parent} does not exist; create it first")


def _fail(console: Console, error: Exception) -> None:
    console.print(f"demo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()

"""`memkv`: the command line."""

import errno
import io
import logging
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

import click
from typing_extensions import override

from memkv_sglang import __version__
from memkv_sglang.cli.agent import agent
from memkv_sglang.cli.bench import bench
from memkv_sglang.cli.bucket import bucket
from memkv_sglang.cli.clear import clear
from memkv_sglang.cli.config import config
from memkv_sglang.cli.doctor import doctor
from memkv_sglang.cli.explain import explain
from memkv_sglang.cli.gc import gc
from memkv_sglang.cli.inspect import inspect
from memkv_sglang.cli.output import print_line
from memkv_sglang.cli.patch import patch
from memkv_sglang.cli.pin import pin, pins, unpin
from memkv_sglang.cli.plan import plan
from memkv_sglang.cli.stats import stats
from memkv_sglang.cli.verify import verify
from memkv_sglang.cli.warm import warm
from memkv_sglang.config.errors import BrokenDiskError, ConfigError
from memkv_sglang.namespace import FORMAT_VERSION
from memkv_sglang.tiers.base import TierError

EXIT_FAILURE = 1
"""Exit status after any other failure: no agent, no MinIO, a full disk, a check that failed."""

EXIT_USAGE = 2
"""Exit status after wrong usage or a wrong configuration."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""

_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class VerbsInOrder(click.Group):
    """Lists the commands in the order in which they were added."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the versions that a bug report needs."""
    if not wanted or context.resilient_parsing:
        return
    from importlib.metadata import version as installed

    from memkv_sglang.agent.protocol import PROTOCOL_VERSION

    click.echo(f"memkv {__version__} (protocol {PROTOCOL_VERSION}, page format {FORMAT_VERSION})")
    click.echo(f"Python {platform.python_version()}, minio-py {installed('minio')}")
    click.echo(f"{platform.system()} {platform.release()} {platform.machine()}")
    context.exit()


@click.group(
    cls=VerbsInOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the versions of memkv, Python and the system.",
)
def memkv() -> None:
    """Shared KV cache for SGLang, on each node's NVMe and in MinIO.

    Start with `memkv doctor`. `memkv config --help` lists every setting.

    Exit status: 0 success, 1 failure, 2 wrong usage or configuration.
    """


VERBS = (
    *(doctor, config, agent, stats, explain, inspect, verify),
    *(bucket, clear, gc, pin, unpin, pins, warm),
    *(bench, plan, patch),
)

for verb in VERBS:
    memkv.add_command(verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Prints every expected error as one line."""
    # Commands print their own errors, so drop the package's log. `memkv agent` configures logging.
    logging.getLogger("memkv_sglang").addHandler(logging.NullHandler())
    try:
        _escape_unencodable_output()
        status = memkv.main(arguments, prog_name="memkv", standalone_mode=False)
        if sys.stdout is not None:  # None if stderr was closed before the start
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return EXIT_USAGE
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except BrokenDiskError as error:
        return _fail(str(error), EXIT_FAILURE)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except TierError as error:
        return _fail(f"{error}; see `memkv doctor`", EXIT_FAILURE)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe, which is not an error
        _discard(sys.stdout)
        return 0
    except SystemExit:  # click raises it after a broken pipe, and after printing completions
        _discard(sys.stdout)
        return 0
    except OSError as error:
        _discard(sys.stdout)
        return _fail(_describe(error), EXIT_FAILURE)
    return status if isinstance(status, int) else 0


def _fail(problem: str, status: int) -> int:
    try:
        print_line(f"error: {' '.join(problem.split())}", err=True)
    except OSError:  # stderr may be a file on a full disk, too
        _discard(sys.stderr)
    return status


def _escape_unencodable_output() -> None:
    """Escape characters that the terminal's encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _describe(error: OSError) -> str:
    if error.errno in _OUTPUT_ERRORS and error.filename is None:
        return f"cannot write the output ({error.strerror}); free space or write elsewhere"
    return str(error)


def _discard(stream: TextIO) -> None:
    """Redirect the stream to /dev/null, so that Python's flush at exit succeeds."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

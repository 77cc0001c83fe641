"""`memkv`: the command line."""

import errno
import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

import click

from memkv_sglang.cli.agent import agent
from memkv_sglang.cli.bench import bench
from memkv_sglang.cli.bucket import bucket
from memkv_sglang.cli.config import config
from memkv_sglang.cli.doctor import doctor
from memkv_sglang.cli.gc import gc
from memkv_sglang.cli.inspect import inspect
from memkv_sglang.cli.output import print_line
from memkv_sglang.cli.patch import patch
from memkv_sglang.cli.pin import pin, pins, unpin
from memkv_sglang.cli.stats import stats
from memkv_sglang.cli.verify import verify
from memkv_sglang.cli.version import version
from memkv_sglang.cli.warm import warm
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.tiers.base import TierError

EXIT_FAILURE = 1
"""Exit status after bad luck: no agent, no MinIO."""

EXIT_USAGE = 2
"""Exit status after bad input."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class VerbsInOrder(click.Group):
    """Lists the verbs in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs' names."""
        return list(self.commands)


@click.group(
    cls=VerbsInOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def memkv() -> None:
    """Shared KV cache for SGLang: pages on this node's NVMe and on a MinIO for all nodes.

    Begin with `memkv doctor`. Settings: `memkv config --help`.
    """


VERBS = (
    *(doctor, config, agent, stats, inspect, verify),
    *(bucket, gc, pin, unpin, pins, warm),
    *(bench, patch, version),
)

for verb in VERBS:
    memkv.add_command(verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; never raises for what a user may do."""
    # What went wrong is told once, by the command; `memkv agent` sets its own logging up.
    logging.getLogger("memkv_sglang").addHandler(logging.NullHandler())
    try:
        _escape_what_cannot_be_encoded()
        status = memkv.main(arguments, prog_name="memkv", standalone_mode=False)
        if sys.stdout is not None:  # None if it was closed before the start
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return EXIT_USAGE
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except TierError as error:
        return _fail(f"{error}; see `memkv doctor`", EXIT_FAILURE)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough; Python must not complain at its end
        _discard(sys.stdout)
        return 0
    except SystemExit:  # how click itself ends after a broken pipe
        _discard(sys.stdout)
        return 0
    except OSError as error:
        _discard(sys.stdout)
        return _fail(_describe(error), EXIT_FAILURE)
    return status if isinstance(status, int) else 0


def _fail(problem: str, status: int) -> int:
    try:
        print_line(f"error: {' '.join(problem.split())}", err=True)
    except OSError:  # stderr may be full, too
        _discard(sys.stderr)
    return status


def _escape_what_cannot_be_encoded() -> None:
    """Let output in a narrow encoding, or of names that are not UTF-8, never raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _describe(error: OSError) -> str:
    if error.errno in _OUTPUT_ERRORS and error.filename is None:
        return f"cannot write the output ({error.strerror}); free space, or write elsewhere"
    return str(error)


def _discard(stream: TextIO) -> None:
    """Let Python's own flush of the stream at exit succeed."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

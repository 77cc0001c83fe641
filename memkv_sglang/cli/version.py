"""`memkv version`."""

import platform
from importlib.metadata import version as installed

import click

from memkv_sglang import __version__
from memkv_sglang.namespace import FORMAT_VERSION


@click.command()
def version() -> None:
    """Print the versions that matter in a report."""
    from memkv_sglang.agent.protocol import PROTOCOL_VERSION

    click.echo(f"memkv {__version__} (protocol {PROTOCOL_VERSION}, page format {FORMAT_VERSION})")
    click.echo(f"Python {platform.python_version()}, minio-py {installed('minio')}")
    click.echo(f"{platform.system()} {platform.release()} {platform.machine()}")

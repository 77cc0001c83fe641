"""`memkv bucket`: one-time setup by an administrator."""

import json
from typing import TYPE_CHECKING

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import print_line
from memkv_sglang.cli.prompts import require_bucket
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.tiers.base import TierError

if TYPE_CHECKING:
    from minio.credentials.providers import Provider

    from memkv_sglang.config.schema import MinioConfig


@click.group(short_help="Set up the bucket; print the policy that nodes need.")
def bucket() -> None:
    """Set up the bucket with an administrator's keys, and print the policy that nodes need."""


@bucket.command(
    cls=SettingsCommand, shown=("minio",), short_help="Create the bucket and its lifecycle rule."
)
@click.option(
    "--days",
    type=click.IntRange(min=1, max=36500),
    metavar="N",
    default=30,
    show_default=True,
    help="Expire pages unused for this many days, even if no agent collects.",
)
@click.option(
    "--add-policies",
    is_flag=True,
    help="Also add the policies memkv-BUCKET and memkv-BUCKET-reader to the server.",
)
def setup(loaded: LoadedConfig, days: int, add_policies: bool) -> None:
    """Create the bucket and its lifecycle rule, using an administrator's keys.

    Safe to repeat; keeps other lifecycle rules. Exit status 1 if the bucket has object lock, since
    removing pages then frees no space.
    """
    from memkv_sglang.cli.listing.minio import open_bucket
    from memkv_sglang.tiers.minio.admin.setup import set_up

    config = loaded.config.minio
    require_bucket(config)
    done = set_up(open_bucket(config).administration(), config, days)
    click.echo(f"bucket {config.bucket}: {'created' if done.made else 'already exists'}")
    click.echo(f"lifecycle: pages unused for {days} days expire")
    if done.versioning != "Off":
        print_line(
            f"warning: versioning is {done.versioning.lower()}: removed pages take up space for "
            "another day (a rule now expires old versions), and each access time update copies the "
            "page; "
            "suspend versioning (`mc version suspend`) or use another bucket",
            err=True,
        )
    if add_policies:
        _add_policies(config)
    if done.locked:
        raise click.ClickException(
            f"minio.bucket: {config.bucket} has object lock, so removing pages may free no "
            "space; use a bucket created without object lock"
        )


@bucket.command(
    cls=SettingsCommand, shown=("minio",), short_help="Print the policy that a node needs."
)
@click.option("--reader", is_flag=True, help="For nodes with minio.role = reader.")
def policy(loaded: LoadedConfig, reader: bool) -> None:
    """Print the MinIO policy for a node's access key."""
    from memkv_sglang.tiers.minio.admin.policy import node_policy

    config = loaded.config.minio
    click.echo(json.dumps(node_policy(config.bucket, config.prefix, reader=reader), indent=2))


def _add_policies(config: "MinioConfig") -> None:
    from minio import MinioAdmin

    from memkv_sglang.config.check import endpoint_urls
    from memkv_sglang.tiers.minio.admin.policy import node_policy
    from memkv_sglang.tiers.minio.auth.signing import credential_provider
    from memkv_sglang.tiers.minio.http.control import ControlHttp
    from memkv_sglang.tiers.minio.http.tls import tls_context

    scheme, _, netloc = endpoint_urls(config)[0].partition("://")
    provider: Provider = credential_provider(config)
    try:
        admin = MinioAdmin(
            endpoint=netloc,
            credentials=provider,
            secure=scheme == "https",
            http_client=ControlHttp(context=tls_context(config)),
        )
        for ending, reader in (("", False), ("-reader", True)):
            name = f"memkv-{config.bucket}{ending}"
            admin.policy_add(name, policy=node_policy(config.bucket, config.prefix, reader=reader))
            click.echo(f"policy {name}: added; attach it with `mc admin policy attach`")
    except Exception as error:  # minio-py raises many types for malformed responses
        raise TierError(f"could not add policies: {type(error).__name__}: {error}") from error

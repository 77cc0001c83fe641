"""`memkv bucket`: one-time setup by an administrator."""

import json
import time
from typing import TYPE_CHECKING

import click
import msgspec

from memkv_sglang.cli.options import SettingsCommand, timeout_option
from memkv_sglang.cli.output import PhaseProgress, human_size, make_progress, print_line
from memkv_sglang.cli.shards import bucket_configs, shard_option
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.config.shards import shard_configs
from memkv_sglang.tiers.base import TierError

if TYPE_CHECKING:
    from minio.credentials.providers import Provider


_OWN_TOOLS = (
    "if the server is not MinIO, add them with its own tools: `memkv bucket policy` prints them"
)


OPENING_SECONDS = 10.0
"""Seconds to open the bucket."""


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
    help="Number of days after which unused pages expire, even if no agent collects.",
)
@click.option(
    "--add-policies",
    is_flag=True,
    help="Also add the policies memkv-BUCKET and memkv-BUCKET-reader to the server.",
)
@shard_option
def setup(loaded: LoadedConfig, days: int, add_policies: bool, shard: str | None) -> None:
    """Create the bucket and its lifecycle rule, using an administrator's keys.

    The command can be repeated, and keeps other lifecycle rules. It also shows what the S3 server
    supports. The exit status is 1 if the server lacks a required feature, or if the bucket has
    object lock, with which removing pages frees no space.
    """
    for name, config in bucket_configs(loaded.config.minio, shard).items():
        if name:
            click.echo(f"shard {name}")
        _set_up(config, loaded.config.collector, days, add_policies=add_policies)


def _set_up(
    config: MinioConfig, collector: CollectorConfig, days: int, *, add_policies: bool
) -> None:
    from memkv_sglang.cli.listing.minio import open_bucket
    from memkv_sglang.tiers.minio.admin.setup import set_up

    done = set_up(open_bucket(config).administration(), config, days)
    click.echo(f"bucket {config.bucket}: {'created' if done.made else 'already exists'}")
    _record_days(config, days if done.expires else 0)
    if done.expires:
        click.echo(f"lifecycle: pages unused for {days} days expire")
    else:
        _warn(
            "lifecycle: the server has no lifecycle rules, so pages that no agent removes stay; "
            "set collector.max_age, or run `memkv gc --collector-max-age`"
        )
    if done.versioning != "Off":
        _warn(
            f"versioning is {done.versioning.lower()}: removed pages take up space for "
            "another day (a rule now expires old versions); suspend versioning (`mc version "
            "suspend`) or use another bucket"
        )
    usable = _print_support(config, collector)
    if add_policies:
        _add_policies(config)
    if done.locked:
        raise click.ClickException(
            f"minio.bucket: {config.bucket} has object lock, so removing pages may free no "
            "space; use a bucket created without object lock"
        )
    if not usable:
        raise click.ClickException("the server lacks a required feature; see the errors above")


@bucket.command(
    cls=SettingsCommand,
    shown=("minio", "collector"),
    short_help="Rebuild the index of the bucket from a listing.",
)
@click.option(
    "index_shards",
    "--index-shards",
    type=click.Choice(["1", "2", "4", "8", "16", "32", "64", "128", "256"]),
    help="Number of shards of a new index.  [default: 16]",
)
@timeout_option
@shard_option
def rebuild(
    loaded: LoadedConfig, index_shards: str | None, timeout: float | None, shard: str | None
) -> None:
    """Rebuild the index from a listing of all pages, and migrate a bucket of format 1.

    An interrupted run can be continued. Before a migration, stop all agents of versions that use
    format 1.
    """
    for name, config in bucket_configs(loaded.config.minio, shard).items():
        if name:
            click.echo(f"shard {name}")
        count = int(index_shards) if index_shards else None
        _rebuild(config, loaded.config.collector, count, timeout)


def _rebuild(
    config: MinioConfig,
    collector: CollectorConfig,
    index_shards: int | None,
    timeout: float | None,
) -> None:
    from memkv_sglang.tiers.minio import MinioTier

    tier = MinioTier(msgspec.structs.replace(config, create_bucket=False), any_format=True)
    try:
        with make_progress() as progress:
            shown = PhaseProgress(progress, timeout)
            rebuilder = tier.retention.rebuilder(collector, index_shards)
            done = rebuilder.run(shown.step)
    finally:
        tier.close()
    if done.migrated:
        click.echo("migrated from format 1 to format 2")
    if done.without_days:
        click.echo(
            "next: run `memkv bucket setup`, so that nodes renew pages before the lifecycle rule "
            "removes them"
        )
    if done.resumed:
        click.echo(f"continued: {done.resumed} shards were already done")
    click.echo(f"pages: {done.pages}, {human_size(done.bytes)}")
    if done.foreign:
        click.echo(
            f"objects that have a page's name but are not pages: {done.foreign}; they are kept"
        )


@bucket.command(
    cls=SettingsCommand, shown=("minio",), short_help="Print the policy that a node needs."
)
@click.option("--reader", is_flag=True, help="For nodes with minio.role = reader.")
@shard_option
def policy(loaded: LoadedConfig, reader: bool, shard: str | None) -> None:
    """Print the MinIO policy for a node's access key.

    Shards with different buckets or prefixes need different policies; choose a shard with --shard.
    """
    from memkv_sglang.tiers.minio.admin.policy import node_policy

    configs = shard_configs(loaded.config.minio)
    if shard is not None:
        configs = bucket_configs(loaded.config.minio, shard)
    places = {(one.bucket, one.prefix) for one in configs.values()}
    if len(places) > 1:
        raise ConfigError(
            "--shard: the shards have different buckets or prefixes; choose one of them: "
            + ", ".join(configs)
        )
    config = next(iter(configs.values()), loaded.config.minio)
    click.echo(json.dumps(node_policy(config.bucket, config.prefix, reader=reader), indent=2))


def _print_support(config: MinioConfig, collector: CollectorConfig) -> bool:
    """Print what the server supports; return False if it cannot store pages.

    Leaves out versions and lifecycle rules, which `setup` has already printed.
    """
    from memkv_sglang.cli.checks.bucket import check_server

    usable = True
    for finding in check_server(config, collector):
        line = f"{finding.what}: " + "; ".join(filter(None, (finding.detail, finding.advice)))
        if finding.level == "FAIL":
            usable = False
            print_line(f"error: {line}", err=True)
        elif finding.level == "ok":
            click.echo(line)
        elif finding.what != "versions":
            _warn(line)
    return usable


def _warn(text: str) -> None:
    print_line(f"warning: {text}", err=True)


def _record_days(config: MinioConfig, days: int) -> None:
    """Tell the nodes after how many days pages expire, so that they renew the pages in use."""
    from memkv_sglang.cli.listing.minio import open_minio

    with open_minio(config) as tier:
        tier.check(time.monotonic() + OPENING_SECONDS)
        tier.retention.set_expiry(days)


def _add_policies(config: MinioConfig) -> None:
    from minio import MinioAdmin

    from memkv_sglang.config.check import endpoint_urls
    from memkv_sglang.tiers.minio.admin.bucket import REASON_LIMIT
    from memkv_sglang.tiers.minio.admin.policy import node_policy
    from memkv_sglang.tiers.minio.auth.signing import credential_provider
    from memkv_sglang.tiers.minio.http.answers import shown
    from memkv_sglang.tiers.minio.http.control import ControlHttp
    from memkv_sglang.tiers.minio.http.tls import tls_context

    scheme, _, netloc = endpoint_urls(config)[0].partition("://")
    provider: Provider = credential_provider(config)
    added: list[str] = []
    try:
        admin = MinioAdmin(
            endpoint=netloc,
            credentials=provider,
            secure=scheme == "https",
            http_client=ControlHttp(context=tls_context(config)),
        )
        # A server other than MinIO could take the policy for an object.
        json.loads(admin.policy_list())
        for ending, reader in (("", False), ("-reader", True)):
            name = f"memkv-{config.bucket}{ending}"
            admin.policy_add(name, policy=node_policy(config.bucket, config.prefix, reader=reader))
            added.append(name)
        unlisted = set(added) - set(json.loads(admin.policy_list()))
    except Exception as error:  # minio-py raises many types of exceptions for malformed responses
        reason = f"{type(error).__name__}: {shown(str(error), REASON_LIMIT)}"
        raise TierError(f"could not add policies: {reason}; {_OWN_TOOLS}") from error
    if unlisted:
        raise TierError(f"the server accepted policies that it does not list; {_OWN_TOOLS}")
    for name in added:
        click.echo(f"policy {name}: added; attach it with `mc admin policy attach`")

"""`memkv clear`."""

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import make_progress
from memkv_sglang.cli.shards import bucket_configs, prefixed, shard_option
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import MinioConfig


@click.command(
    cls=SettingsCommand, shown=("minio",), short_help="Delete every page from the bucket."
)
@click.option(
    "--bucket", is_flag=True, help="Required, to confirm that the pages of all nodes are deleted."
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@shard_option
def clear(loaded: LoadedConfig, bucket: bool, yes: bool, shard: str | None) -> None:
    """Delete every page of every namespace from the bucket, for all nodes.

    Stop the agents first: pages that running agents have stored in the last minute are kept. So are
    other objects in the bucket and the pages on the nodes' disks. To clear only one node, use
    SGLang's `POST /hicache/storage-backend/clear`.
    """
    config = loaded.config
    check_environment(loaded)
    if not bucket:
        raise click.UsageError("this deletes pages of all nodes; confirm that with --bucket")
    configs = bucket_configs(config.minio, shard)
    places = [
        prefixed(name, f"{one.bucket}/{one.prefix}".rstrip("/")) for name, one in configs.items()
    ]
    if not yes:
        click.confirm(f"Delete every page of all nodes from {', '.join(places)}?", abort=True)
    for name, one in configs.items():
        removed, namespaces = _clear(one)
        click.echo(prefixed(name, f"removed: {removed} pages of {namespaces} namespaces"))


def _clear(config: MinioConfig) -> tuple[int, int]:
    """Clear one bucket; return the number of its pages and namespaces."""
    from memkv_sglang.cli.listing.minio import open_minio

    removed = 0
    with open_minio(config) as tier, make_progress() as progress:
        digests = tier.digests()
        task = progress.add_task("clear", total=len(digests))
        for digest in digests:
            removed += tier.clear(digest)
            progress.advance(task)
    return removed, len(digests)

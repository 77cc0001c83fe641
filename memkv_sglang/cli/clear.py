"""`memkv clear`."""

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import make_progress
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig


@click.command(
    cls=SettingsCommand, shown=("minio",), short_help="Delete every page from the bucket."
)
@click.option("--bucket", is_flag=True, help="Required: delete what all nodes have stored.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def clear(loaded: LoadedConfig, bucket: bool, yes: bool) -> None:
    """Delete every page of every namespace from the bucket, for all nodes.

    Stop the agents first: pages that running agents have stored in the last minute stay. Other
    objects in the bucket stay, and so do the pages on the nodes' disks. To clear one node only,
    use SGLang's `POST /hicache/storage-backend/clear`.
    """
    config = loaded.config
    check_environment(loaded)
    if not bucket:
        raise click.UsageError("this deletes pages of all nodes; confirm that with --bucket")
    if not config.minio.endpoint:
        raise ConfigError("minio.endpoint: is empty, so there is no bucket; set it")
    place = f"{config.minio.bucket}/{config.minio.prefix}".rstrip("/")
    if not yes:
        click.confirm(f"Delete every page of all nodes from {place}?", abort=True)
    from memkv_sglang.cli.listing.minio import open_minio

    removed = 0
    with open_minio(config.minio) as tier, make_progress() as progress:
        digests = tier.digests()
        task = progress.add_task("clear", total=len(digests))
        for digest in digests:
            removed += tier.clear(digest)
            progress.advance(task)
    click.echo(f"removed: {removed} pages of {len(digests)} namespaces")

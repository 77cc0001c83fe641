"""`memkv inspect`."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import human_size, make_console, print_json, print_line
from memkv_sglang.cli.shards import bucket_configs, shard_option, tier_name
from memkv_sglang.config.environment import check_any_tier
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import Config
from memkv_sglang.config.shards import has_minio
from memkv_sglang.namespace import Namespace, Shard
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, PageKey
from memkv_sglang.tiers.base import TierError

if TYPE_CHECKING:
    from memkv_sglang.cli.listing.base import Listing, StoredPage

Found = dict[bytes, dict[str, Namespace | None]]
"""Namespaces by digest. Each has the tiers that hold it, with its description in that tier."""


@click.command(
    cls=SettingsCommand,
    shown=("nvme", "minio"),
    short_help="Show stored namespaces, or one namespace or page.",
)
@click.argument("namespace", required=False)
@click.argument("page_hash", required=False, metavar="[HASH]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shard_option
def inspect(
    loaded: LoadedConfig,
    namespace: str | None,
    page_hash: str | None,
    as_json: bool,
    shard: str | None,
) -> None:
    """Show stored namespaces, one NAMESPACE, or where its page HASH is stored.

    NAMESPACE is a hex digest or a unique prefix of one. The command reads both tiers and changes
    nothing; an agent may be running. The exit status is 1 if a tier cannot be read or no tier has
    the page.
    """
    check_any_tier(loaded)
    key_hash = _parse_hash(page_hash)
    with _listings(loaded.config, shard) as listings:
        found, failed = _namespaces(listings)
        for listing, problem in failed.items():
            print_line(f"warning: skipped {listing.name}: {problem}", err=True)
        readable = [listing for listing in listings if listing not in failed]
        if namespace is None:
            _show_all(found, as_json)
        elif key_hash is None:
            _show_namespace(_resolve(namespace, found), found, readable, as_json)
        else:
            _show_page(PageKey(_resolve(namespace, found), key_hash), readable, as_json)
    if failed:
        raise click.exceptions.Exit(1)


@contextmanager
def _listings(config: Config, shard: str | None) -> "Iterator[Sequence[Listing]]":
    from memkv_sglang.cli.listing.minio import MinioListing, open_minio
    from memkv_sglang.cli.listing.nvme import NvmeListing

    disks = [Path(disk.directory) for disk in config.nvme.for_each_directory()]
    listings: list[Listing] = [
        NvmeListing(path, NvmeListing.name if len(disks) == 1 else f"{NvmeListing.name} {path}")
        for path in disks
    ]
    with ExitStack() as stack:
        if has_minio(config.minio) or shard:
            for name, one in bucket_configs(config.minio, shard).items():
                tier = stack.enter_context(open_minio(one))
                listings.append(MinioListing(one, tier, tier_name(name)))
        yield listings


def _namespaces(
    listings: "Sequence[Listing]",
) -> "tuple[Found, dict[Listing, TierError]]":
    """Return the namespaces of all tiers, and for each tier that cannot be read, the reason."""
    found: Found = defaultdict(dict)
    failed: dict[Listing, TierError] = {}
    for listing in listings:
        try:
            described = listing.namespaces()
        except TierError as error:
            failed[listing] = error
        else:
            for digest, description in described.items():
                found[digest][listing.name] = description
    return found, failed


def _parse_hash(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        page_hash = bytes.fromhex(text)
    except ValueError:
        page_hash = b""
    if len(page_hash) != PAGE_HASH_SIZE:
        raise click.UsageError(f"HASH: {text[:70]!r} is not {2 * PAGE_HASH_SIZE} hex digits")
    return page_hash


def _resolve(text: str, found: Found) -> bytes:
    matches = [digest for digest in found if digest.hex().startswith(text.lower())]
    if len(matches) == 1:
        return matches[0]
    what = f"{len(matches)} namespaces begin" if matches else "no namespace begins"
    raise click.UsageError(f"NAMESPACE: {what} with {text[:40]!r}; `memkv inspect` lists them")


def _description(described: dict[str, Namespace | None]) -> Namespace | None:
    return next(filter(None, described.values()), None)


def _show_all(found: Found, as_json: bool) -> None:
    if as_json:
        print_json([_as_json(digest, described) for digest, described in found.items()])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("namespace", no_wrap=True, min_width=2 * NAMESPACE_DIGEST_SIZE)
    for title in ("model", "pool", "dtype", "page", "rank", "in"):
        table.add_column(title, overflow="fold")
    for digest, described in sorted(found.items()):
        table.add_row(digest.hex(), *_summary(_description(described)), ", ".join(described))
    make_console().print(table if found else "no namespaces")


def _summary(namespace: Namespace | None) -> tuple[str, ...]:
    if namespace is None:
        return ("(no description)", "", "", "", "")
    return (
        namespace.model,
        namespace.pool,
        namespace.kv_dtype,
        human_size(namespace.page_bytes),
        f"{namespace.shard.tp_rank}/{namespace.shard.tp_size}",
    )


def _as_json(digest: bytes, described: dict[str, Namespace | None]) -> dict[str, Any]:
    description = msgspec.to_builtins(_description(described))
    return {"namespace": digest.hex(), "tiers": list(described), "description": description}


def _show_namespace(
    digest: bytes, found: Found, listings: "Sequence[Listing]", as_json: bool
) -> None:
    described = found[digest]
    totals = {}
    for listing in listings:
        pages = listing.pages(digest)
        totals[listing.name] = {
            "pages": len(pages),
            "bytes": sum(page.length for page in pages),
        }
    if as_json:
        print_json({**_as_json(digest, described), "tiers": totals})
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("namespace", digest.hex())
    description = _description(described)
    if description is not None:
        for name, value in msgspec.structs.asdict(description).items():
            table.add_row(name, _plain(value))
    for tier, total in totals.items():
        table.add_row(f"in {tier}", f"{total['pages']} pages, {human_size(total['bytes'])}")
    make_console().print(table)


def _plain(value: object) -> str:
    if isinstance(value, Shard):
        ranks = msgspec.structs.asdict(value)
        axes = [name.removesuffix("_rank") for name in ranks if name.endswith("_rank")]
        return ", ".join(f"{axis} {ranks[f'{axis}_rank']}/{ranks[f'{axis}_size']}" for axis in axes)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {part}" for name, part in value.items()) or "-"
    if isinstance(value, tuple):
        return " to ".join(map(str, value))
    return str(value) if value != "" else "-"


def _show_page(key: PageKey, listings: "Sequence[Listing]", as_json: bool) -> None:
    places: dict[str, StoredPage | None] = {listing.name: listing.find(key) for listing in listings}
    if as_json:
        stored = {
            tier: {"bytes": page.length, "place": page.place} if page else None
            for tier, page in places.items()
        }
        print_json({"namespace": key.namespace.hex(), "hash": key.hash.hex(), "tiers": stored})
    else:
        for tier, page in places.items():
            where = f"{human_size(page.length)} in {page.place}" if page else "not stored"
            print_line(f"{tier:<6} {where}")
    if not any(places.values()):
        raise click.exceptions.Exit(1)

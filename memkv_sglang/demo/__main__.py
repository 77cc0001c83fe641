"""One chain goes down both tiers, and comes back into the memory of a node that never saw it."""

import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from memkv_sglang.config.schema import MIB, MinioConfig
from memkv_sglang.demo.node import Node, Pool
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Chain
from memkv_sglang.testing.minio_server import MinioServer
from memkv_sglang.testing.pages import make_chain, make_hashes, make_namespace
from memkv_sglang.tiers.base import SpillResult

PAGES = 256
PAGE_BYTES = MIB
SHARED = 200
"""Pages that a second conversation has in common with the first."""

FLUSH_SECONDS = 60.0


class DemoError(Exception):
    """Something did not come back as it was spilled."""


def main() -> int:
    """Run; returns the exit code. Nothing is left behind, also not after Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    try:
        with ExitStack() as stack:
            _show(console, stack)
    except KeyboardInterrupt:
        console.print("interrupted; everything is cleaned up")
        return 130
    except DemoError as error:
        console.print(f"[red]failed:[/] {error}")
        return 1
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _show(console: Console, stack: ExitStack) -> None:
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memkv-demo-")))
    with console.status("starting a MinIO server and two node agents"):
        server = stack.enter_context(MinioServer())
        namespace = make_namespace(page_bytes=PAGE_BYTES, model="demo")
        minio = MinioConfig(
            endpoint=server.endpoint, access_key=server.access_key, secret_key=server.secret_key
        )
        nodes = [Node(name, home, minio, namespace) for name in ("node-a", "node-b")]
        for node in nodes:
            stack.callback(node.stop)
            node.start()
    one, other = nodes
    chain = make_chain(namespace, PAGES, "first conversation")
    table = Table(title=f"{PAGES} pages of {PAGE_BYTES // MIB} MiB")
    for column in ("step", "pages", "from", "ms", "GB/s"):
        table.add_column(column, justify="left" if column in ("step", "from") else "right")

    with console.status("node-a spills"):
        pool = Pool(one, chain)
        pool.fill()
        stored, seconds = pool.spill()
        _expect(stored.count(SpillResult.STORED) == PAGES, "not every page was stored")
        _row(table, "node-a spills to its disk, acknowledged", PAGES, "", seconds)
        assert one.client is not None
        _expect(one.client.flush(FLUSH_SECONDS), "the upload queue did not empty")

    with console.status("node-a restarts and loads"):
        one.stop()
        one.start()
        _load(table, one, chain, "node-a restarts, and loads", "nvme")

    with console.status("node-b, which never saw the chain, loads"):
        assert other.client is not None
        branch = make_hashes(PAGES - SHARED, "second", chain.hashes[SHARED - 1])
        found = other.client.lookup(Chain(chain.namespace, [*chain.hashes[:SHARED], *branch]), 5.0)
        _expect(found.length == SHARED, f"{found.length} pages shared instead of {SHARED}")
        _load(table, other, chain, "node-b loads what node-a spilled", "minio")
    console.print(table)
    console.print(
        f"A conversation that leaves the first one after page {SHARED}: node-b found exactly "
        f"{found.length} pages. Every byte was compared."
    )


def _load(table: Table, node: Node, chain: Chain, step: str, tier: str) -> None:
    pool = Pool(node, chain)
    loads, seconds = pool.load()
    _expect(all(load == PageLoad(load.result, tier) for load in loads), f"not all from {tier}")
    _expect(pool.wrong_pages() == 0, "wrong bytes came back")
    _row(table, step, len(loads), tier, seconds)


def _row(table: Table, step: str, pages: int, tier: str, seconds: float) -> None:
    speed = pages * PAGE_BYTES / seconds / 1e9
    table.add_row(step, str(pages), tier, f"{seconds * 1e3:.0f}", f"{speed:.2f}")


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise DemoError(problem)


if __name__ == "__main__":
    sys.exit(main())

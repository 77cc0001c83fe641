"""Two nodes and two shards on machines of their own, whose lines have a limited rate."""

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from memkv_testbed.machines import refusal, switched_machines
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import KIB, MinioConfig, ShardConfig
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import LoadResult, SpillResult
from tests.nodes.node import LIMIT, Node, Pool

PAGE, PAGES = 256 * KIB, 300
"""The pages of three calls, 77 MiB in all."""

MEGABITS = 500
NODE_SECONDS = PAGE * PAGES * 8 / (MEGABITS * 1e6)


@pytest.mark.slow  # starts servers and agents; the line is slow
@pytest.mark.skipif(bool(refusal()), reason=refusal())
def test_pages_return_bit_for_bit_over_limited_lines_from_two_shards(tmp_path: Path) -> None:
    chain = make_chain(make_namespace(page_bytes=PAGE, model="line"), PAGES)
    with ExitStack() as stack:
        machines = stack.enter_context(switched_machines([MEGABITS] * 4))
        shards = []
        for machine in machines[:2]:
            with machine.network():
                server = stack.enter_context(MinioServer(host=machine.address))
            keys = {"access_key": server.access_key, "secret_key": server.secret_key}
            shards.append(ShardConfig(name=machine.address, endpoint=server.endpoint, **keys))
        minio = MinioConfig(bucket="line", shards=tuple(shards))
        writer, reader = machines[2:]
        with writer.network():
            one = stack.enter_context(Node("one", tmp_path, minio))
        with reader.network():
            other = stack.enter_context(Node("other", tmp_path, minio))

        spilled, loaded = Pool(one.client, chain, PAGE), Pool(other.client, chain, PAGE)
        spilled.fill()
        assert set(spilled.spill()) == {SpillResult.STORED}
        assert one.client.flush(LIMIT)
        shares = [machine.received() / (PAGE * PAGES) for machine in machines[:2]]
        assert min(shares) > 0.3, "a shard got few of the pages"

        assert other.client.lookup(chain, LIMIT).length == PAGES
        before, began = reader.received(), time.monotonic()
        assert loaded.load() == [PageLoad(LoadResult.LOADED, "minio")] * PAGES
        assert time.monotonic() - began > 0.9 * NODE_SECONDS, "the line is not limited"
        assert reader.received() - before > PAGE * PAGES, "the pages came another way"
        assert loaded.wrong(PAGES) == []

"""Every command that opens the bucket acts on all shards, or on the one that --shard names."""

import json
import uuid
from collections.abc import Iterator

import pytest
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.client.client import AgentClient
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.shards import Placement
from tests.cli.cli_node import PAGE, PAGES, Run, running_agent, spill_chain

CHAIN = make_chain(make_namespace(PAGE), PAGES)
PLACEMENT = Placement(["a", "b"])
SHARES = [sum(PLACEMENT.first(key) == number for key in CHAIN.keys()) for number in (0, 1)]


@pytest.fixture
def environ(environ: dict[str, str], minio_server: MinioServer) -> dict[str, str]:
    """Two buckets on one server, which are as separate as two servers' for every command."""
    del environ["MEMKV_MINIO_ENDPOINT"]
    buckets = [f"test-{uuid.uuid4().hex}" for _ in range(2)]
    shards = ", ".join(
        f'{{name = "{name}", endpoint = "{minio_server.endpoint}", bucket = "{bucket}"}}'
        for name, bucket in zip("ab", buckets, strict=True)
    )
    return {**environ, "MEMKV_MINIO_SHARDS": f"[{shards}]"}


@pytest.fixture
def agent(environ: dict[str, str]) -> Iterator[AgentClient]:
    with running_agent(environ) as client:
        spill_chain(client)
        yield client


def test_commands_act_on_all_shards_or_one(
    run: Run, agent: AgentClient, minio_server: MinioServer
) -> None:
    assert min(SHARES) > 0
    status = json.loads(run("stats", "--json").out)
    assert [(s["name"], s["breaker"], s["problem"]) for s in status["engine"]["shards"]] == [
        ("a", "closed", ""),
        ("b", "closed", ""),
    ]
    shown = run("stats").out
    assert "shard" in shown and "breaker" in shown

    found = json.loads(run("inspect", CHAIN.namespace.hex(), "--json").out)
    assert [found["tiers"][f"minio/{name}"]["pages"] for name in "ab"] == SHARES
    one = json.loads(run("inspect", CHAIN.namespace.hex(), "--json", "--shard", "b").out)
    assert set(one["tiers"]) == {"nvme", "minio/b"}
    page = json.loads(run("inspect", CHAIN.namespace.hex(), CHAIN.hashes[0].hex(), "--json").out)
    home = "ab"[PLACEMENT.first(CHAIN.keys()[0])]
    assert {name for name, place in page["tiers"].items() if place} == {"nvme", f"minio/{home}"}

    keys = minio_server.root
    as_root = {
        "MEMKV_MINIO_ACCESS_KEY": keys.access_key,
        "MEMKV_MINIO_SECRET_KEY": keys.secret_key,
    }
    setup = run("bucket", "setup", **as_root)
    assert setup.status == 0, setup.err
    assert "shard a" in setup.out and "shard b" in setup.out
    assert "shard a" not in run("bucket", "setup", "--shard", "b", **as_root).out
    checked = run("doctor", "--json")
    assert checked.status == 0, checked.out
    for name in "ab":
        mine = [f for f in json.loads(checked.out) if f["detail"].startswith(f"shard {name}: ")]
        assert {"MinIO", "put", "conditions", "pins"} <= {finding["what"] for finding in mine}
    assert "shard a" not in run("doctor", "--json", "--shard", "b").out

    rebuilt = run("bucket", "rebuild")
    assert [f"pages: {share}," in rebuilt.out for share in SHARES] == [True, True], rebuilt.out
    chain = ",".join(page.hex() for page in CHAIN.hashes)
    pinned = run("pin", "--chain", chain, "--for", "1h")
    assert (pinned.status, pinned.err) == (0, "")
    (pin,) = json.loads(run("pins", "--json").out)
    assert pin["pages"] == PAGES
    kept = run("gc", "--collector-capacity", "1", "--dry-run", "--json")
    assert [(one["shard"], one["pages"]) for one in json.loads(kept.out)] == [
        ("a", SHARES[0]),
        ("b", SHARES[1]),
    ]
    assert run("unpin", pin["name"]).status == 0
    assert json.loads(run("pins", "--json").out) == []
    assert run("warm", "--chain", chain).out.startswith(f"0 pages copied, {PAGES} already")
    removed = run("gc", "--collector-capacity", "1", "--shard", "a")
    assert (removed.status, removed.out.splitlines()[:2]) == (
        0,
        ["shard a", f"removed: {SHARES[0]} pages, {SHARES[0] * PAGE // 1024} KiB"],
    )
    cleared = run("clear", "--bucket", "--yes")
    assert cleared.out.splitlines()[0].startswith("shard a: removed: 0 pages")
    assert cleared.out.splitlines()[1].startswith(f"shard b: removed: {SHARES[1]} pages")


def test_verify_and_bench_read_all_shards(run: Run, environ: dict[str, str]) -> None:
    with running_agent(environ) as agent:
        spill_chain(agent)
    verified = run("verify")
    assert verified.status == 0, verified.out
    for name, share in zip("ab", SHARES, strict=True):
        assert f"minio/{name}: {share} of {share} pages" in verified.out
    assert "minio/a" not in run("verify", "--shard", "b").out
    measured = run("bench", "--page", "64KiB", "--volume", "1MiB", "--json")
    assert [one["tier"] for one in json.loads(measured.out)] == ["nvme", "minio"]
    policy = run("bucket", "policy")
    assert policy.status == 2 and "--shard" in policy.err
    assert "s3:GetObject" in run("bucket", "policy", "--shard", "a").out


@pytest.mark.parametrize("shard", ["c", "A"])
def test_an_unknown_shard_is_one_line(run: Run, shard: str) -> None:
    for command in (["gc", "--dry-run"], ["inspect"], ["bucket", "rebuild"], ["verify"]):
        outcome = run(*command, "--shard", shard)
        assert outcome.status == 2
        assert outcome.err.startswith("error: --shard: there is no shard")
        assert len(outcome.err.splitlines()) == 1

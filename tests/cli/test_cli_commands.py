"""The commands on a real node with a directory, a MinIO and an agent."""

import io
import json
import signal
import subprocess
from pathlib import Path

import pytest
from memkv_testbed.host_pool import HostPool
from memkv_testbed.minio_server import MinioServer
from minio import Minio

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.settings import all_settings
from memkv_sglang.engine.served import ServedRequest
from memkv_sglang.testing.pages import page_content
from memkv_sglang.tiers.minio.admin.bucket import Bucket
from memkv_sglang.tiers.minio.auth.signing import credential_provider
from memkv_sglang.tiers.nvme import NvmeTier
from tests.cli.cli_node import LIMIT, PAGE, PAGES, Run, config_of, running_agent, spill_chain, start


def bucket_of(environ: dict[str, str]) -> Bucket:
    config = config_of(environ).minio
    return Bucket(config, credential_provider(config), None)


def levels(out: str) -> dict[str, str]:
    """Return the level of each check in doctor's JSON output."""
    return {finding["what"]: finding["level"] for finding in json.loads(out)}


def test_config_shows_values_and_origins_but_no_secret(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "memkv.toml"
    file.write_text("nvme.queue_depth = 3\nnvme.capacity = '1GiB'")
    outcome = run("config", "--config", str(file), "--engine-promote", "never", "--json")
    shown = json.loads(outcome.out)
    assert shown.keys() == {setting.key for setting in all_settings()}
    assert shown["nvme.queue_depth"] == {"value": 3, "from": str(file)}
    assert shown["nvme.capacity"] == {"value": 64 << 20, "from": "MEMKV_NVME_CAPACITY"}
    assert shown["engine.promote"] == {"value": "never", "from": "--engine-promote"}
    assert shown["engine.breaker_failures"] == {"value": 5, "from": "default"}
    assert shown["minio.secret_key"]["value"] == "(secret)"
    assert "64MiB" in run("config").out


def test_no_flags_turn_settings_off(run: Run) -> None:
    shown = json.loads(run("config", "--no-minio-create-bucket", "--json").out)
    assert shown["minio.create_bucket"] == {"value": False, "from": "--minio-create-bucket"}


def test_stats_shows_the_agents_counters(run: Run, agent: AgentClient) -> None:
    chain = spill_chain(agent)
    with HostPool(PAGES, PAGE, parts=1) as pool:
        number = agent.register_pool(pool.descriptor, pool.length)
        agent.load(
            chain, pool.buffers(number, range(PAGES)), ServedRequest("\udcff" * 200, 64, 0.25)
        )
    report = json.loads(run("stats", "--json").out)
    tiers = {tier["name"]: tier for tier in report["engine"]["tiers"]}
    assert tiers["nvme"]["pages"] == PAGES
    assert report["engine"]["queue_pages"] == 0
    stored = [
        sample["value"]
        for sample in report["metrics"]
        if sample["name"] == "memkv_pages_total"
        and sample["labels"] == {"tier": "minio", "operation": "spill", "result": "stored"}
    ]
    assert stored == [PAGES]
    shown = run("stats").out
    assert "looked up 12 pages, 100.0 % found" in shown
    assert "prefill saved: 768 tokens (3 s) from nvme, 0 tokens (0 us) from minio" in shown
    # No node knows the content of the shared tier.
    assert any(
        line.split()[:5] == ["minio", "working", "-", "-", "-"] for line in shown.splitlines()
    )
    assert str(report["agent"]["pid"]) in shown


def test_stats_without_an_agent_says_how_to_start_one(run: Run) -> None:
    outcome = run("stats")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert "memkv agent" in outcome.err


def test_ctrl_c_ends_watching_without_a_traceback(
    environ: dict[str, str], agent: AgentClient
) -> None:
    watch = ["stats", "--watch", "--interval", "0.1"]
    process = start(environ, *watch, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors.strip()) == (130, "")


def test_inspect_finds_namespaces_and_pages_with_and_without_an_agent(
    run: Run, environ: dict[str, str]
) -> None:
    with running_agent(environ) as client:
        chain = spill_chain(client)
        held = [run("inspect", "--json").out]
    held.append(run("inspect", "--json").out)
    digest = chain.namespace.hex()
    for shown in map(json.loads, held):
        assert [entry["namespace"] for entry in shown] == [digest]
        assert shown[0]["tiers"] == ["nvme", "minio"]
        assert shown[0]["description"]["model"] == "test-model"
    assert digest in run("inspect", COLUMNS="80").out
    totals = json.loads(run("inspect", digest[:8], "--json").out)["tiers"]
    everything = {"pages": PAGES, "bytes": PAGES * PAGE}
    assert totals == {"nvme": everything, "minio": everything}
    page = run("inspect", digest, chain.hashes[5].hex())
    assert page.status == 0
    assert "nvme   64 KiB in segments/" in page.out
    assert chain.hashes[5].hex() in page.out
    missing = run("inspect", digest, "00" * 32)
    assert (missing.status, missing.out.count("not stored")) == (1, 2)


def test_inspect_shows_the_directory_while_minio_is_down(run: Run, environ: dict[str, str]) -> None:
    with running_agent(environ) as client:
        chain = spill_chain(client)
    outcome = run("inspect", MEMKV_MINIO_ENDPOINT="http://127.0.0.1:1")
    assert outcome.status == 1
    assert chain.namespace.hex() in outcome.out
    assert "skipped minio: http://127.0.0.1:1 does not answer" in outcome.err


@pytest.mark.parametrize("arguments", [["ffff"], ["ffff", "00" * 32], ["ffff", "12"]])
def test_inspect_rejects_unknown_names(run: Run, arguments: list[str]) -> None:
    run("doctor")
    outcome = run("inspect", *arguments, MEMKV_MINIO_ENDPOINT="")
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")


def change_object(client: Minio, bucket: str, name: str) -> None:
    """Overwrite a page's object but keep its metadata."""
    head = client.stat_object(bucket, name).metadata or {}
    own: dict[str, str | list[str] | tuple[str]] = {
        key: value for key, value in head.items() if key.lower().startswith("x-amz-meta-")
    }
    client.put_object(bucket, name, io.BytesIO(b"no page"), 7, metadata=own)


def test_verify_finds_a_changed_byte_on_either_tier(run: Run, environ: dict[str, str]) -> None:
    with running_agent(environ) as client:
        chain = spill_chain(client)
        refused = run("verify")
        assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
        assert "in use by another agent" in refused.err
    assert run("verify").status == 0
    segment = next((Path(environ["MEMKV_NVME_DIRECTORY"]) / "segments").iterdir())
    with segment.open("r+b") as stream:
        stream.seek(stream.read().find(page_content(chain.keys()[4], PAGE)) + 100)
        stream.write(b"changed")
    bucket = bucket_of(environ)
    listed = bucket.names(f"{chain.namespace.hex()}/", recursive=True)
    name = next(name for name in listed if name.endswith(chain.hashes[7].hex()))
    change_object(bucket.administration(), environ["MEMKV_MINIO_BUCKET"], name)
    outcome = run("verify")
    assert outcome.status == 1
    corrupt = [line for line in outcome.out.splitlines() if "corrupt" in line]
    assert len(corrupt) == 2
    assert corrupt[0].startswith("nvme") and chain.hashes[4].hex() in corrupt[0]
    assert corrupt[1].startswith("minio") and chain.hashes[7].hex() in corrupt[1]
    assert "nvme: 11 of 12 pages" in outcome.out
    assert "memkv verify --repair" in outcome.out
    repaired = run("verify", "--repair")
    assert (repaired.status, "nvme: 1 bad pages were quarantined" in repaired.out) == (1, True)
    again = run("verify")
    assert again.status == 0
    assert "nvme: 11 of 11 pages" in again.out


def test_verify_with_a_smaller_capacity_removes_nothing(run: Run, environ: dict[str, str]) -> None:
    with running_agent(environ) as client:
        spill_chain(client)
    for options in ((), ("--repair",)):
        told = run("verify", *options, MEMKV_NVME_CAPACITY="1MiB", MEMKV_MINIO_ENDPOINT="")
        assert (told.status, "nvme: 12 of 12 pages" in told.out) == (0, True), told


def test_verify_reports_unused_files_and_namespaces(run: Run, environ: dict[str, str]) -> None:
    with running_agent(environ) as client:
        chain = spill_chain(client)
    directory = Path(environ["MEMKV_NVME_DIRECTORY"])
    (directory / "segments" / "00000777.seg").write_bytes(b"damaged")
    (directory / "namespaces" / f"{chain.namespace.hex()}.json").unlink()
    outcome = run("verify", MEMKV_MINIO_ENDPOINT="")
    assert outcome.status == 0
    assert "segments/00000777.seg" in outcome.out
    assert f"{chain.namespace.hex()} has pages but no description" in outcome.out


def test_verify_reports_in_one_line_that_minio_is_down(run: Run) -> None:
    outcome = run("verify", MEMKV_MINIO_ENDPOINT="http://127.0.0.1:1")
    assert (outcome.status, outcome.out) == (
        1,
        "minio: cannot be checked: http://127.0.0.1:1 does not answer: Connection refused; "
        "start MinIO, or correct the port in minio.endpoint\n",
    )


def test_repair_rebuilds_the_index_from_the_pages(
    run: Run, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_agent(environ) as client:
        spill_chain(client)
    with monkeypatch.context() as patch:
        patch.setattr(
            "memkv_sglang.tiers.nvme.verify.disagreements", lambda _: ["slot 1 is taken twice"]
        )
        told = run("verify")
        assert (told.status, "memkv verify --repair" in told.out) == (1, True)
        repaired = run("verify", "--repair")
        assert (repaired.status, "rebuilt the index" in repaired.out) == (1, True)
    tier = NvmeTier(config_of(environ).nvme)
    try:  # according to the old index, all pages had been uploaded
        assert len(list(tier.pending())) == PAGES
    finally:
        tier.close()
    sound = run("verify")
    assert sound.status == 0
    assert "nvme: 12 of 12 pages" in sound.out


def test_verify_creates_no_directory(run: Run, environ: dict[str, str]) -> None:
    run("verify")
    assert not Path(environ["MEMKV_NVME_DIRECTORY"]).exists()


def test_two_agents_cannot_share_a_directory(
    environ: dict[str, str], agent: AgentClient, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    second = start(
        {**environ, "MEMKV_AGENT_SOCKET": str(tmp_path / "other" / "agent.sock")}, "agent"
    )
    _, errors = second.communicate(timeout=LIMIT)
    assert (second.returncode, errors.count("\n")) == (2, 1), errors
    assert f"nvme.directory: {environ['MEMKV_NVME_DIRECTORY']} is in use" in errors
    assert list((tmp_path / "other").iterdir()) == []
    assert agent.status() is not None


def test_doctor_passes_on_a_healthy_node(
    run: Run, environ: dict[str, str], agent: AgentClient
) -> None:
    spill_chain(agent)
    before = kept_names(environ)
    outcome = run("doctor", "--json")
    assert outcome.status == 0, outcome.out
    found = levels(outcome.out)
    # Limits, huge pages, O_DIRECT, a compiler and withheld CPUs depend on the machine.
    machines = ("huge pages", "O_DIRECT", "installation", "open files", "aio", "memlock", "cpus")
    sound = {what: level for what, level in found.items() if what not in machines}
    assert sound.keys() == {
        "settings", "directory", "free space", "memfd", "socket", "agent", "tier", "in force",
        "MinIO", "clock", "credentials", "list", "put", "page size", "get", "delete", "pins",
        "conditions", "copy", "listing", "removal", "versions", "connections", "lifecycle",
    }  # fmt: skip
    assert sound.pop("lifecycle") == "skip"  # a node has no permission to read the rule
    assert set(sound.values()) == {"ok"}
    assert kept_names(environ) == before


def kept_names(environ: dict[str, str]) -> list[str]:
    """Return the names in the bucket except those that probes and the agent's rounds may change."""
    names = bucket_of(environ).names("", recursive=True)
    folders = ("probe/", "logs/", "index/", "shards/", "collector/")
    return [name for name in names if not name.startswith(folders)]


@pytest.mark.parametrize(("reason", "level"), [("", "ok"), ("no such module", "warn")])
def test_doctor_warns_about_an_installation_without_compiled_loop(
    run: Run, monkeypatch: pytest.MonkeyPatch, reason: str, level: str
) -> None:
    monkeypatch.setattr("memkv_sglang.cli.checks.compiled.WHY_NOT", reason)
    outcome = run("doctor", "--json")
    assert levels(outcome.out)["installation"] == level
    assert ("python3-dev" in outcome.out) == bool(reason)


def test_doctor_creates_nothing(run: Run, environ: dict[str, str]) -> None:
    outcome = run("doctor", "--json")
    assert outcome.status == 0
    assert levels(outcome.out)["bucket"] == "warn"
    assert not Path(environ["MEMKV_NVME_DIRECTORY"]).exists()
    assert list(Path(environ["MEMKV_AGENT_SOCKET"]).parent.iterdir()) == []
    assert "does not exist yet" in run("doctor").out


@pytest.mark.parametrize(
    ("variables", "what", "advice"),
    [
        ({"MEMKV_MINIO_ENDPOINT": "http://127.0.0.1:1"}, "MinIO", "start MinIO"),
        ({"MEMKV_MINIO_SECRET_KEY": "another-secret"}, "list", "minio.secret_key"),
        ({"MEMKV_MINIO_ACCESS_KEY": "another-key"}, "list", "minio.access_key"),
        ({"MEMKV_MINIO_CREATE_BUCKET": "false"}, "bucket", "minio.create_bucket"),
        ({"MEMKV_NVME_CAPACITY": "1000PiB"}, "capacity", "set less"),
        ({"MEMKV_NVME_DIRECTORY": "/dev/null/nvme"}, "directory", "choose another"),
        ({"MEMKV_MINIO_CA_FILE": "/dev/null"}, "ca_file", "PEM"),
        ({"MEMKV_MINIO_ENDPOINT": "", "MEMKV_NVME_DIRECTORY": ""}, "settings", "set at least one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_doctor_fails_with_advice(
    run: Run, variables: dict[str, str], what: str, advice: str
) -> None:
    outcome = run("doctor", "--json", **variables)
    assert outcome.status == 1
    failed = [finding for finding in json.loads(outcome.out) if finding["level"] == "FAIL"]
    assert [finding["what"] for finding in failed] == [what]
    assert advice in failed[0]["advice"]


def test_bench_measures_both_tiers_and_cleans_up(
    run: Run, environ: dict[str, str], agent: AgentClient, tmp_path: Path
) -> None:
    chain = spill_chain(agent)
    objects = kept_names(environ)
    files = sorted(path for path in tmp_path.rglob("*"))
    outcome = run("bench", "--volume", "1MiB", "--page", "64KiB", "--page", "256KiB", "--json")
    assert outcome.status == 0, outcome.err
    results = json.loads(outcome.out)
    measured = [(result["tier"], result["page_bytes"] >> 10) for result in results]
    assert measured == [("nvme", 64), ("nvme", 256), ("minio", 64), ("minio", 256)]
    assert all(0 < result["load_p50_s"] <= result["load_p99_s"] for result in results)
    assert all(result["spill_gb_s"] > 0 and result["load_gb_s"] > 0 for result in results)
    assert kept_names(environ) == objects
    assert sorted(path for path in tmp_path.rglob("*")) == files
    assert agent.lookup(chain).length == PAGES


def test_bench_rejects_invalid_sizes(run: Run, environ: dict[str, str]) -> None:
    for arguments in (["--page", "1parsec"], ["--page", "1B"], ["--page", "1GiB"]):
        outcome = run("bench", *arguments)
        assert (outcome.status, outcome.err.count("\n")) == (2, 1)
        assert "--page" in outcome.err
    assert not Path(environ["MEMKV_NVME_DIRECTORY"]).exists()


def test_no_command_shows_a_secret(
    run: Run, environ: dict[str, str], minio_server: MinioServer, agent: AgentClient
) -> None:
    spill_chain(agent)
    secrets = (minio_server.secret_key, minio_server.access_key, "wrong-secret")
    said = [
        run(*command, **variables)
        for command in (
            ["config"],
            ["config", "--json"],
            ["doctor"],
            ["doctor", "--json"],
            ["stats", "--json"],
            ["inspect"],
            ["verify"],
            ["bench", "--volume", "64KiB", "--page", "64KiB"],
            ["config", "--help"],
            ["config", "--minio-secret-key", "wrong-secret"],
            ["config", "--minio-endpoint", "http://me:wrong-secret@minio:9000"],
        )
        for variables in ({}, {"MEMKV_MINIO_SECRET_KEY": "wrong-secret"})
    ]
    for outcome in said:
        for text in (outcome.out, outcome.err):
            assert not any(secret in text for secret in secrets), text
    assert not any(secret in repr(config_of(environ)) for secret in secrets)

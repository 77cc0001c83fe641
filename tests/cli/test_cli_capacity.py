"""`memkv gc`, `bucket`, `pin`, `unpin`, `pins` and `warm`, on a real bucket with a real agent."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from memkv_testbed.minio_server import MinioServer
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from minio.versioningconfig import VersioningConfig

from memkv_sglang.cli.listing.nvme import NvmeListing
from memkv_sglang.client.client import AgentClient
from memkv_sglang.page_hash import page_hashes
from memkv_sglang.testing.pages import make_chain, make_namespace
from tests.cli.cli_node import LIMIT, PAGE, PAGES, Run, running_agent, spill_chain


@pytest.fixture
def root(minio_server: MinioServer) -> Minio:
    return Minio(minio_server.endpoint.partition("://")[2], *minio_server.root, secure=False)


@pytest.fixture
def as_root(minio_server: MinioServer) -> dict[str, str]:
    keys = minio_server.root
    return {
        "MEMKV_MINIO_ACCESS_KEY": keys.access_key,
        "MEMKV_MINIO_SECRET_KEY": keys.secret_key,
    }


def hashes_of_the_chain() -> str:
    """Return the page hashes of the chain that `spill_chain` stores."""
    return ",".join(page.hex() for page in make_chain(make_namespace(PAGE), PAGES).hashes)


# gc


def test_gc_shows_and_then_removes_pages_above_the_capacity(run: Run, agent: AgentClient) -> None:
    spill_chain(agent)
    capacity = ("--collector-capacity", str(4 * PAGE))
    told = run("gc", "--dry-run", *capacity)
    assert (told.status, told.err) == (0, "")
    assert told.out.startswith(f"would remove: {PAGES - 3} pages")
    done = run("gc", *capacity, "--json")
    assert done.status == 0
    assert json.loads(done.out) == {
        "pages": 3,
        "bytes": 3 * PAGE,
        "removed_pages": PAGES - 3,
        "removed_bytes": (PAGES - 3) * PAGE,
        "kept_pages": 0,
        "dry_run": False,
    }


def test_gc_without_limits_names_them(run: Run) -> None:
    outcome = run("gc")
    assert outcome.status == 2
    assert "collector.capacity" in outcome.err
    assert "set one" in outcome.err


# bucket


def test_setup_creates_the_bucket_and_keeps_other_lifecycle_rules(
    run: Run, root: Minio, as_root: dict[str, str], environ: dict[str, str]
) -> None:
    name = environ["MEMKV_MINIO_BUCKET"]
    root.make_bucket(name)
    foreign = Rule(
        ENABLED, rule_id="foreign", rule_filter=Filter(prefix="x/"), expiration=Expiration(days=3)
    )
    root.set_bucket_lifecycle(name, LifecycleConfig([foreign]))
    for days in (30, 10):
        outcome = run("bucket", "setup", "--days", str(days), **as_root)
        assert (outcome.status, outcome.err) == (0, "")
    lifecycle = root.get_bucket_lifecycle(name)
    assert lifecycle is not None
    rules = {rule.rule_id: rule.expiration for rule in lifecycle.rules}
    assert {key: rule.days for key, rule in rules.items() if rule} == {"foreign": 3, "memkv": 10}


def test_setup_warns_about_versioning_and_expires_old_versions(
    run: Run, root: Minio, as_root: dict[str, str], environ: dict[str, str]
) -> None:
    name = environ["MEMKV_MINIO_BUCKET"]
    root.make_bucket(name)
    root.set_bucket_versioning(name, VersioningConfig(ENABLED))
    outcome = run("bucket", "setup", **as_root)
    assert outcome.status == 0
    assert "versioning is enabled" in outcome.err
    lifecycle = root.get_bucket_lifecycle(name)
    assert lifecycle is not None
    expiration = lifecycle.rules[0].noncurrent_version_expiration
    assert expiration is not None
    assert expiration.noncurrent_days == 1
    assert "versions" in run("doctor").out


def test_setup_fails_for_a_bucket_with_object_lock(
    run: Run, root: Minio, as_root: dict[str, str], environ: dict[str, str]
) -> None:
    root.make_bucket(environ["MEMKV_MINIO_BUCKET"], object_lock=True)
    outcome = run("bucket", "setup", **as_root)
    assert outcome.status == 1
    assert "has object lock" in outcome.err.splitlines()[-1]


def test_setup_with_a_nodes_keys_asks_for_an_administrators(run: Run) -> None:
    outcome = run("bucket", "setup")
    assert outcome.status == 1
    assert "administrator" in outcome.err


def test_policies_are_printed_and_added(
    run: Run, as_root: dict[str, str], environ: dict[str, str]
) -> None:
    reader = json.loads(run("bucket", "policy", "--reader").out)
    actions = [action for part in reader["Statement"] for action in part["Action"]]
    assert actions == ["s3:ListBucket", "s3:GetObject"]
    added = run("bucket", "setup", "--add-policies", **as_root)
    assert added.status == 0
    assert f"memkv-{environ['MEMKV_MINIO_BUCKET']}-reader: added" in added.out


def test_doctor_requires_fewer_permissions_for_a_reader(
    run: Run, root: Minio, environ: dict[str, str]
) -> None:
    root.make_bucket(environ["MEMKV_MINIO_BUCKET"])
    outcome = run("doctor", "--minio-role", "reader")
    assert "a reader needs no more" in outcome.out


# Pins


def test_a_pinned_chain_is_kept_until_it_is_unpinned(run: Run, agent: AgentClient) -> None:
    spill_chain(agent)
    pinned = run(
        "pin", "--chain", hashes_of_the_chain(), "--for", "1h", "--note", "our system prompt"
    )
    assert (pinned.status, pinned.err) == (0, "")
    listed = json.loads(run("pins", "--json").out)
    assert [(pin["pages"], pin["note"]) for pin in listed] == [(PAGES, "our system prompt")]
    assert 3500 < listed[0]["seconds_left"] <= 3600
    kept = run("gc", "--collector-capacity", "1")
    assert kept.status == 1
    assert "pinned pages exceed" in kept.err
    assert run("unpin", listed[0]["name"]).status == 0
    assert run("unpin", listed[0]["name"]).status == 1
    assert run("gc", "--collector-capacity", "1").out.startswith(f"removed: {PAGES} pages")


class _Sglang(BaseHTTPRequestHandler):
    """The two endpoints of an SGLang server that the command uses."""

    def do_GET(self) -> None:
        self._answer({"page_size": 64, "speculative_algorithm": None})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer({"tokens": [ord(letter) for letter in body["prompt"]]})

    def _answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Sglang) as httpd:
        Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_prompt_is_pinned_by_text_or_by_tokens(run: Run, agent: AgentClient, server: str) -> None:
    spill_chain(agent)  # describes a namespace with 64 tokens per page
    text = "You are a helpful assistant. " * 10
    by_text = run("pin", "--text", text, "--server", server)
    tokens = ",".join(str(ord(letter)) for letter in text)
    by_tokens = run("pin", "--tokens", tokens, "--server", server)
    hashes = page_hashes([ord(letter) for letter in text], 64)
    by_chain = run("pin", "--chain", ",".join(page.hex() for page in hashes))
    assert by_text.status == 0
    assert by_text.out.split()[:4] == by_tokens.out.split()[:4] == by_chain.out.split()[:4]
    assert f"keeps {len(text) // 64} pages" in by_text.out
    salted = run("pin", "--text", text, "--server", server, "--salt", "tenant")
    assert salted.out.split()[0] != by_text.out.split()[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "one of --text"),
        (("--text", "a", "--tokens", "1"), "one of --text"),
        (("--chain", "abc"), "64 hex digits"),
        (("--tokens", "1,x", "--server", "http://127.0.0.1:9"), "no answer"),
        (("--chain", "0" * 64, "--for", "soon"), "--for"),
    ],
)
def test_an_invalid_prompt_is_one_line(
    run: Run, agent: AgentClient, arguments: tuple[str, ...], complaint: str
) -> None:
    spill_chain(agent)
    outcome = run("pin", *arguments)
    assert outcome.status in (1, 2)
    assert complaint in outcome.err
    assert outcome.err.count("\n") == 1


# Warm


def test_warm_copies_a_chain_to_a_nodes_disk(
    run: Run, agent: AgentClient, environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    chain = spill_chain(agent)
    home = tmp_path_factory.mktemp("other")
    (home / "run").mkdir(mode=0o700)
    other = {
        **environ,
        "MEMKV_AGENT_SOCKET": str(home / "run" / "agent.sock"),
        "MEMKV_NVME_DIRECTORY": str(home / "nvme"),
    }
    with running_agent(other) as client:
        assert not any(client.present(chain, LIMIT, "nvme"))
        outcome = run("warm", "--chain", hashes_of_the_chain(), **other)
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out == f"{PAGES} pages copied, 0 already stored, 0 not copied\n"
        assert all(client.present(chain, LIMIT, "nvme"))
        assert NvmeListing(home / "nvme").namespaces() == {chain.namespace: make_namespace(PAGE)}
        again = run("warm", "--chain", f"{hashes_of_the_chain()},{'0' * 64}", **other)
        assert again.status == 1
        assert again.out == f"0 pages copied, {PAGES} already stored, 1 not copied\n"

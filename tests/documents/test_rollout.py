"""Follow the rollout page: two agents, a MinIO with TLS, and users with the policy of nodes."""

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from memkv_testbed.certificates import Authority
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.minio_users import Keys

from tests.agent.agent_harness import eventually
from tests.cli.cli_node import LIMIT, PAGES, Outcome, running_agent, spill_chain, start
from tests.documents.pages import blocks, commands

PAGE = "docs/rollout.md"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[MinioServer]:
    certificate = authority.issue("server")
    with MinioServer(certs_dir=certificate.cert_file.parent) as server:
        yield server


def memkv(environ: dict[str, str], *words: str) -> Outcome:
    process = start(environ, *words, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=LIMIT)
    return Outcome(process.returncode, out, err)


def words_after(*beginning: str) -> tuple[str, ...]:
    """Return the arguments of the page's only command that begins with these words."""
    (found,) = {
        command.words[1:]
        for command in commands()
        if command.place.startswith(PAGE) and command.words[: len(beginning)] == beginning
    }
    return found


def make_node(home: Path, server: MinioServer, authority: Authority) -> dict[str, str]:
    """Write the files of steps 1 to 3; return the node's variables."""
    keys = Keys(home.name, secrets.token_hex(20))
    server.users.add_with(keys, words_after("mc", "admin", "policy", "attach")[4])
    home.mkdir(mode=0o700)
    content = words_after("printf", 'access_key = "%s"\\nsecret_key = "%s"\\n')[0]
    credentials = home / "credentials.toml"
    credentials.touch(0o600)
    credentials.write_text(content.replace("\\n", "\n") % keys)
    (config,) = (b.text for b in blocks() if b.place.startswith(PAGE) and b.language == "toml")
    for written, here in {
        "https://minio.example:9000": server.endpoint,
        "/etc/memkv/ca.pem": str(authority.file),
        "/etc/memkv/credentials.toml": str(credentials),
        "/nvme0": str(home / "nvme0"),
        "/nvme1": str(home / "nvme1"),
        '"3TiB"': '"64MiB"',
        '"0.0.0.0"': '"127.0.0.1"',
        "9109": "0",
    }.items():
        assert written in config
        config = config.replace(written, here)
    (home / "config.toml").write_text(config)
    return {
        "MEMKV_CONFIG": str(home / "config.toml"),
        "MEMKV_AGENT_SOCKET": str(home / "agent.sock"),
    }


@pytest.mark.slow
def test_the_page_leads_to_nodes_that_share_pages(
    server: MinioServer, authority: Authority, tmp_path: Path
) -> None:
    administrator = {
        "MEMKV_CONFIG": "",
        "MEMKV_MINIO_ENDPOINT": server.endpoint,
        "MEMKV_MINIO_CA_FILE": str(authority.file),
        "MEMKV_MINIO_ACCESS_KEY": server.root.access_key,
        "MEMKV_MINIO_SECRET_KEY": server.root.secret_key,
    }
    done = memkv(administrator, *words_after("memkv", "bucket", "setup"))
    assert (done.status, done.err) == (0, ""), done
    nodes = [make_node(tmp_path / name, server, authority) for name in ("node1", "node2")]
    with ExitStack() as stack:
        one, other = (stack.enter_context(running_agent(node)) for node in nodes)
        for node in nodes:
            diagnosis = memkv(node, "doctor")
            assert diagnosis.status == 0, diagnosis.out
        chain = spill_chain(one)
        eventually(lambda: other.lookup(chain, 4.0).length == PAGES)
        assert chain.namespace.hex() in memkv(nodes[1], "inspect").out
        assert memkv(nodes[1], "gc", "--dry-run").status == 0
    cleared = memkv(administrator, *words_after("memkv", "clear", "--bucket"), "--yes")
    assert cleared.status == 0, cleared.err
    assert str(PAGES) in cleared.out

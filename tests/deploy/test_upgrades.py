"""The oldest release's agent and client, against those of this checkout, in both directions.

The client uses only names that a release promises to keep (`memkv_sglang.__all__`).
"""

import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from memkv_testbed.minio_server import MinioServer

from tests.agent.agent_harness import LIMIT, eventually
from tests.versions import AGENT, ROOT, oldest_release, start, unpack

PAGES = 8

CLIENT = """
import json, mmap, os, sys, time
from memkv_sglang import AgentClient, Buffer, Chain, LoadResult, Namespace, SpillResult, load_config

COUNT, SIZE = int(sys.argv[2]), 65536
namespace = Namespace(
    model="upgrade", kv_dtype="uint8", layout="flat", page_size=64, page_bytes=SIZE, layers=(0, 1)
)
chain = Chain(namespace.digest, [bytes([page + 1]) * 32 for page in range(COUNT)])
content = b"".join(bytes([page + 101]) * SIZE for page in range(COUNT))
pool = os.memfd_create("pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
os.ftruncate(pool, COUNT * SIZE)
memory = mmap.mmap(pool, COUNT * SIZE)
seen = {"problem": "", "stored": 0, "loaded": 0, "tier": ""}
client = AgentClient(load_config(None), start=False)
give_up = time.monotonic() + 30
while not client.wait(0.1) and "protocol version" not in client.problem:
    assert time.monotonic() < give_up, client.problem
seen["problem"] = client.problem
if client.wait(0):
    number = client.register_pool(pool, COUNT * SIZE)
    buffers = [[Buffer(number, page * SIZE, SIZE)] for page in range(COUNT)]
    client.describe(namespace)
    if sys.argv[1] == "store":
        memory[:] = content
        seen["stored"] = client.spill(chain, buffers).count(SpillResult.STORED)
        assert client.flush(30.0)
    while client.lookup(chain, 4.0).length < COUNT and time.monotonic() < give_up:
        time.sleep(0.1)  # the tiers are still opening
    memory[:] = bytes(COUNT * SIZE)
    loads = client.load(chain, buffers)
    seen["loaded"] = sum(load.result is LoadResult.LOADED for load in loads)
    seen["tier"] = loads[0].tier
    assert seen["loaded"] < COUNT or memory[:] == content
client.close()
print(json.dumps(seen))
"""

pytestmark = pytest.mark.slow


class Seen(msgspec.Struct, frozen=True):
    """What a client reports."""

    problem: str
    stored: int
    loaded: int
    tier: str


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the package of the oldest release."""
    tag = oldest_release()
    if not tag:
        pytest.skip("the repository has no tag of a release yet")
    target = tmp_path_factory.mktemp("release")
    unpack(tag, target)
    return target


@pytest.fixture(params=["to this version", "back to the release"])
def versions(request: pytest.FixtureRequest, release: Path) -> tuple[Path, Path]:
    """Return the version that comes first, and the one after it."""
    return (release, ROOT) if request.param == "to this version" else (ROOT, release)


@pytest.fixture
def node(tmp_path: Path, minio_server: MinioServer) -> "Node":
    return Node(tmp_path, minio_server)


class Node:
    """The settings of a node with both tiers."""

    def __init__(self, home: Path, server: MinioServer) -> None:
        (home / "run").mkdir(mode=0o700, parents=True)
        self.socket = home / "run" / "agent.sock"
        self._server = server
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ["HOME"],
            "MEMKV_CONFIG": "",
            "MEMKV_AGENT_SOCKET": str(self.socket),
            "MEMKV_NVME_DIRECTORY": str(home / "nvme"),
            "MEMKV_NVME_CAPACITY": "64MiB",
            "MEMKV_MINIO_ENDPOINT": server.endpoint,
            "MEMKV_MINIO_BUCKET": f"upgrade-{uuid.uuid4().hex}",
            "MEMKV_MINIO_ACCESS_KEY": server.access_key,
            "MEMKV_MINIO_SECRET_KEY": server.secret_key,
        }

    def other(self, home: Path) -> "Node":
        """Return a node with an empty disk that uses the same bucket."""
        other = Node(home, self._server)
        other.environ["MEMKV_MINIO_BUCKET"] = self.environ["MEMKV_MINIO_BUCKET"]
        return other

    @contextmanager
    def agent(self, root: Path) -> Iterator[None]:
        """Run the agent of a version."""
        agent = start(root, AGENT, self.environ)
        try:
            eventually(lambda: self.socket.exists() or agent.poll() is not None)
            assert agent.poll() is None
            yield
            agent.terminate()
            assert agent.wait(LIMIT) == 0
        finally:
            agent.kill()

    def ask(self, root: Path, what: str) -> Seen:
        """Let a client of a version store or load the pages."""
        client = start(root, CLIENT, self.environ, what, str(PAGES))
        try:
            out, _ = client.communicate(timeout=3 * LIMIT)
        except subprocess.TimeoutExpired:
            client.kill()
            raise
        return msgspec.json.decode(out, type=Seen)


def protocol_of(root: Path) -> str:
    source = (root / "memkv_sglang" / "agent" / "protocol.py").read_text()
    found: Any = re.search(r"^PROTOCOL_VERSION = (\d+)", source, re.MULTILINE)
    return str(found[1])


def test_agent_and_client_of_two_versions(versions: tuple[Path, Path], node: Node) -> None:
    """They work together, or the client says in one line which versions they have."""
    older, newer = versions
    with node.agent(older):
        seen = node.ask(newer, "store")
    if protocol_of(older) == protocol_of(newer):
        assert seen == Seen("", PAGES, PAGES, "nvme")
    else:
        assert "\n" not in seen.problem
        assert f"protocol version {protocol_of(older)}" in seen.problem
        assert f"this client {protocol_of(newer)}" in seen.problem


def test_a_version_loads_what_another_stored(
    versions: tuple[Path, Path], node: Node, tmp_path: Path
) -> None:
    """From the same disk after an upgrade or downgrade, and from the bucket on another node."""
    before, after = versions
    with node.agent(before):
        assert node.ask(before, "store") == Seen("", PAGES, PAGES, "nvme")
    with node.agent(after):
        assert node.ask(after, "load") == Seen("", 0, PAGES, "nvme")
    other = node.other(tmp_path / "other")
    with other.agent(after):
        assert other.ask(after, "load") == Seen("", 0, PAGES, "minio")

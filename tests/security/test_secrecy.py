"""A full run reveals no secret: not in logs, metrics, arguments, errors or a crash."""

import base64
import os
import secrets
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_hashes, make_namespace
from tests.agent.agent_harness import eventually
from tests.cli.cli_node import LIMIT, spill_chain

PROGRAM = "import sys; from memkv_sglang.cli.main import main; sys.exit(main())"
COMMANDS = (
    ["config"],
    ["config", "--json"],
    ["doctor"],
    ["stats", "--json"],
    ["inspect"],
    ["verify"],
    ["bench", "--volume", "64KiB", "--page", "64KiB"],
    ["no-such-command"],
    ["config", "--minio-secret-key", "given-by-flag"],
)


class Node(NamedTuple):
    """A node with all secrets in files, and the output it has produced."""

    directory: Path
    environ: Mapping[str, str]
    secrets: list[str]
    said: Path

    def run(self, *arguments: str) -> None:
        """Run a command, and keep its output and its processes' arguments."""
        with self.said.open("ab") as said:
            process = self.start(arguments, said.fileno())
            said.write(b"\n".join(arguments_of(process.pid)))
            process.wait(LIMIT)

    def start(self, arguments: tuple[str, ...], output: int) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            env={**self.environ},
            stdout=output,
            stderr=output,
        )

    def note(self, text: bytes) -> None:
        with self.said.open("ab") as said:
            said.write(text)


def arguments_of(pid: int) -> Iterator[bytes]:
    """Yield the arguments of a process and its children."""
    yield Path(f"/proc/{pid}/cmdline").read_bytes()
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from arguments_of(int(child))


def ask(url: str) -> bytes:
    """Return the agent's whole response: status, header fields and content."""
    try:
        answer = urllib.request.urlopen(url)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        content: bytes = answer.read()
        return f"{answer.status} {answer.headers}".encode() + content


def write_private(path: Path, content: str) -> str:
    path.touch(0o600)
    path.write_text(content)
    return str(path)


@pytest.fixture
def node(tmp_path: Path, minio_config: MinioConfig) -> Node:
    key = secrets.token_hex(32)
    (tmp_path / "run").mkdir(mode=0o700)
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(Path(__file__).parents[2])),
        "PYTHONFAULTHANDLER": "1",
        "MEMKV_AGENT_SOCKET": str(tmp_path / "run" / "agent.sock"),
        "MEMKV_AGENT_LOG_LEVEL": "debug",
        "MEMKV_NVME_DIRECTORY": str(tmp_path / "nvme"),
        "MEMKV_NVME_CAPACITY": "64MiB",
        "MEMKV_NVME_SEGMENT_SIZE": "8MiB",
        "MEMKV_MINIO_ENDPOINT": minio_config.endpoint,
        "MEMKV_MINIO_BUCKET": minio_config.bucket,
        "MEMKV_MINIO_CREDENTIALS_FILE": write_private(
            tmp_path / "credentials.toml",
            f'access_key = "{minio_config.access_key}"\nsecret_key = "{minio_config.secret_key}"\n',
        ),
        "MEMKV_MINIO_ENCRYPTION_KEY_FILE": write_private(
            tmp_path / "keys.toml", f'write = "one"\n[keys]\none = "{key}"\n'
        ),
    }
    return Node(tmp_path, environ, [minio_config.secret_key, key], tmp_path / "said")


def test_a_run_reveals_no_secret(node: Node) -> None:
    config = load_config(None, {k: v for k, v in node.environ.items() if k[:6] == "MEMKV_"}, {})
    node.note(repr(config).encode())
    with node.said.open("ab") as said:
        agent = node.start(("agent",), said.fileno())
    client = AgentClient(config, start=False)
    try:
        assert client.wait(LIMIT), client.problem
        spill_chain(client)
        report = client.status()
        assert report is not None
        port = report.agent.http_port
        for command in COMMANDS:
            node.run(*command)
        # From here on the secret is wrong, so requests are rejected and commands fail.
        wrong = secrets.token_hex(16)
        node.secrets.append(wrong)
        write_private(
            node.directory / "credentials.toml",
            f'access_key = "{secrets.token_hex(8)}"\nsecret_key = "{wrong}"\n',
        )
        unknown = Chain(make_namespace(model="unknown").digest, make_hashes(3))
        eventually(lambda: not client.lookup(unknown).complete, LIMIT)
        for command in COMMANDS:
            node.run(*command)
        # An unreadable file, which every command must report.
        write_private(node.directory / "keys.toml", f"{node.secrets[1]}")
        for command in (["doctor"], ["verify"], ["agent"]):
            node.run(*command)
        for path in ("healthz", "readyz", "metrics", "no-such-path"):
            node.note(ask(f"http://127.0.0.1:{port}/{path}"))
        node.note(b"\n".join(arguments_of(agent.pid)))
    finally:
        client.close()
        agent.send_signal(signal.SIGABRT)  # a crash prints the stacks of all threads
        agent.wait(LIMIT)
    content = node.said.read_bytes()
    assert b"Fatal Python error" in content, "the crash was not seen"
    assert b"minio" in content and b"memkv_" in content, "logs and metrics were not seen"
    files = [path for path in node.directory.rglob("*") if path.is_file()]
    told = {path.name: path.read_bytes() for path in files if path.suffix != ".toml"}
    for secret in node.secrets:
        for form in (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"=")):
            assert [name for name, content in told.items() if form in content] == []
        assert not _raw(secret) or not any(_raw(secret) in content for content in told.values())


def _raw(secret: str) -> bytes:
    """Return the bytes of a hexadecimal key."""
    return bytes.fromhex(secret) if len(secret) == 64 else b""

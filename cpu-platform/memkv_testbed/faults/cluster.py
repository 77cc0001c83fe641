"""Two nodes that share a MinIO behind a fault proxy: one with a disk, one without."""

import io
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import msgspec
from minio import Minio, MinioAdmin
from minio.credentials.providers import StaticProvider

from memkv_sglang.config.schema import (
    KIB,
    MIB,
    AgentConfig,
    CollectorConfig,
    Config,
    EngineConfig,
    MinioConfig,
    NvmeConfig,
)
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_namespace
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention import BucketFormat
from memkv_testbed.faults.command import Command
from memkv_testbed.faults.faulty_agent import DISK_FAULT
from memkv_testbed.faults.node import Node
from memkv_testbed.faults.tally import Tally
from memkv_testbed.http_proxy import HttpFaultProxy
from memkv_testbed.minio_server import MinioServer

PAGE_BYTES = 16 * KIB
NAMESPACE = make_namespace(PAGE_BYTES)
DISK_BYTES = 512 * MIB
BUCKET = "faults"
SHARDS = 4
NO_LIMITS = CollectorConfig()

ENGINE = EngineConfig(breaker_cooldown=0.5, batch_deadline=2.0, upload_attempts=1000)
"""Settings with shorter times than the defaults, so that rounds are short. The lookup budget is the
default."""


class Cluster:
    """A running cluster. A context manager that leaves no process and no file behind.

    `disk_node` spills to its NVMe directory, and from there to MinIO. `plain_node` has no disk, so
    a fault of MinIO affects all its calls.
    """

    def __init__(
        self,
        minio: MinioServer | None = None,
        *,
        engine: EngineConfig = ENGINE,
        capacity: int = DISK_BYTES // 4 * 3,
        collector: CollectorConfig = NO_LIMITS,
    ) -> None:
        """Start everything.

        Args:
            minio: a running server; None to start one.
            engine: settings of both nodes.
            capacity: bytes of the NVMe tier.
            collector: limits of the bucket.

        """
        self.home = Path(tempfile.mkdtemp(prefix="memkv-faults-", dir="/var/tmp"))
        self.nodes: list[Node] = []
        self.mounted = False
        self.seen = Tally()
        """What clients saw that the fault itself has started."""
        self.acknowledged: list[Chain] = []
        """Chains that these clients stored."""
        self.violations: list[str] = []
        """Violations that concern no page, one line each."""
        self.commands: list[Command] = []
        """The commands that are running."""
        self.minio = minio or MinioServer()
        self._own_minio = minio is None
        self.collector = collector
        try:
            self._start(engine, capacity)
        except BaseException:
            self.close()
            raise

    def _start(self, engine: EngineConfig, capacity: int) -> None:
        if self._own_minio:
            self.minio.start()
        target = urlsplit(self.minio.endpoint)
        assert target.hostname and target.port
        self.proxy = HttpFaultProxy(target.hostname, target.port)
        self.admin = MinioAdmin(
            endpoint=target.netloc,
            credentials=StaticProvider(*self.minio.root),
            secure=False,
        )
        self._make_bucket(target.netloc)
        self.access_key, self.secret_key = secrets.token_hex(8), secrets.token_hex(16)
        self.admin.user_add(self.access_key, self.secret_key)
        self.admin.attach_policy(["readwrite"], user=self.access_key)
        self.disk_fault = self.home / "disk-fault"
        os.environ[DISK_FAULT] = str(self.disk_fault)  # clients pass it on to the agents they start
        self.disk = self.home / "disk"
        self.mounted = mount_disk(self.disk)
        self.pages = self.disk / "pages"
        nvme = NvmeConfig(directory=str(self.pages), capacity=capacity, segment_size=4 * MIB)
        self.disk_node = self._add("disk", engine, nvme)
        self.plain_node = self._add("plain", engine, NvmeConfig())

    def _make_bucket(self, netloc: str) -> None:
        """Create the bucket with few shards, so that a collection ends between two faults."""
        storage = Minio(netloc, *self.minio.root, secure=False)
        if not storage.bucket_exists(BUCKET):
            storage.make_bucket(BUCKET)
        record = msgspec.json.encode(BucketFormat(shards=SHARDS))
        storage.put_object(BUCKET, ObjectNames("").format, io.BytesIO(record), len(record))

    def _add(self, name: str, engine: EngineConfig, nvme: NvmeConfig) -> Node:
        config = Config(
            # An agent that is left behind ends by itself.
            agent=AgentConfig(
                socket=str(self.home / f"{name}-run" / "agent.sock"),
                drain_timeout=0.0,
                idle_timeout=30.0,
            ),
            engine=engine,
            nvme=nvme,
            minio=MinioConfig(
                endpoint=self.proxy.url,
                bucket=BUCKET,
                access_key=self.access_key,
                secret_key=self.secret_key,
                stall_timeout=0.5,
                negative_ttl=0.0,
            ),
            collector=self.collector,
        )
        node = Node(config)
        self.nodes.append(node)
        node.client.describe(NAMESPACE)
        return node

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_command(self, *arguments: str) -> None:
        """Run `memkv` while the fault lasts. `finish_commands` waits for it."""
        self.commands.append(Command(self.plain_node.config, *arguments))

    def finish_commands(self) -> None:
        """Wait for all commands. A command that crashed or hung is a violation."""
        while self.commands:
            self.violations += self.commands.pop().finish()

    def log(self) -> str:
        """Return the logs of all agents."""
        return "".join(
            path.read_text(errors="replace") for path in sorted(self.home.glob("*/agent.log"))
        )

    def close(self) -> None:
        """Stop all processes and remove all files."""
        os.environ.pop(DISK_FAULT, None)
        self.finish_commands()
        for node in self.nodes:
            node.close()
        if hasattr(self, "proxy"):
            self.proxy.close()
        if self._own_minio:
            self.minio.close()
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=False)
        shutil.rmtree(self.home, ignore_errors=True)


def mount_disk(directory: Path) -> bool:
    """Mount a small ext4 file system in a new directory. If that fails, print why; return False."""
    directory.mkdir()
    image = directory.with_suffix(".img")
    try:
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        for command in (
            ["mkfs.ext4", "-q", "-m", "0", str(image)],
            ["mount", "-o", "loop", str(image), str(directory)],
        ):
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode(errors="replace").strip() or error
        print(f"{directory} is on the machine's own disk: {reason}", file=sys.stderr)
        image.unlink(missing_ok=True)
        return False
    return True

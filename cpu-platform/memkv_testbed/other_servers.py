"""Run private S3 servers other than MinIO."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from minio import Minio
from minio.error import MinioException
from typing_extensions import override
from urllib3.exceptions import HTTPError

from memkv_testbed.s3_server import S3Server, free_port
from memkv_testbed.server_binaries import find_or_build_versitygw, find_or_fetch_seaweedfs

READY_BUCKET = "ready"
"""Bucket that shows whether a starting server is ready."""


SOCKETS = Path("/tmp")  # noqa: S108 - the path is SeaweedFS's


class SeaweedServer(S3Server):
    """SeaweedFS: master, volume server, filer and S3 gateway in one process.

    Nodes use the administrator's keys.
    """

    name = "SeaweedFS"

    def __init__(self, data_dir: Path | None = None) -> None:
        """Prepare a server, without starting it."""
        super().__init__(data_dir)
        parts = ("master", "volume", "filer")
        self._ports = {part: free_port() for part in (*parts, "s3.grpc")}
        self._ports |= {f"{part}.grpc": free_port() for part in parts}

    @override
    def command(self) -> Sequence[str]:
        identity = {
            "name": "root",
            "credentials": [{"accessKey": self.root.access_key, "secretKey": self.root.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        settings = self.work / "s3.json"
        settings.write_text(json.dumps({"identities": [identity]}))
        ports = [
            f"-{part.partition('.')[0]}.port{'.grpc' * part.endswith('grpc')}={port}"
            for part, port in self._ports.items()
        ]
        return [
            str(find_or_fetch_seaweedfs()),
            "server",
            f"-dir={self.data_dir}",
            *(f"-ip={self.host}", f"-ip.bind={self.host}"),
            *("-master.telemetry=false", "-master.electionTimeout=1s"),
            *("-master.volumeSizeLimitMB=256", "-volume.max=1000"),
            *("-s3", f"-s3.port={self.port}", f"-s3.config={settings}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-{part}.localSocket={self.work}/{part}.sock" for part in ("s3", "filer")),
            *ports,
        ]

    @override
    def environment(self) -> Mapping[str, str]:
        # One volume per bucket is enough for tests, and faster to create than seven at a time.
        return {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}

    @override
    def close(self) -> None:
        super().close()
        for port in self._ports.values():  # SeaweedFS creates these sockets and leaves them behind.
            for path in SOCKETS.glob(f"seaweedfs-*-grpc-{port}.sock"):
                path.unlink(missing_ok=True)

    @override
    def is_ready(self) -> bool:
        """Return whether a new bucket accepts objects.

        The gateway is ready earlier than the volumes.
        """
        if not super().is_ready():
            return False
        client = Minio(f"{self.host}:{self.port}", *self.root, secure=False, region="us-east-1")
        try:
            if not client.bucket_exists(READY_BUCKET):
                client.make_bucket(READY_BUCKET)
            client.put_object(READY_BUCKET, "ready", io.BytesIO(b"ready"), 5)
            client.remove_object(READY_BUCKET, "ready")
            client.remove_bucket(READY_BUCKET)  # so that the next start creates new volumes
        except (MinioException, HTTPError):
            return False
        return True


class VersityServer(S3Server):
    """versitygw on a directory. Nodes use the administrator's keys."""

    name = "versitygw"

    def __init__(self, data_dir: Path | None = None, *, keep_alive: bool = False) -> None:
        """Prepare a server, without starting it.

        Without `keep_alive`, the server closes each connection after one response, as is its
        default.
        """
        super().__init__(data_dir)
        self._flags = ["--keep-alive"] if keep_alive else []

    @override
    def command(self) -> Sequence[str]:
        address = ("--port", f"{self.host}:{self.port}")
        binary = str(find_or_build_versitygw())
        return [binary, "--quiet", *address, *self._flags, "posix", str(self.data_dir)]

    @override
    def environment(self) -> Mapping[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("VGW_")}
        keys = self.root
        return {
            **inherited,
            "ROOT_ACCESS_KEY": keys.access_key,
            "ROOT_SECRET_KEY": keys.secret_key,
        }

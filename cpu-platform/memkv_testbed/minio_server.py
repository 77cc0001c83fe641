"""Run a private MinIO server for tests, demos and benchmarks."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from typing_extensions import override

from memkv_testbed.minio_users import Keys, MinioUsers
from memkv_testbed.s3_server import S3Server
from memkv_testbed.server_binaries import find_or_build_minio


class MinioServer(S3Server):
    """A MinIO server; see `S3Server`.

    `access_key` and `secret_key` belong to a user that has the nodes' policy (see
    `tiers/minio/admin/policy.py`) for every bucket and may create buckets.
    """

    name = "MinIO"

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        certs_dir: Path | None = None,
        no_compat: bool = False,
        env: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """Prepare a server, without starting it.

        `certs_dir` holds `public.crt` and `private.key`; with it, the server speaks https.
        `no_compat` passes `--no-compat`, which gives up strict S3 compatibility for speed. `env`
        adds variables, e.g. `MINIO_DOMAIN`. For the other arguments, see `S3Server`.
        """
        super().__init__(data_dir, host=host)
        self.access_key, self.secret_key = Keys.random()
        self.tls = certs_dir is not None
        self.volumes = [str(self.data_dir)]
        """The server's arguments that name its drives."""
        self._certs_dir = certs_dir or self.work / "certs"
        self._flags = ["--no-compat"] if no_compat else []
        self._env = dict(env or {})
        self._has_user = False

    @override
    def start(self) -> None:
        super().start()
        self.users.wait_until_loaded()
        if not self._has_user:
            self.users.add_node(Keys(self.access_key, self.secret_key))
            self._has_user = True

    @property
    def users(self) -> MinioUsers:
        """Adds users with their own policies."""
        return MinioUsers(f"{self.host}:{self.port}", self.root, tls=self.tls)

    @override
    def command(self) -> Sequence[str]:
        self._certs_dir.mkdir(parents=True, exist_ok=True)
        return [
            str(find_or_build_minio()),
            "server",
            "--quiet",
            *self._flags,
            *("--certs-dir", str(self._certs_dir)),
            *("--address", f"{self.host}:{self.port}"),
            *self.volumes,
        ]

    @override
    def environment(self) -> Mapping[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MINIO_")}
        own = {
            "MINIO_ROOT_USER": self.root.access_key,
            "MINIO_ROOT_PASSWORD": self.root.secret_key,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        }
        return inherited | own | self._env

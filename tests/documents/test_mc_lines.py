"""Run the lines for MinIO's client on the rollout page, from the first alias to the uninstallation.

Needs `mc` in `~/.cache/sglang-memkv/bin`
(`GOFLAGS=-mod=mod go install github.com/minio/mc@latest`). PATH is not searched, because Midnight
Commander has the same name.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from memkv_testbed.certificates import Authority
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.server_binaries import cache_directory

from tests.documents.pages import blocks

MC = cache_directory() / "mc"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MC.exists(), reason=f"needs {MC}")]


def block_with(text: str) -> str:
    """Return the rollout page's only shell block that contains a text."""
    (found,) = (
        block.text
        for block in blocks()
        if block.place.startswith("docs/rollout.md") and text in block.text
    )
    return found


class Administrator:
    """A shell in an empty home directory, with the administrator's keys."""

    def __init__(self, home: Path, server: MinioServer, authority: Authority) -> None:
        self._home = home
        self._server = server
        (home / "ca.pem").write_bytes(authority.file.read_bytes())

    def run(self, script: str) -> str:
        """Run a block of the page and return what it prints."""
        keys = self._server.root
        for written, here in {
            "https://minio.example:9000": self._server.endpoint,
            "ACCESS_KEY=...": f"ACCESS_KEY={keys.access_key}",
            "SECRET_KEY=...": f"SECRET_KEY={keys.secret_key}",
            "clear --bucket": "clear --bucket --yes",
        }.items():
            script = script.replace(written, here)
        done = subprocess.run(
            ["bash", "-euc", script],
            input=f"{keys.access_key}\n{keys.secret_key}\n",  # `mc alias set` asks for them
            cwd=self._home,
            env={
                "HOME": str(self._home),
                "PATH": f"{MC.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "MEMKV_CONFIG": "",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def test_users_are_made_and_removed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    authority = Authority(tmp_path)
    certificate = authority.issue("server")
    with MinioServer(certs_dir=certificate.cert_file.parent) as server:
        administrator = Administrator(tmp_path / "home", server, authority)
        setup = block_with("mc alias set")
        administrator.run(setup)
        administrator.run(block_with("mc admin user add"))
        assert "memkv-memkv" in administrator.run("mc admin user info cache node8")
        files = sorted((tmp_path / "home").glob("credentials-*.toml"))
        assert len(files) == 8
        assert all(file.stat().st_mode & 0o077 == 0 for file in files)
        exports = "\n".join(line for line in setup.splitlines() if line.startswith("export "))
        administrator.run(f"{exports}\n{block_with('mc rb --force')}")
        assert "node" not in administrator.run("mc admin user list cache")
        assert "memkv" not in administrator.run("mc admin policy list cache")
        assert "memkv" not in administrator.run("mc ls cache")

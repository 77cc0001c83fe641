"""The programs in examples/ work as their README says, and leave nothing behind."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from examples import client as example
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.minio import MinioTier
from tests.agent.agent_harness import eventually

ROOT = Path(__file__).parents[2]
LIMIT = 120.0


def run_example(folder: Path, *flags: str, **variables: str) -> list[str]:
    """Run examples/client.py with `folder` as its temporary directory; return its output."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "client.py"), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_nothing_left(folder: Path) -> None:
    """Check that neither files nor an agent are left."""
    assert list(folder.iterdir()) == []
    eventually(lambda: not processes_with(f"TMPDIR={folder}"))


def processes_with(variable: str) -> list[str]:
    """Return the ids of processes that were started with an environment variable."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's process, or one that has just ended
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
    return found


def test_pages_return_from_the_disk(tmp_path: Path) -> None:
    assert run_example(tmp_path) == [
        "spilled 8 of 8 pages",
        "found 8 pages, loaded 8 intact from nvme",
    ]
    assert_nothing_left(tmp_path)


def test_pages_return_from_minio(tmp_path: Path, minio_config: MinioConfig) -> None:
    output = run_example(
        tmp_path,
        *("--minio-endpoint", minio_config.endpoint),
        *("--minio-bucket", minio_config.bucket),
        *("--nvme-directory", ""),
        MEMKV_MINIO_ACCESS_KEY=minio_config.access_key,
        MEMKV_MINIO_SECRET_KEY=minio_config.secret_key,
    )
    assert output == ["spilled 8 of 8 pages", "found 8 pages, loaded 8 intact from minio"]
    assert_nothing_left(tmp_path)


def test_pages_are_uploaded_from_the_disk(tmp_path: Path, minio_config: MinioConfig) -> None:
    variables = {
        "MEMKV_MINIO_ACCESS_KEY": minio_config.access_key,
        "MEMKV_MINIO_SECRET_KEY": minio_config.secret_key,
    }
    flags = ["--minio-endpoint", minio_config.endpoint, "--minio-bucket", minio_config.bucket]
    output = run_example(tmp_path, *flags, **variables)
    assert output == ["spilled 8 of 8 pages", "found 8 pages, loaded 8 intact from nvme"]
    tier = MinioTier(minio_config)
    try:
        keys = example.chain().keys()
        eventually(lambda: all(tier.present(keys, time.monotonic() + 5)))
    finally:
        tier.close()
    assert_nothing_left(tmp_path)

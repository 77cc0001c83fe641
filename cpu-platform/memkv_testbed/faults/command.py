"""`memkv` commands that run while a fault lasts."""

import os
import subprocess
import sys

from memkv_sglang.config.schema import CollectorConfig, Config

LIMIT = 90.0
"""Seconds after which a command counts as hung. Most of them are for a busy machine."""

_LIMITED = {"gc": ("--timeout", "60s")}
"""Options of commands that may wait for other nodes."""

_A_DAY = CollectorConfig(max_age=86400, interval=1, lease_ttl=5)
"""Limits of commands if the agents have none. No page is old enough to be removed."""

_PROGRAM = "import sys; from memkv_sglang.cli.main import main; sys.exit(main())"


class Command:
    """A command that was started with a node's bucket, but without its disk and its agent."""

    def __init__(self, config: Config, *arguments: str) -> None:
        """Start the command."""
        self._arguments = arguments
        minio = config.minio
        limits = config.collector if config.collector.capacity else _A_DAY
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments, *_LIMITED.get(arguments[0], ())],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "MEMKV_MINIO_ENDPOINT": minio.endpoint,
                "MEMKV_MINIO_BUCKET": minio.bucket,
                "MEMKV_MINIO_ACCESS_KEY": minio.access_key,
                "MEMKV_MINIO_SECRET_KEY": minio.secret_key,
                "MEMKV_COLLECTOR_CAPACITY": str(limits.capacity),
                "MEMKV_COLLECTOR_MAX_AGE": f"{limits.max_age}s",
                "MEMKV_COLLECTOR_LEASE_TTL": f"{limits.lease_ttl}s",
                "MEMKV_COLLECTOR_INTERVAL": f"{limits.interval}s",
                "MEMKV_COLLECTOR_USE_PERIOD": f"{limits.use_period}s",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> list[str]:
        """Wait until the command ends; return its violations. A one-line error is not one."""
        name = " ".join(self._arguments)
        try:
            _, errors = self._process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return [f"memkv {name}: hung"]
        if self._process.returncode not in (0, 1) or "Traceback" in errors:
            return [f"memkv {name}: status {self._process.returncode}: {errors[-500:]}"]
        return []

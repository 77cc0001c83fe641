"""What of this installation is compiled."""

from collections.abc import Iterator

from memkv_sglang.cli.checks.finding import Finding
from memkv_sglang.tiers.minio.bulk.reader import WHY_NOT


def check_compiled() -> Iterator[Finding]:
    """Look whether there is a compiled loop for loads from MinIO."""
    if not WHY_NOT:
        yield Finding("ok", "installation", "the loop that loads from MinIO is compiled")
    else:
        yield Finding(
            "warn",
            "installation",
            f"the loop that loads from MinIO is not compiled, loads take more CPU: {WHY_NOT}",
            "install a C compiler and Python's headers (python3-dev), then this package again",
        )

"""What of this installation is compiled."""

from collections.abc import Iterator

from memkv_sglang.cli.checks.finding import Finding
from memkv_sglang.tiers.minio.objects.bulk_reader import WHY_NOT


def check_compiled() -> Iterator[Finding]:
    """Look whether there is a compiled loop for loads from MinIO that can be used."""
    if not WHY_NOT:
        yield Finding("ok", "installation", "the loop that loads from MinIO is compiled")
    else:
        yield Finding(
            "warn",
            "installation",
            f"no compiled loop loads from MinIO, which takes more CPU then: {WHY_NOT}",
            "install a C compiler, Python's headers (python3-dev) and xxhash from its wheel, then "
            "this package again",
        )

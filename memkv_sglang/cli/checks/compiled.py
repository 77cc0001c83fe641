"""Check that the compiled extension is usable."""

from collections.abc import Iterator

from memkv_sglang.finding import Finding
from memkv_sglang.tiers.minio.objects.bulk_reader import WHY_NOT


def check_compiled() -> Iterator[Finding]:
    """Check that the compiled receive loop, which loads pages from MinIO, is usable."""
    if not WHY_NOT:
        yield Finding("ok", "installation", "the compiled loop for loads from MinIO works")
    else:
        yield Finding(
            "warn",
            "installation",
            f"loads from MinIO use more CPU, because the compiled loop is unusable: {WHY_NOT}",
            "install a C compiler, Python's headers (python3-dev), OpenSSL and the xxhash wheel, "
            "then reinstall this package",
        )

"""Check that the compiled extension is usable."""

from collections.abc import Iterator

from memkv_sglang.finding import Finding
from memkv_sglang.tiers.minio.objects.bulk_client import WHY_NOT


def check_compiled() -> Iterator[Finding]:
    """Check that the compiled loop, which moves pages from and to MinIO, is usable."""
    if not WHY_NOT:
        yield Finding("ok", "installation", "the compiled loop for MinIO works")
    else:
        yield Finding(
            "warn",
            "installation",
            f"MinIO takes more CPU, because the compiled loop is unusable: {WHY_NOT}",
            "install a C compiler, Python's headers (python3-dev), OpenSSL and the xxhash wheel, "
            "then reinstall this package",
        )

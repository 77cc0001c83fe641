"""Check for invalid pins, which keep no pages."""

from collections.abc import Iterator

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.finding import Finding
from memkv_sglang.tiers.base import TierError


def check_pins(config: MinioConfig) -> Iterator[Finding]:
    """Read the pins as a collector does, and report invalid ones."""
    from memkv_sglang.cli.listing.minio import open_minio

    with open_minio(config) as tier:
        try:
            look = tier.retention.pins().look()
        except TierError as error:
            yield Finding("warn", "pins", f"cannot be read: {error}", "fix the problems above")
            return
    if look.unusable.objects:
        yield Finding(
            "warn", "pins", look.unusable.text, "remove them, or pin again with `memkv pin`"
        )
    else:
        yield Finding("ok", "pins", f"{len(look.kept)} pages are kept")

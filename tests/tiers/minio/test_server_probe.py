"""What a node finds out about its S3 server when it starts."""

import time

import msgspec
import pytest
from memkv_testbed.http_proxy import NO_FAULT, HttpFault, HttpFaultProxy
from minio import Minio

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.finding import Finding
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.probe import Conditions, ServerSupport
from tests.tiers.minio.conftest import OpenTier
from tests.tiers.minio.odd_s3 import Faults, odd_s3


def deadline() -> float:
    return time.monotonic() + 30


def probed(faults: Faults, open_tier: OpenTier) -> ServerSupport:
    with odd_s3(faults) as config:
        tier = open_tier(config)
        try:
            return tier.access.support(deadline())
        finally:
            tier.close()


def finding(support: ServerSupport, what: str) -> Finding:
    (found,) = (found for found in support.findings if found.what == what)
    return found


def test_minio_supports_everything_and_keeps_no_probe_objects(
    minio_config: MinioConfig, admin: Minio, open_tier: OpenTier
) -> None:
    support = open_tier(minio_config).access.support(deadline())
    assert support.conditions is Conditions.QUOTED
    assert support.copy_renews
    assert support.keep_alive
    assert not support.versioned
    assert {found.level for found in support.findings} == {"ok"}
    left = admin.list_objects(minio_config.bucket, recursive=True)
    assert [item.object_name for item in left] == ["memkv.json"]


@pytest.mark.parametrize(
    ("conditions", "found", "level"),
    [
        ("quoted", Conditions.QUOTED, "ok"),
        ("bare", Conditions.BARE, "ok"),  # Ceph RGW
        ("ignored", Conditions.NONE, "warn"),  # Garage
        ("racy", Conditions.NONE, "warn"),  # s3s-fs
    ],
)
def test_the_form_of_conditional_writes_is_found(
    conditions: str, found: Conditions, level: str, open_tier: OpenTier
) -> None:
    support = probed(Faults(conditions=conditions), open_tier)  # type: ignore[arg-type]
    assert support.conditions is found
    assert finding(support, "conditions").level == level
    assert ("memkv gc" in finding(support, "conditions").advice) == (level == "warn")


def test_without_conditional_writes_no_condition_can_be_made() -> None:
    with pytest.raises(ValueError, match="no conditional writes"):
        Conditions.NONE.fields("etag")
    assert Conditions.BARE.fields('"etag"') == {"if-match": "etag"}
    assert Conditions.QUOTED.fields("etag") == {"if-match": '"etag"'}


@pytest.mark.parametrize(
    ("faults", "renews"),
    [
        (Faults(chunked=True), True),  # Ceph RGW
        (Faults(copies_move=False), False),  # versitygw
        (Faults(copies=False), False),
    ],
)
def test_whether_a_copy_moves_the_time(faults: Faults, renews: bool, open_tier: OpenTier) -> None:
    support = probed(faults, open_tier)
    assert support.copy_renews is renews
    assert finding(support, "copy").level == ("ok" if renews else "warn")


@pytest.mark.parametrize(
    ("faults", "what"), [(Faults(lists=False), "listing"), (Faults(deletes=False), "removal")]
)
def test_a_server_that_does_not_list_or_remove_fails_the_probe(
    faults: Faults, what: str, open_tier: OpenTier
) -> None:
    assert finding(probed(faults, open_tier), what).level == "FAIL"


@pytest.mark.parametrize(
    ("faults", "versioned"),
    [
        (Faults(version_ids=True), False),  # Garage
        (Faults(versioning="Enabled", version_ids=True), True),
        (Faults(versioning="NotImplemented"), False),  # versitygw
        (Faults(versioning="AccessDenied", version_ids=True), True),  # a node's own keys
        (Faults(versioning="AccessDenied"), False),
    ],
)
def test_the_server_says_whether_it_keeps_versions(
    faults: Faults, versioned: bool, open_tier: OpenTier
) -> None:
    support = probed(faults, open_tier)
    assert support.versioned is versioned
    assert (finding(support, "versions").level == "ok") is not versioned


def test_a_server_that_closes_its_connections_is_named(open_tier: OpenTier) -> None:
    support = probed(Faults(keep_alive=False), open_tier)
    assert not support.keep_alive
    assert finding(support, "connections").level == "warn"


def test_a_probe_that_cannot_run_fails_and_runs_again(
    minio_config: MinioConfig, proxy: HttpFaultProxy, open_tier: OpenTier
) -> None:
    tier = open_tier(msgspec.structs.replace(minio_config, endpoint=proxy.url))
    tier.check(deadline())
    proxy.fault = HttpFault(
        methods=("PUT",), answer=b"HTTP/1.1 507 Full\r\nContent-Length: 0\r\n\r\n"
    )
    with pytest.raises(TierError, match="could not probe the server"):
        tier.access.support(deadline())
    proxy.fault = NO_FAULT
    assert tier.access.support(deadline()).conditions is Conditions.QUOTED


def test_a_reader_probes_nothing(
    minio_config: MinioConfig, admin: Minio, open_tier: OpenTier
) -> None:
    admin.make_bucket(minio_config.bucket)
    tier = open_tier(msgspec.structs.replace(minio_config, role="reader"))
    with pytest.raises(TierError, match="reader"):
        tier.access.support(deadline())

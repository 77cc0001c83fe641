"""The policies in `deploy/` suffice for a node."""

import json
from pathlib import Path

import pytest
from minio import Minio
from minio.error import S3Error

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.testing.pages import make_page
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.admin.policy import node_policy
from tests.collector.bucket import NAMESPACE, PAGE, Bucketful, deadline

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize(("name", "reader"), [("", False), ("-reader", True)])
def test_the_files_are_the_policies_of_the_default_bucket(name: str, reader: bool) -> None:
    written = json.loads((DEPLOY / f"minio-policy{name}.json").read_text())
    assert written == node_policy(MinioConfig().bucket, reader=reader)


def test_a_policy_covers_a_prefix_alone() -> None:
    resources = [s["Resource"] for s in node_policy("b", "a/b")["Statement"]]
    assert resources == [["arn:aws:s3:::b"], ["arn:aws:s3:::b/a/b/*"]]


def test_a_node_does_all_its_work_with_the_policy(bucketful: Bucketful) -> None:
    tier = bucketful.tier
    tier.describe(NAMESPACE)
    chain = bucketful.spill("chain", 4)
    assert tier.namespaces() == {NAMESPACE.digest: NAMESPACE}
    page = make_page(chain.keys()[0], [PAGE], filled=False)
    fresh = MinioTier(bucketful.config)
    try:
        assert fresh.lookup(chain, deadline()).length == 4
        assert fresh.load([page], deadline()) == [LoadResult.LOADED]
    finally:
        fresh.close()
    assert tier.remove(chain.keys()[3:]) == 1
    assert bucketful.collect(capacity=1).report.removed_pages == 3
    assert tier.clear(NAMESPACE.digest) == 0


def test_a_node_can_do_nothing_to_the_bucket_itself(bucketful: Bucketful) -> None:
    config = bucketful.config
    netloc = config.endpoint.partition("://")[2]
    client = Minio(netloc, config.access_key, config.secret_key, secure=False, region=config.region)
    for attempt in (
        lambda: client.make_bucket("another"),
        lambda: client.remove_bucket(config.bucket),
        lambda: client.get_bucket_versioning(config.bucket),
    ):
        with pytest.raises(S3Error, match="AccessDenied"):
            attempt()
            raise AssertionError("allowed")

"""What a node's access key must be allowed to do, and no more, as MinIO's (AWS IAM's) policies.

`deploy/minio-policy.json` and `deploy/minio-policy-reader.json` are these for the bucket `memkv`.
"""

from typing import Any

READ = ("s3:GetObject",)
"""Loads and lookups; a HEAD is a GetObject too."""

WRITE = ("s3:PutObject", "s3:DeleteObject")
"""Spills, touches and leases; what the collector and `clear` remove."""

LIST = ("s3:ListBucket",)
"""The collector, `inspect`; also what makes a missing object a 404 instead of a 403."""

Policy = dict[str, Any]


def node_policy(bucket: str, prefix: str = "", *, reader: bool = False) -> Policy:
    """Return the policy of a node that keeps its pages under a prefix of a bucket.

    A `reader` never writes. Making the bucket, and its lifecycle rule, are an administrator's:
    see `memkv bucket setup`.
    """
    objects = "/".join(filter(None, (bucket, prefix, "*")))
    name, actions = ("ReadPages", READ) if reader else ("UsePages", (*READ, *WRITE))
    return {
        "Version": "2012-10-17",
        "Statement": [
            _allow("ListPages", LIST, bucket),
            _allow(name, actions, objects),
        ],
    }


def _allow(name: str, actions: tuple[str, ...], resource: str) -> Policy:
    return {
        "Sid": name,
        "Effect": "Allow",
        "Action": list(actions),
        "Resource": [f"arn:aws:s3:::{resource}"],
    }

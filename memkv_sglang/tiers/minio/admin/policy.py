"""Least-privilege policies for a node's access key, in the format of MinIO and AWS IAM.

`deploy/minio-policy.json` and `deploy/minio-policy-reader.json` contain them for the bucket
`memkv`.
"""

from typing import Any

READ = ("s3:GetObject",)
"""Actions for loads and lookups. A HEAD counts as GetObject."""

WRITE = ("s3:PutObject", "s3:DeleteObject")
"""Actions for spills, access times and leases, and for the deletes of the collector and `clear`."""

LIST = ("s3:ListBucket",)
"""Actions for the collector and `inspect`. Without them, a missing object gives 403 instead of 404.
"""

Policy = dict[str, Any]


def node_policy(bucket: str, prefix: str = "", *, reader: bool = False) -> Policy:
    """Return the policy for a node that stores its pages under a prefix of a bucket.

    A `reader` may not write. Only an administrator creates the bucket and its lifecycle rule; see
    `memkv bucket setup`.
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

"""Create users of a test's MinIO with policies of their own, through its admin API."""

import secrets
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from minio import MinioAdmin
from minio.credentials.providers import StaticProvider
from minio.error import MinioAdminException
from urllib3.exceptions import InsecureRequestWarning

from memkv_sglang.tiers.minio.admin.policy import node_policy

START_LIMIT = 20.0
"""Seconds for a server that has just started to load its users."""

MAKE_BUCKETS = {"Effect": "Allow", "Action": ["s3:CreateBucket"], "Resource": ["arn:aws:s3:::*"]}
"""Permissions that `minio.create_bucket` needs if `memkv bucket setup` has not been run, as in
tests."""


class Keys(NamedTuple):
    """An access key and its secret key."""

    access_key: str
    secret_key: str

    @classmethod
    def random(cls) -> "Keys":
        """Return new random keys."""
        return cls(secrets.token_hex(8), secrets.token_hex(16))


class MinioUsers:
    """Adds users as the administrator. Calls block and raise minio-py's exceptions."""

    def __init__(self, netloc: str, root: Keys, *, tls: bool) -> None:
        """Connect to a server, which may still be starting. Accepts any certificate."""
        self._admin = MinioAdmin(
            endpoint=netloc, credentials=StaticProvider(*root), secure=tls, cert_check=False
        )

    def wait_until_loaded(self) -> None:
        """Wait until the server has loaded its stored users, even if there are none.

        Until then, the server accepts new policies and users, but forgets them when it has loaded
        the stored ones (MinIO's `LoadIAMCache`, `firstTime`). Only listing the users waits for
        that.
        """
        self._try(self._admin.user_list)

    def add_node(self, keys: Keys) -> None:
        """Add a node's user, who has the nodes' policy for any bucket and may create buckets."""
        policy = node_policy("*")
        policy["Statement"].append(MAKE_BUCKETS)
        self.add(keys, policy)

    def add(self, keys: Keys, policy: dict[str, Any]) -> None:
        """Add a user with one policy."""
        name = f"policy-of-{keys.access_key}"
        self.add_policy(name, policy)
        self.add_with(keys, name)

    def add_with(self, keys: Keys, policy: str) -> None:
        """Add a user with a policy that the server already has."""
        self._try(lambda: self._admin.user_add(*keys))
        self._try(lambda: self._admin.policy_set(policy, user=keys.access_key))

    def add_policy(self, name: str, policy: dict[str, Any]) -> None:
        """Add a policy for users or for certificates with this common name."""
        self._try(lambda: self._admin.policy_add(name, policy=policy))

    def _try(self, call: Callable[[], object]) -> None:
        give_up = time.monotonic() + START_LIMIT
        while True:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", InsecureRequestWarning)
                    call()
            except MinioAdminException as error:
                if "NotInitialized" not in str(error) or time.monotonic() > give_up:
                    raise
                time.sleep(0.05)
            else:
                return

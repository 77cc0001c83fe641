"""A host pool to measure with, and names for its pages."""

import os

from memkv_sglang.page import PageKey
from memkv_sglang.testing import host_pool
from memkv_sglang.testing.pages import make_chain, make_namespace


class HostPool(host_pool.HostPool):
    """Has content of any kind: what is measured checks it against the checksum."""

    def fill(self) -> None:  # type: ignore[override]  # no chain: faster than what follows from keys
        """Give every page content of its own."""
        for page in range(self.pages):
            for part in self.views(page):
                part[:] = os.urandom(len(part))


def keys(count: int, page_bytes: int, seed: str) -> list[PageKey]:
    """Return the keys of a chain of pages of this size."""
    return make_chain(make_namespace(page_bytes=page_bytes), count, seed).keys()

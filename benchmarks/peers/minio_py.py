"""minio-py with one thread per page in flight, as a short script would use it."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject

from benchmarks.peers.base import Peer, demand, names
from benchmarks.pool import HostPool
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain, Page

THREADS = 16
"""Number of threads, as in `seaweedfs`."""


class MinioPy(Peer):
    """A client with a bucket of its own."""

    def __init__(self, config: MinioConfig, pool: HostPool) -> None:
        scheme, _, host = config.endpoint.partition("://")
        self._client = Minio(
            host,
            access_key=config.access_key,
            secret_key=config.secret_key,
            secure=scheme == "https",
            http_client=urllib3.PoolManager(
                maxsize=THREADS, ca_certs=config.ca_file or None, cert_reqs="CERT_REQUIRED"
            ),
        )
        self._bucket = config.bucket
        self._client.make_bucket(self._bucket)
        self._threads = ThreadPoolExecutor(THREADS)

    def spill(self, pages: Sequence[Page]) -> None:
        """Join the buffers of each page in private memory, then PUT it."""
        list(self._threads.map(self._put, names(pages), pages))

    def load(self, pages: Sequence[Page]) -> None:
        """Read each body straight into the page."""
        list(self._threads.map(self._get, names(pages), pages))

    def lookup(self, chain: Chain) -> int:
        """Not compared."""
        raise NotImplementedError

    def remove(self, pages: Sequence[Page]) -> None:
        """Remove the objects in batches."""
        objects = [DeleteObject(name) for name in names(pages)]
        demand(not list(self._client.remove_objects(self._bucket, objects)), "minio-py")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _put(self, name: str, page: Page) -> None:
        body = b"".join(page.buffers)
        self._client.put_object(self._bucket, name, io.BytesIO(body), len(body))

    def _get(self, name: str, page: Page) -> None:
        response = self._client.get_object(self._bucket, name)
        try:
            for buffer in page.buffers:
                filled = 0
                while filled < len(buffer):
                    count = response.readinto(buffer[filled:])
                    demand(count, "minio-py")
                    filled += count
        finally:
            response.close()
            response.release_conn()

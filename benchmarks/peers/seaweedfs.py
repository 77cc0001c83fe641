"""SGLang's `seaweedfs` backend: boto3 with 16 threads, for any S3 server."""

import os
from collections.abc import Sequence

from benchmarks.peers.base import Peer, demand, names
from benchmarks.peers.sglang_pool import SglangPool, storage_config
from benchmarks.pool import HostPool
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain, Page


class SeaweedFs(Peer):
    """The backend with a bucket of its own on the same MinIO."""

    def __init__(self, config: MinioConfig, pool: HostPool) -> None:
        from sglang.srt.mem_cache.storage.seaweedfs.seaweedfs_store import SeaweedFSStore

        self._pool = SglangPool(pool)
        if config.ca_file:
            # the backend has no setting for the bucket's creation
            os.environ["AWS_CA_BUNDLE"] = config.ca_file
        self._store = SeaweedFSStore(
            storage_config(
                endpoint=config.endpoint,
                bucket=config.bucket,
                access_key=config.access_key,
                secret_key=config.secret_key,
            )
        )
        self._store.register_mem_pool_host(self._pool)
        self._bucket = config.bucket

    def spill(self, pages: Sequence[Page]) -> None:
        """Join the buffers of each page in private memory, then PUT it."""
        done = self._store.batch_set_v1(names(pages), self._pool.indices(pages))
        demand(all(done), "seaweedfs")

    def load(self, pages: Sequence[Page]) -> None:
        """GET each page into private memory, then copy it to the pool."""
        done = self._store.batch_get_v1(names(pages), self._pool.indices(pages))
        demand(all(done), "seaweedfs")

    def lookup(self, chain: Chain) -> int:
        """Send one HEAD per page."""
        return int(self._store.batch_exists([page_hash.hex() for page_hash in chain.hashes]))

    def remove(self, pages: Sequence[Page]) -> None:
        """Remove the objects with the backend's boto3 client. The backend has no call for that."""
        objects = [{"Key": self._store._object_key(name)} for name in names(pages)]
        self._store._s3.delete_objects(Bucket=self._bucket, Delete={"Objects": objects})

    def cool(self) -> None:
        """Wait for HEADs of an earlier lookup that are still in flight."""
        threads = self._store.config.max_workers
        list(self._store._executor.map(lambda _: None, range(threads)))

    def close(self) -> None:
        """Stop the threads and close the connections."""
        self._store._executor.shutdown()
        self._store._s3.close()

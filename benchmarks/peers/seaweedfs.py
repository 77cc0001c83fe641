"""SGLang's `seaweedfs` backend: boto3 with 16 threads, against any S3 server."""

import os
from collections.abc import Sequence

from benchmarks.peers.base import Peer, demand, names
from benchmarks.peers.sglang_pool import SglangPool, storage_config
from benchmarks.pool import HostPool
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain, Page


class SeaweedFs(Peer):
    """Uses its own bucket on the same MinIO."""

    def __init__(self, config: MinioConfig, pool: HostPool) -> None:
        from sglang.srt.mem_cache.storage.seaweedfs.seaweedfs_store import SeaweedFSStore

        self._pool = SglangPool(pool)
        if config.ca_file:
            os.environ["AWS_CA_BUNDLE"] = config.ca_file  # the backend has no setting for it
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
        """Join each page in private memory and PUT it."""
        done = self._store.batch_set_v1(names(pages), self._pool.indices(pages))
        demand(all(done), "seaweedfs")

    def load(self, pages: Sequence[Page]) -> None:
        """GET each page into private memory and copy it to the pool."""
        done = self._store.batch_get_v1(names(pages), self._pool.indices(pages))
        demand(all(done), "seaweedfs")

    def lookup(self, chain: Chain) -> int:
        """Send one HEAD per page."""
        return int(self._store.batch_exists([page_hash.hex() for page_hash in chain.hashes]))

    def remove(self, pages: Sequence[Page]) -> None:
        """Remove objects with the backend's boto3 client; the backend has no call for it."""
        objects = [{"Key": self._store._object_key(name)} for name in names(pages)]
        self._store._s3.delete_objects(Bucket=self._bucket, Delete={"Objects": objects})

    def cool(self) -> None:
        """Wait for HEADs that an earlier lookup left in the backend's threads."""
        threads = self._store.config.max_workers
        list(self._store._executor.map(lambda _: None, range(threads)))

    def close(self) -> None:
        """Stop the threads and close the connections."""
        self._store._executor.shutdown()
        self._store._s3.close()

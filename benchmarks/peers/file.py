"""SGLang's `file` backend: one file per page, with buffered I/O, through SGLang's generic path."""

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.base import Peer, demand, names
from benchmarks.peers.sglang_pool import SglangPool, storage_config
from benchmarks.pool import HostPool
from memkv_sglang.page import Chain, Page


class File(Peer):
    """Reads into its own memory and copies to the pool, as SGLang's controller does."""

    def __init__(self, directory: Path, pool: HostPool) -> None:
        from sglang.srt.mem_cache.hicache_storage import HiCacheFile

        self._pool = SglangPool(pool)
        self._directory = directory
        self._store = HiCacheFile(storage_config(), str(directory))

    def spill(self, pages: Sequence[Page]) -> None:
        """Write new files. Each has a temporary name until it is complete."""
        data = [self._pool.get_data_page(i) for i in self._pool.indices(pages).tolist()]
        demand(self._store.batch_set(names(pages), data), "file")

    def load(self, pages: Sequence[Page]) -> None:
        """Read one file after the other."""
        memory = [self._pool.get_dummy_flat_data_page() for _ in pages]
        loaded = self._store.batch_get(names(pages), memory)
        demand(all(data is not None for data in loaded), "file")
        for index, data in zip(self._pool.indices(pages).tolist(), loaded, strict=True):
            self._pool.set_from_flat_data_page(index, data)

    def lookup(self, chain: Chain) -> int:
        """Check whether each file exists."""
        return int(self._store.batch_exists([page_hash.hex() for page_hash in chain.hashes]))

    def remove(self, pages: Sequence[Page]) -> None:
        """Remove the files. The backend has no call for that."""
        for name in names(pages):
            self._path(name).unlink()

    def cool(self) -> None:
        """Write the files back and drop them from the page cache."""
        for path in self._directory.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def close(self) -> None:
        """Remove all files; there is nothing else to release."""
        self._store.clear()

    def _path(self, name: str) -> Path:
        return self._directory / f"{self._store._get_suffixed_key(name)}.bin"

"""SGLang's `nixl` backend with the POSIX plugin and io_uring: two files per page, O_DIRECT."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.base import Peer, PeerUnavailableError, demand, names
from benchmarks.peers.sglang_pool import SglangPool, storage_config
from benchmarks.pool import HostPool
from memkv_sglang.page import Chain, Page

PLUGIN = {"posix": {"active": True, "use_uring": "true"}}


class Nixl(Peer):
    """Reads and writes straight from and to the pool (zero copy)."""

    def __init__(self, directory: Path, pool: HostPool) -> None:
        from sglang.srt.mem_cache.storage.nixl.hicache_nixl import HiCacheNixl

        self._pool = SglangPool(pool)
        try:
            self._store = HiCacheNixl(
                storage_config(plugin=PLUGIN, l3_cleaner_enabled=False), str(directory)
            )
        except RuntimeError as error:
            raise PeerUnavailableError(f"its POSIX plugin does not load: {error}") from error
        self._store.register_mem_pool_host(self._pool)
        if not self._store.is_zero_copy:
            raise PeerUnavailableError("it would copy every page, which is not its intended use")

    def spill(self, pages: Sequence[Page]) -> None:
        """Write new files."""
        demand(all(self._store.batch_set_v1(names(pages), self._pool.indices(pages))), "nixl")

    def load(self, pages: Sequence[Page]) -> None:
        """Read the files."""
        demand(all(self._store.batch_get_v1(names(pages), self._pool.indices(pages))), "nixl")

    def lookup(self, chain: Chain) -> int:
        """Query the plugin for every file."""
        return int(self._store.batch_exists([page_hash.hex() for page_hash in chain.hashes]))

    def remove(self, pages: Sequence[Page]) -> None:
        """Remove the files. The backend has no call for that."""
        for name in self._store._get_key_list_from_meta(names(pages)):
            Path(self._store.file_manager.get_file_path(name)).unlink()

    def close(self) -> None:
        """Release the registered memory."""
        self._store.close()

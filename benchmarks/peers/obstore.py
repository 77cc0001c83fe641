"""obstore: Python bindings of Rust's object_store crate. Each call runs one batch of coroutines."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from benchmarks.peers.base import Peer, demand, names
from benchmarks.pool import HostPool
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain, Page
from memkv_sglang.tiers.minio.admin.bucket import Bucket
from memkv_sglang.tiers.minio.auth.signing import credential_provider

IN_FLIGHT = 16
"""Number of pages in flight, as many as `seaweedfs` has threads."""

Move = Callable[[str, Page], Awaitable[None]]


class Obstore(Peer):
    """A client with a bucket of its own, over http."""

    def __init__(self, config: MinioConfig, pool: HostPool) -> None:
        from obstore.store import S3Store

        bucket = Bucket(config, credential_provider(config), None)
        bucket.ensure()
        bucket.close()
        self._store = S3Store(
            config.bucket,
            endpoint=config.endpoint,
            region=config.region,
            access_key_id=config.access_key,
            secret_access_key=config.secret_key,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        self._loop = asyncio.new_event_loop()

    def spill(self, pages: Sequence[Page]) -> None:
        """Join the buffers of each page in private memory, then PUT it."""
        import obstore

        async def put(name: str, page: Page) -> None:
            await obstore.put_async(self._store, name, b"".join(page.buffers), use_multipart=False)

        self._run(put, pages)

    def load(self, pages: Sequence[Page]) -> None:
        """GET each page into private memory, then copy it to the pool."""
        import obstore

        async def get(name: str, page: Page) -> None:
            result = await obstore.get_async(self._store, name)
            content = memoryview(await result.bytes_async())
            demand(len(content) == page.length, "obstore")
            at = 0
            for buffer in page.buffers:
                buffer[:] = content[at : at + len(buffer)]
                at += len(buffer)

        self._run(get, pages)

    def lookup(self, chain: Chain) -> int:
        """Not compared."""
        raise NotImplementedError

    def remove(self, pages: Sequence[Page]) -> None:
        """Remove the objects in batches."""
        import obstore

        obstore.delete(self._store, names(pages))

    def close(self) -> None:
        """Close the event loop."""
        self._loop.close()

    def _run(self, move: Move, pages: Sequence[Page]) -> None:
        async def bounded(gate: asyncio.Semaphore, name: str, page: Page) -> None:
            async with gate:
                await move(name, page)

        async def everything() -> None:
            gate = asyncio.Semaphore(IN_FLIGHT)
            jobs = [bounded(gate, *job) for job in zip(names(pages), pages, strict=True)]
            await asyncio.gather(*jobs)

        self._loop.run_until_complete(everything())

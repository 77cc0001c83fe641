"""A TLS proxy for a server that cannot require client certificates itself."""

import asyncio
import contextlib
import ssl
import threading
from pathlib import Path
from typing import Self

from memkv_testbed.certificates import Certificate

CHUNK = 64 << 10


class TlsTerminator:
    """Accept TLS connections on a loopback port and forward their content; a context manager.

    `listen` is the port to accept them on; 0 takes a free one.

    With `clients`, a client must have a certificate of the authority in that file. MinIO itself
    requests a client certificate only for certificate login (STS).
    """

    def __init__(
        self, port: int, certificate: Certificate, clients: Path | None = None, listen: int = 0
    ) -> None:
        self.port = listen
        self._target = port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=clients)
        self._context.load_cert_chain(certificate.cert_file, certificate.key_file)
        self._context.verify_mode = ssl.CERT_REQUIRED if clients else ssl.CERT_NONE
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._run()])

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        self._loop.set_exception_handler(lambda *_: None)  # some handshakes fail on purpose
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stopping.wait()
        server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)
            with contextlib.closing(inner_writer):
                ways = [_pump(reader, inner_writer), _pump(inner_reader, writer)]
                tasks = [self._loop.create_task(way) for way in ways]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()

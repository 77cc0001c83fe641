"""Simulate network latency. Each direction takes half a round trip."""

import asyncio
import threading
from typing import Self
from urllib.parse import urlsplit

CHUNK = 64 << 10


class Distance:
    """A context manager that forwards connections on a free loopback port with a delay.

    Bytes are delayed but not throttled: any number of requests may be in flight, as on a network
    with unlimited bandwidth.
    """

    def __init__(self, endpoint: str, round_trip: float) -> None:
        """Forward to the server at the URL `endpoint`. `round_trip` is in seconds."""
        parts = urlsplit(endpoint)
        self._target = (parts.hostname, parts.port)
        self._delay = round_trip / 2
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        """Listen."""
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        host, port = self._server.sockets[0].getsockname()
        self.endpoint = f"http://{host}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        """Close every connection."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        server, there = await asyncio.open_connection(*self._target)
        try:
            await asyncio.gather(self._forward(client, there), self._forward(server, back))
        finally:
            there.close()
            back.close()

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(CHUNK):
            self._loop.call_later(self._delay, sink.write, data)
        self._loop.call_later(self._delay, sink.close)

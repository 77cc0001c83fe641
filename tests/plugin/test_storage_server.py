"""A real server started without the tier: the storage is attached, cleared, detached and attached
again.
"""

import json
import tempfile
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

import zmq
from memkv_testbed.minio_server import MinioServer
from sglang.srt.disaggregation.kv_events import BlockStored, KVEventBatch
from sglang_cpu_platform import tiny_model
from sglang_cpu_platform.fork_server import ForkServers
from sglang_cpu_platform.server import CpuServer, free_port

from memkv_sglang.cli.request_times import RequestTimes, read_requests
from tests.plugin.attached import Node, eventually
from tests.serving.node import PAGE, THRESHOLD, prompt, reusable

ADMIN_KEY = "the tests' own"
PROMPT = prompt("attached", 1000)
STORAGE = "/hicache/storage-backend"
EXTRA = {
    "backend_name": "memkv",
    "module_path": "memkv_sglang",
    "class_name": "MemKVStorage",
    "interface_v1": 1,
    "hicache_storage_pass_prefix_keys": True,
}


class Subscriber:
    """Reads SGLang's KV events like a router."""

    def __init__(self, endpoint: str) -> None:
        self.stored: dict[str, list[BlockStored]] = defaultdict(list)
        self.removed: dict[str, set[int]] = defaultdict(set)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.subscribe(b"")
        self._socket.setsockopt(zmq.RCVTIMEO, 100)
        self._socket.connect(endpoint)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        while not self._closing.is_set():
            try:
                payload = self._socket.recv_multipart()[-1]
            except zmq.Again:
                continue
            for event in decoder.decode(payload).events:
                if isinstance(event, BlockStored):
                    self.stored[str(event.medium)].append(event)
                elif hasattr(event, "block_hashes"):
                    self.removed[str(event.medium)].update(event.block_hashes)

    def blocks(self, medium: str) -> dict[int, tuple[int | None, tuple[int, ...]]]:
        """Return each block's parent and tokens."""
        blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        for event in list(self.stored[medium]):
            parents = [event.parent_block_hash, *event.block_hashes]
            for i, name in enumerate(event.block_hashes):
                tokens = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
                blocks[name] = parents[i], tuple(tokens)
        return blocks

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._socket.close(0)


class Attachable:
    """The server, its agent's settings, and a listener for its events."""

    def __init__(
        self, home: Path, node: Node, storage: MinioServer, model: Path, forks: ForkServers
    ) -> None:
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        environment = {
            "MEMKV_MINIO_ACCESS_KEY": storage.access_key,
            "MEMKV_MINIO_SECRET_KEY": storage.secret_key,
            **{"MEMKV_" + k.upper().replace(".", "_"): v for k, v in node.settings.items()},
        }
        self.home = home
        self.node = node
        self.events = Subscriber(endpoint)
        self.server = CpuServer(
            model,
            log=home / "server.log",
            page_size=PAGE,
            max_total_tokens=8192,
            extra=[
                *("--enable-hierarchical-cache", "--enable-metrics"),
                *("--admin-api-key", ADMIN_KEY),
                "--kv-events-config",
                json.dumps({"publisher": "zmq", "endpoint": endpoint, "bind": True}),
            ],
            env=environment,
            forks=forks,
        )

    def ask(self, method: str, path: str, body: Any = None) -> str:
        request = urllib.request.Request(
            self.server.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Content-Type": "application/json",
                "Authorization": f"Bearer {ADMIN_KEY}",
            },
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(response.read().decode())

    def attach(self) -> None:
        body = {
            "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config_json": json.dumps(EXTRA),
        }
        assert "attached" in self.ask("PUT", STORAGE, body)

    def detaches(self) -> bool:
        """Detach, retrying while SGLang refuses because it is storing pages."""
        try:
            return "detached" in self.ask("DELETE", STORAGE).lower()
        except urllib.error.HTTPError as error:
            assert "not idle" in error.read().decode()
            return False

    def from_storage(self) -> int:
        """Empty the pools and send the prompt; check the text, and return the number of tokens from
        storage.
        """
        self.ask("POST", "/flush_cache?timeout=30", {})
        answer = self.server.client.generate(PROMPT, max_new_tokens=4)
        assert answer.output_ids == self.computed
        return int(answer.cached_by_source.get("storage", 0))

    def explain(self, request: str) -> RequestTimes:
        """Load the prompt for a request of this id; return what both logs say about it."""
        self.ask("POST", "/flush_cache?timeout=30", {})
        parameters = {"max_new_tokens": 1}
        body = {"rid": request, "input_ids": PROMPT, "sampling_params": parameters}
        self.ask("POST", "/generate", body)
        logs = [self.home / "run" / "agent.log", self.home / "server.log"]
        lines = [line for log in logs for line in log.read_bytes().splitlines()]
        (times,) = read_requests(lines, request=request)
        return times

    def compute(self) -> None:
        self.computed = self.server.client.generate(PROMPT, max_new_tokens=4).output_ids

    def announced(self, medium: str, blocks: int) -> bool:
        self.step()
        return len(self.events.blocks(medium)) >= blocks

    def step(self) -> None:
        """Make the scheduler run a step, so that it publishes events."""
        self.server.client.generate([7, 8, 9], max_new_tokens=1)


@pytest.fixture(scope="module")
def attachable(forks: ForkServers) -> Iterator[Attachable]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memkv-")))
        storage = stack.enter_context(MinioServer())
        tiny_model.make(home / "model", "mha")
        node = Node(home, None)
        node.settings |= {"minio.endpoint": storage.endpoint, "minio.bucket": "pages"}
        node.settings |= {"agent.log_requests": "all", "agent.log_format": "json"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MEMKV_MINIO_ACCESS_KEY", storage.access_key)
            patch.setenv("MEMKV_MINIO_SECRET_KEY", storage.secret_key)
            subject = Attachable(home, node, storage, home / "model", forks)
            stack.callback(node.close)
            stack.callback(subject.events.close)
            stack.enter_context(subject.server)
            yield subject
            stack.close()


@pytest.mark.soak
def test_attach_clear_detach_and_attach_again(attachable: Attachable) -> None:
    subject, events = attachable, attachable.events
    subject.compute()
    assert subject.from_storage() == 0

    subject.attach()
    assert "memkv_sglang" in subject.ask("GET", STORAGE)
    assert subject.from_storage() == 0
    expected = reusable(len(PROMPT))
    assert subject.from_storage() == expected
    assert subject.node.pools() == 1  # only the staging memory

    blocks = len(PROMPT) // PAGE
    for medium in ("DISK", "EXTERNAL"):
        eventually(partial(subject.announced, medium, blocks))
        # Routers recognize the blocks that SGLang announced itself.
        assert events.blocks(medium).items() <= events.blocks("GPU").items()

    explained = subject.explain("a-chosen-id")
    assert explained.operations["lookup"].done * PAGE >= expected
    assert explained.operations["load"].done * PAGE == expected
    assert set(explained.steps["load"]) == {"nvme"}
    assert explained.server.keys() == {"lookup", "load"}

    metrics = subject.server.client.get("/metrics")
    assert "memkv_loaded_tokens_total{" in metrics
    assert "sglang:prefetch_bandwidth_count" in metrics

    subject.ask("POST", STORAGE + "/clear")
    assert subject.from_storage() == 0
    subject.step()
    eventually(lambda: events.removed["EXTERNAL"] >= set(events.blocks("EXTERNAL")))
    eventually(lambda: subject.from_storage() == expected)

    assert subject.detaches()
    eventually(lambda: subject.node.pools() == 0)
    assert subject.from_storage() == 0
    subject.attach()
    assert subject.from_storage() == expected

    # An agent that hangs in a spill does not prevent detaching.
    with subject.node.stalled_agent():
        subject.server.client.generate(prompt("stalled", THRESHOLD - 1), max_new_tokens=4)
        eventually(subject.detaches)
    assert subject.from_storage() == 0
    subject.attach()
    eventually(lambda: subject.from_storage() == expected)

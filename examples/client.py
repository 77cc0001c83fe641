"""Spill pages in one process and load them in another. See README.md in this folder."""

import hashlib
import mmap
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from memkv_sglang import (
    AgentClient,
    Buffer,
    Chain,
    LoadResult,
    Namespace,
    SpillResult,
    load_config,
)

PAGES, PAGE_BYTES = 8, 256 << 10
TIMEOUT = 30.0
"""Seconds to wait for the agent, and for uploads."""

NAMESPACE = Namespace(
    model="example", kv_dtype="uint8", layout="flat", page_size=64, page_bytes=PAGE_BYTES,
    layers=(0, 1),
)  # fmt: skip


def chain() -> Chain:
    """Return page hashes, each of which covers all tokens up to the end of its page."""
    hashes = [hashlib.sha256(b"prompt" + bytes([page])).digest() for page in range(PAGES)]
    return Chain(NAMESPACE.digest, hashes)


def work(settings: dict[str, str], *, store: bool) -> None:
    """Store the pages, or load and check them."""
    pool = os.memfd_create("pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(pool, PAGES * PAGE_BYTES)
    memory = mmap.mmap(pool, PAGES * PAGE_BYTES)
    with AgentClient(load_config(overrides=settings), start=True) as client:
        if not client.wait(TIMEOUT):
            sys.exit(f"no agent: {client.problem}")
        number = client.register_pool(pool, PAGES * PAGE_BYTES)
        client.describe(NAMESPACE)
        buffers = [[Buffer(number, page * PAGE_BYTES, PAGE_BYTES)] for page in range(PAGES)]
        if store:
            spill(client, memory, buffers)
        else:
            load(client, memory, buffers)


def spill(client: AgentClient, memory: mmap.mmap, buffers: list[list[Buffer]]) -> None:
    """Fill the pages and store them. The buffers must not change until `spill` returns."""
    for page in range(PAGES):
        memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes([page]) * PAGE_BYTES
    spilled = client.spill(chain(), buffers)
    print(f"spilled {spilled.count(SpillResult.STORED)} of {PAGES} pages")
    if not client.flush(TIMEOUT):
        sys.exit("uploads did not finish")


def load(client: AgentClient, memory: mmap.mmap, buffers: list[list[Buffer]]) -> None:
    """Look the pages up, load them and compare every byte."""
    found = client.lookup(chain(), budget=TIMEOUT).length
    loads = client.load(chain(), buffers)
    intact = sum(
        load.result is LoadResult.LOADED
        and memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] == bytes([page]) * PAGE_BYTES
        for page, load in enumerate(loads)
    )
    print(f"found {found} pages, loaded {intact} intact from {loads[0].tier or 'nowhere'}")
    if intact != PAGES:
        sys.exit("some pages were not loaded")


def stop_agent(settings: dict[str, str]) -> None:
    """Stop the agent and wait until it has removed its socket."""
    with AgentClient(load_config(overrides=settings), start=False) as client:
        if client.wait(1.0):
            client.shutdown()
            deadline = time.monotonic() + TIMEOUT
            while Path(settings["agent.socket"]).exists() and time.monotonic() < deadline:
                time.sleep(0.02)


def main() -> None:
    """Run a process that stores pages, then one that loads them."""
    pairs = zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    flags = {flag[2:].replace("-", ".", 1).replace("-", "_"): value for flag, value in pairs}
    with tempfile.TemporaryDirectory(prefix="memkv-example-") as folder:
        settings = {
            "agent.socket": f"{folder}/agent.sock",
            "nvme.directory": f"{folder}/pages",
            "nvme.capacity": "64MiB",
            **flags,
        }
        try:
            for store in (True, False):
                process = multiprocessing.get_context("spawn").Process(
                    target=work, args=(settings,), kwargs={"store": store}
                )
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(process.exitcode)
        finally:
            stop_agent(settings)


if __name__ == "__main__":
    main()

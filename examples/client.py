"""Spill pages in one process and load them in another. See README.md in this folder."""

import hashlib
import mmap
import multiprocessing
import os
import sys
import tempfile

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
SECONDS = 30.0
"""How long to wait for the agent."""

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
    config = load_config(overrides=settings)
    pool = os.memfd_create("pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(pool, PAGES * PAGE_BYTES)
    memory = mmap.mmap(pool, PAGES * PAGE_BYTES)
    with AgentClient(config, start=True) as client:
        if not client.wait(SECONDS):
            sys.exit(f"no agent: {client.problem}")
        number = client.register_pool(pool, PAGES * PAGE_BYTES)
        client.describe(NAMESPACE)
        buffers = [[Buffer(number, page * PAGE_BYTES, PAGE_BYTES)] for page in range(PAGES)]
        if store:
            for page in range(PAGES):
                memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes([page]) * PAGE_BYTES
            spilled = client.spill(chain(), buffers)
            print(f"spilled {spilled.count(SpillResult.STORED)} of {PAGES} pages")
            return
        found = client.lookup(chain()).length
        loads = client.load(chain(), buffers)
        right = sum(
            load.result is LoadResult.LOADED and memory[page * PAGE_BYTES] == page
            for page, load in enumerate(loads)
        )
        print(f"found {found} pages, loaded {right} correctly from {loads[0].tier or 'nowhere'}")
        client.shutdown()
        if right != PAGES:
            sys.exit("some pages did not come back")


def main() -> None:
    """Run a storing and a loading process, one after the other."""
    pairs = zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    flags = {flag[2:].replace("-", ".", 1).replace("-", "_"): value for flag, value in pairs}
    with tempfile.TemporaryDirectory(prefix="memkv-example-") as folder:
        defaults = {"agent.socket": f"{folder}/agent.sock", "nvme.directory": f"{folder}/pages"}
        settings = {**defaults, "nvme.capacity": "64MiB", **flags}
        for store in (True, False):
            process = multiprocessing.get_context("spawn").Process(
                target=work, args=(settings,), kwargs={"store": store}
            )
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(process.exitcode)


if __name__ == "__main__":
    main()

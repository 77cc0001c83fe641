"""The index uses little memory per page."""

import tracemalloc
from pathlib import Path

from memkv_sglang.page import PageKey
from memkv_sglang.testing.pages import make_hashes
from memkv_sglang.tiers.nvme.catalog import Catalog, NewPage
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.journal import Journal
from memkv_sglang.tiers.nvme.segment import create_segment
from memkv_sglang.tiers.nvme.segments import Segments

PAGES = 45_000
"""Just above the size at which a dictionary grows, and so wastes the most memory."""


def test_memory_per_page(tmp_path: Path) -> None:
    hashes = make_hashes(PAGES)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    folder = Folder.at(tmp_path)
    segments = Segments(folder, 1 << 40, 1 << 30, direct=False)
    segments.add(create_segment(folder, 0, 8192, PAGES, direct=False))
    catalog = Catalog(segments)
    catalog.journal = Journal.create(folder)
    for first in range(0, PAGES, 500):
        places = catalog.reserve(8192, 500)
        catalog.publish(
            [
                NewPage(PageKey(b"n" * 16, bytes(bytearray(page_hash))), place, 4096, first)
                for page_hash, place in zip(hashes[first:], places, strict=False)
            ]
        )
    assert len(catalog.index) == PAGES
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    catalog.journal.close()
    segments.close()
    assert used / PAGES < 250

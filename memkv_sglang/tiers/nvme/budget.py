"""Divide the capacity among everything that the tier stores on disk."""

from typing import NamedTuple

from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK

KIB, MIB = 1 << 10, 1 << 20

JOURNAL_BYTES_PER_SLOT = 512
"""Bytes of the journal's budget per slot, beyond the journal's smallest size. A page's records take
80 bytes. The journal is compacted once it has grown to four times that, and then exists twice."""

SMALLEST_JOURNAL = 4 * MIB
"""Upper limit of `Budget.journal`. A journal this short is read quickly without compaction."""

_SHARE = 128
"""Each kind of small file may take 1/128 of the capacity."""
_SMALLEST_SHARE = 32 * KIB
_FORMAT = 2 * BLOCK
"""Bytes of the `format` file, and of the file that replaces it."""


class Budget(NamedTuple):
    """Bytes on disk for each purpose. They add up to the capacity."""

    segments: int
    """Segment files, including damaged ones, and `JOURNAL_BYTES_PER_SLOT` for each slot."""
    descriptions: int
    quarantine: int
    journal: int
    """The journal is not compacted while it is shorter than this."""


def divide(capacity: int) -> Budget:
    """Return the budget for a capacity in bytes."""
    share = max(capacity // _SHARE, _SMALLEST_SHARE)
    descriptions, quarantine = min(share, 16 * MIB), min(share, 64 * MIB)
    journal = min(share, SMALLEST_JOURNAL)
    small_files = descriptions + quarantine + 2 * journal + _FORMAT
    return Budget(capacity - small_files, descriptions, quarantine, journal)

"""How the capacity is divided among everything that the tier keeps on the disk."""

from typing import NamedTuple

from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK

KIB, MIB = 1 << 10, 1 << 20

JOURNAL_BYTES_PER_SLOT = 512
"""What the journal may take for a slot beyond its smallest size. A page's records have 80 bytes;
the journal grows to four times that before it is rewritten, and then exists twice."""

SMALLEST_JOURNAL = 4 * MIB
"""Bytes below which a journal is read so fast that it is not rewritten, at most."""

_SHARE = 128
"""Each kind of small file may take the capacity divided by this."""
_SMALLEST_SHARE = 32 * KIB
_FORMAT = 2 * BLOCK
"""The file `format`, and its successor while it is written."""


class Budget(NamedTuple):
    """Bytes on disk by purpose; they add up to the capacity."""

    segments: int
    """Segment files, `JOURNAL_BYTES_PER_SLOT` for each of their slots, and damaged segments."""
    descriptions: int
    quarantine: int
    journal: int
    """The journal is not rewritten while it is shorter than this."""


def divide(capacity: int) -> Budget:
    """Return how a capacity is used."""
    share = max(capacity // _SHARE, _SMALLEST_SHARE)
    descriptions, quarantine = min(share, 16 * MIB), min(share, 64 * MIB)
    journal = min(share, SMALLEST_JOURNAL)
    small_files = descriptions + quarantine + 2 * journal + _FORMAT
    return Budget(capacity - small_files, descriptions, quarantine, journal)

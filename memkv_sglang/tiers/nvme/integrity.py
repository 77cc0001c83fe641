"""Check that the catalog's data structures agree with each other."""

from collections.abc import Iterator

from memkv_sglang.tiers.nvme.catalog import Catalog


def disagreements(catalog: Catalog) -> list[str]:
    """Check index, slots, pending marks and counts; return one line per disagreement."""
    with catalog.changes, catalog.lock:
        return [
            *_misplaced_entries(catalog),
            *_marks_without_page(catalog),
            *_wrong_counts(catalog),
        ]


def _misplaced_entries(catalog: Catalog) -> Iterator[str]:
    for entry in catalog.index:
        number, slot = catalog.index.segments[entry], catalog.index.slots[entry]
        segment = catalog.segments.by_number.get(number)
        if segment is None or slot >= len(segment.slots):
            yield f"entry {entry} is in segment {number}, slot {slot}, which does not exist"
        elif segment.slots.entries[slot] != entry or not segment.slots.is_taken(slot):
            yield f"segment {number}, slot {slot} does not refer to its entry {entry}"


def _marks_without_page(catalog: Catalog) -> Iterator[str]:
    for entry in catalog.pending:
        if catalog.index.key(entry) is None:
            yield f"entry {entry} is pending upload but has no page"


def _wrong_counts(catalog: Catalog) -> Iterator[str]:
    for segment in catalog.segments:
        slots = segment.slots
        taken = sum(map(slots.is_taken, range(len(slots))))
        if taken + slots.free != len(slots):
            yield f"segment {segment.number} counts {slots.free} free slots, {taken} are taken"
    held = sum((len(s.slots) - s.slots.free) * s.slot_size for s in catalog.segments)
    if held != catalog.segments.taken:
        yield f"{catalog.segments.taken} bytes counted, {held} taken"

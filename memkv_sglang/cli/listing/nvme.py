"""List pages in the NVMe directory from its journal, even while an agent uses it."""

from contextlib import closing
from functools import cached_property
from pathlib import Path

from memkv_sglang.cli.listing.base import StoredPage
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.nvme.descriptions import Descriptions
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.journal import (
    SLOT,
    Frame,
    JournalDamagedError,
    Kind,
    read_journal,
    read_puts,
)

_Place = tuple[int, int]
"""A page's segment number and slot."""


class NvmeListing:
    """The pages that a directory holds when it is first read. Reads only the journal."""

    name = "nvme"

    def __init__(self, directory: Path, name: str = name) -> None:
        """List a directory; `name` labels it in the output. A missing directory has no pages."""
        self.name = name
        self._directory = directory

    def namespaces(self) -> dict[bytes, Namespace | None]:
        """Return the namespaces that have a description or pages."""
        with_pages = dict.fromkeys(key.namespace for key in self._pages)
        return {**with_pages, **self._descriptions()}

    def _descriptions(self) -> dict[bytes, Namespace]:
        try:
            with closing(Folder.at(self._directory / "namespaces")) as folder:
                return Descriptions(folder, limit=0).read_all()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise TierError(f"cannot read the descriptions ({error})") from None

    def pages(self, namespace: bytes) -> list[StoredPage]:
        """Return every page of a namespace."""
        return [page for page in self._pages.values() if page.key.namespace == namespace]

    def find(self, key: PageKey) -> StoredPage | None:
        """Return a page, or None if it is not stored."""
        return self._pages.get(key)

    @cached_property
    def _pages(self) -> dict[PageKey, StoredPage]:
        if not self._directory.exists():
            return {}
        try:
            with closing(Folder.at(self._directory)) as folder:
                frames, _ = read_journal(folder)
        except (JournalDamagedError, OSError) as error:
            raise TierError(
                f"the journal of {self._directory} {error}; the next start of the agent, or "
                "`memkv verify`, rebuilds it from the pages"
            ) from None
        return _replay(frames)


def _replay(frames: list[Frame]) -> dict[PageKey, StoredPage]:
    pages: dict[PageKey, StoredPage] = {}
    keys: dict[_Place, PageKey] = {}
    for kind, payload in frames:
        if kind == Kind.PUT:
            for key, segment, slot, length, _tick in read_puts(payload):
                _free(pages, keys, (segment, slot))
                keys[segment, slot] = key
                pages[key] = StoredPage(key, length, slot_name(segment, slot))
        elif kind == Kind.FREE:
            for place in SLOT.iter_unpack(payload):
                _free(pages, keys, place)
    return pages


def _free(
    pages: dict[PageKey, StoredPage], keys: dict[_Place, PageKey], place: tuple[int, ...]
) -> None:
    segment, slot = place
    key = keys.pop((segment, slot), None)
    # If the page was moved, its new place stays valid.
    if key is not None and pages[key].place == slot_name(segment, slot):
        del pages[key]


def slot_name(segment: int, slot: int) -> str:
    """Format a page's place for people."""
    return f"segments/{segment:08}.seg, slot {slot}"

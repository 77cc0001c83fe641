"""Keep copies of corrupt slots for diagnosis."""

import logging
import re

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, PageKey
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.segment import Place

FILES_KEPT = 16

_NAME = re.compile(
    rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}-[0-9a-f]{{{2 * PAGE_HASH_SIZE}}}-\d+-\d+\.slot"
)
_log = logging.getLogger(__name__)


class Quarantine:
    """A directory of up to `FILES_KEPT` copies. Keeps the first ones, which show the cause."""

    def __init__(self, folder: Folder, limit: int) -> None:
        """Use an open directory. Store at most `limit` bytes on disk."""
        self._folder = folder
        self._limit = limit

    def save(self, key: PageKey, place: Place, content: memoryview) -> str | None:
        """Write the content of a slot to a file and return its path.

        Returns None if the quarantine is full or the write fails.
        """
        name = f"{key.namespace.hex()}-{key.hash.hex()}-{place.segment.number}-{place.slot}.slot"
        try:
            own = self._own()
            free = self._limit - self._folder.disk_usage(own)
            if len(own) >= FILES_KEPT or len(content) > free:
                return None
            self._folder.write(name, content)
        except OSError:
            return None
        return str(self._folder.path / name)

    def trim(self) -> None:
        """Remove the newest copies until the limit is met, which may have been lowered.

        Raises `OSError`.
        """
        own = sorted(self._own(), key=lambda name: self._folder.status(name).st_mtime)
        removed = 0
        while own and (len(own) > FILES_KEPT or self._folder.disk_usage(own) > self._limit):
            self._folder.remove(own.pop())
            removed += 1
        if removed:
            fields = {"path": str(self._folder.path), "copies": removed}
            _log.warning("copies of corrupt pages removed", extra={"fields": fields})

    def _own(self) -> list[str]:
        return [name for name in self._folder.names() if _NAME.fullmatch(name)]

"""Store namespace descriptions next to the pages, each in a readable file."""

import errno
import logging
import re
import threading
from collections.abc import Callable, Collection

import msgspec

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE
from memkv_sglang.tiers.nvme.disk.direct_io import pad_to_block
from memkv_sglang.tiers.nvme.files import UNFINISHED_SUFFIX, Folder

SIZE_LIMIT = 64 << 10
"""Maximum bytes of a description. Those for SGLang are shorter than 1 KiB."""

_SUFFIX = ".json"
_NAME = re.compile(rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}{re.escape(_SUFFIX)}")
_log = logging.getLogger(__name__)


class Descriptions:
    """A directory of `DIGEST.json` files, which take at most `limit` bytes on disk."""

    def __init__(
        self,
        folder: Folder,
        limit: int,
        in_use: Callable[[], Collection[bytes]] = lambda: (),
    ) -> None:
        """Use an open directory. `in_use` returns the digests of the namespaces with pages."""
        self._folder = folder
        self._limit = limit
        self._in_use = in_use
        self._lock = threading.Lock()

    def store(self, namespace: Namespace) -> None:
        """Write a description, unless an intact copy is stored already. Raises `OSError`.

        If there are too many descriptions, first removes those of namespaces without pages.
        """
        name = namespace.digest.hex() + _SUFFIX
        with self._lock:
            if self._content(name) == namespace.description:
                return
            size = len(namespace.description)
            if not self._fits(name, size):
                self.remove_all_but(self._in_use())
                if not self._fits(name, size):
                    raise OSError(errno.EDQUOT, "too many descriptions")
            self._folder.write_durably(name, namespace.description)

    def _content(self, name: str) -> bytes | None:
        """Return a file's content; None if it is missing, too large or unreadable."""
        try:
            return self._folder.read(name, SIZE_LIMIT)
        except OSError:
            return None

    def _fits(self, name: str, size: int) -> bool:
        others = set(self._own()) - {name}
        return self._folder.disk_usage(others) + pad_to_block(size) <= self._limit

    def _own(self) -> list[str]:
        return [name for name in self._folder.names() if _NAME.fullmatch(name)]

    def remove_all_but(self, namespaces: Collection[bytes]) -> None:
        """Remove the descriptions of all other namespaces. Raises `OSError`.

        Looks only at the files' names, and keeps files with names of another kind.
        """
        wanted = {digest.hex() + _SUFFIX for digest in namespaces}
        for name in self._own():
            if name not in wanted:
                self._folder.remove(name)

    def remove_unfinished(self) -> None:
        """Remove files that interrupted writes have left behind. Raises `OSError`."""
        for name in self._folder.names():
            base = name.removesuffix(UNFINISHED_SUFFIX)
            if base != name and _NAME.fullmatch(base):
                self._folder.remove_unfinished(name)

    def read_all(self) -> dict[bytes, Namespace]:
        """Return every description by digest. Raises `OSError`.

        Skips and logs files that are not valid descriptions.
        """
        found: dict[bytes, Namespace] = {}
        for name in self._folder.names():
            if not name.endswith(_SUFFIX):
                continue
            try:
                namespace = Namespace.parse(self._folder.read(name, SIZE_LIMIT))
            except (OSError, msgspec.MsgspecError, RecursionError) as error:
                fields = {"path": str(self._folder.path / name), "error": str(error)}
                _log.warning("skipped an invalid namespace description", extra={"fields": fields})
                continue
            if namespace.digest.hex() + _SUFFIX == name:
                found[namespace.digest] = namespace
        return found

"""Descriptions of namespaces, a readable file each, beside the pages they describe."""

import logging
import re
import threading
from collections.abc import Collection
from pathlib import Path

import msgspec

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE
from memkv_sglang.tiers.nvme.files import write_whole

_NAME = re.compile(rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}\.json")
_log = logging.getLogger(__name__)


class Descriptions:
    """A directory of `DIGEST.json` files. Calls raise `OSError`."""

    def __init__(self, directory: Path) -> None:
        """Use a directory that exists."""
        self._directory = directory
        self._lock = threading.Lock()

    def keep(self, namespace: Namespace) -> None:
        """Write a description that is not there, whole or not at all."""
        path = self._path(namespace.digest)
        with self._lock:
            if not path.exists():
                write_whole(path, namespace.description)

    def remove_all_but(self, namespaces: Collection[bytes]) -> None:
        """Remove the descriptions of others, without a look inside; foreign files stay."""
        wanted = {self._path(digest).name for digest in namespaces}
        for path in list(self._directory.iterdir()):
            if _NAME.fullmatch(path.name) and path.name not in wanted:
                path.unlink()

    def read_all(self) -> dict[bytes, Namespace]:
        """Return every description by digest; what is none is left alone and logged."""
        found: dict[bytes, Namespace] = {}
        for path in sorted(self._directory.glob("*.json")):
            try:
                namespace = Namespace.parse(path.read_bytes())
            except (OSError, msgspec.DecodeError) as error:
                fields = {"path": str(path), "error": str(error)}
                _log.warning("no description of a namespace", extra={"fields": fields})
                continue
            if namespace.digest.hex() == path.stem:
                found[namespace.digest] = namespace
        return found

    def _path(self, digest: bytes) -> Path:
        return self._directory / f"{digest.hex()}.json"

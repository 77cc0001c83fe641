"""Descriptions of namespaces, a readable file each, beside the pages they describe."""

import logging
from pathlib import Path

import msgspec

from memkv_sglang.namespace import Namespace
from memkv_sglang.tiers.nvme.files import write_whole

_log = logging.getLogger(__name__)


class Descriptions:
    """A directory of `DIGEST.json` files. Calls raise `OSError`."""

    def __init__(self, directory: Path) -> None:
        """Use a directory that exists."""
        self._directory = directory

    def keep(self, namespace: Namespace) -> None:
        """Write a description that is not there, whole or not at all."""
        path = self._directory / f"{namespace.digest.hex()}.json"
        if not path.exists():
            write_whole(path, namespace.description)

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

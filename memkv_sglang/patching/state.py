"""Determine by checksum whether the files of an installed SGLang are patched."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from memkv_sglang.patching.errors import PatchError
from memkv_sglang.patching.series import Series, checksum


class FileState(Enum):
    """State of one file."""

    ORIGINAL = "original"
    PATCHED = "patched"
    UNKNOWN = "unknown"
    """Neither of them: the file was edited, or patched by something else."""


class State(Enum):
    """State of all files of a series."""

    ORIGINAL = "not patched"
    PATCHED = "patched"
    INTERRUPTED = "partly patched"
    UNKNOWN = "modified"


def read_states(root: Path, series: Series) -> dict[str, FileState]:
    """Return the state of every file that the series changes."""
    return {path: _file_state(root / path, series, path) for path in series.manifest}


def overall(states: Mapping[str, FileState]) -> State:
    """Return the combined state of the files."""
    found = set(states.values())
    if FileState.UNKNOWN in found:
        return State.UNKNOWN
    if len(found) > 1:
        return State.INTERRUPTED
    return State.PATCHED if FileState.PATCHED in found else State.ORIGINAL


def refuse_unknown(root: Path, series: Series, states: Mapping[str, FileState]) -> None:
    """Raise `PatchError` if a file is neither original nor patched."""
    unknown = [path for path, state in states.items() if state is FileState.UNKNOWN]
    if not unknown:
        return
    if series.manifest[unknown[0]].before is None:
        raise PatchError(f"{root / unknown[0]} is not a file of SGLang {series.version}; remove it")
    raise PatchError(
        f"{root / unknown[0]} differs from SGLang {series.version}"
        + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
        + "; reinstall that version (pip install --force-reinstall --no-deps "
        f"sglang=={series.version}), then run the command again"
    )


def _file_state(file: Path, series: Series, path: str) -> FileState:
    found = checksum(file.read_bytes() if file.exists() else None)
    if found == series.manifest[path].before:
        return FileState.ORIGINAL
    return FileState.PATCHED if found == series.manifest[path].after else FileState.UNKNOWN

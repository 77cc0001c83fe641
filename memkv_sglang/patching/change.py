"""Apply or revert a patch series: all files or none."""

import fcntl
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from memkv_sglang.patching.errors import PatchError
from memkv_sglang.patching.replace import Contents, replace_files, tidy
from memkv_sglang.patching.series import Checksums, Series, checksum
from memkv_sglang.patching.state import FileState, read_states, refuse_unknown
from memkv_sglang.patching.unified_diff import MismatchError

MISMATCH = "the patches do not match their manifest; reinstall sglang-memkv"


def apply_series(root: Path, series: Series) -> int:
    """Patch SGLang below `root`; return how many files changed, 0 if it is patched already.

    Completes a run that was killed. If it raises `PatchError`, no file has changed.
    """
    with _exclusive(root):
        return _change(root, series, FileState.ORIGINAL, list(series.manifest))


def revert_series(root: Path, series: Series) -> int:
    """Restore every file that SGLang published; otherwise like `apply_series`."""
    with _exclusive(root):
        # Remove the new file last, because patched files import it.
        return _change(root, series, FileState.PATCHED, list(reversed(series.manifest)))


def _change(root: Path, series: Series, affected: FileState, order: list[str]) -> int:
    states = read_states(root, series)
    refuse_unknown(root, series, states)
    paths = [path for path in order if states[path] is affected]
    try:
        contents = _new_contents(root, series, affected, paths)
        replace_files(contents)
    except OSError as error:
        raise PatchError(
            f"{error.filename or root}: {error.strerror}; nothing was changed; run the command "
            "again as the owner of the files"
        ) from None
    tidy(root / path for path in series.manifest)
    return len(paths)


def _new_contents(root: Path, series: Series, affected: FileState, paths: list[str]) -> Contents:
    """Return the new content of each file, checked against the manifest."""
    change = series.patched if affected is FileState.ORIGINAL else series.original
    contents: Contents = {}
    for path in paths:
        file = root / path
        try:
            content = change(path, file.read_bytes() if file.exists() else None)
        except MismatchError as error:
            raise PatchError(
                f"{file}: {error}; the patches do not match their manifest; reinstall sglang-memkv"
            ) from None
        if checksum(content) != _expected(series.manifest, path, affected):
            raise PatchError(
                f"{file}: the patches do not match their manifest; reinstall sglang-memkv"
            )
        contents[file] = content
    return contents


def _expected(manifest: Mapping[str, Checksums], path: str, affected: FileState) -> str | None:
    sums = manifest[path]
    return sums.after if affected is FileState.ORIGINAL else sums.before


@contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Lock out other runs, and defer Ctrl-C for the milliseconds that a change takes."""
    directory = os.open(root / "sglang", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        )
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        os.close(directory)

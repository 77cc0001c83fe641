"""Replace several files, all or none."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

Contents = dict[Path, bytes | None]
"""New content of each file, in the order of replacement; None removes the file."""


def replace_files(contents: Contents) -> None:
    """Write every file, or restore all of them and raise `OSError`.

    Each file is written under a temporary name and then renamed, so no process reads half a file.
    If another environment shares a file by a hard link, as `uv` makes them, its copy does not
    change. If the process is killed, every file is either old or new.
    """
    before: Contents = {}
    try:
        for file, content in contents.items():
            if content is not None:
                _write(_temporary(file), content, like=file)
        for file, content in contents.items():
            old = file.read_bytes() if file.exists() else None
            _move(file, content)
            before[file] = old
    except BaseException:
        for file, content in reversed(before.items()):
            if content is not None:
                _write(_temporary(file), content, like=file)
            _move(file, content)
        raise
    finally:
        for file in contents:
            _temporary(file).unlink(missing_ok=True)


def tidy(files: Iterable[Path]) -> None:
    """Remove the temporary files of killed runs, and these modules' compiled files.

    Python compares only size and time, in seconds, so it could take an outdated compiled file for
    current.
    """
    for file in files:
        _temporary(file).unlink(missing_ok=True)
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            compiled.unlink(missing_ok=True)


def _temporary(file: Path) -> Path:
    """Return the file's temporary name, which is always the same, so that `tidy` finds it."""
    return file.with_name(f".{file.name}.memkv-patch")


def _write(file: Path, content: bytes, like: Path) -> None:
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    if like.exists():
        shutil.copymode(like, file)


def _move(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink()
    else:
        _temporary(file).replace(file)

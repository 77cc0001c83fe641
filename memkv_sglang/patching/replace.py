"""Replace several files together."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

Contents = dict[Path, bytes | None]
"""What files are to hold; None: there is to be no file. In the order of replacement."""


def replace_files(contents: Contents) -> None:
    """Give each file its content, or leave all as they were and raise `OSError`.

    New files are made beside the old and renamed: nobody reads half a file, and a file that
    another environment shares by hard link, as `uv` makes them, stays what it is there. A killed
    process leaves every file either old or new.
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
    """Remove what killed runs left beside these files, and what Python compiled of them.

    Python tells a file's versions apart by size and seconds only.
    """
    for file in files:
        _temporary(file).unlink(missing_ok=True)
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            compiled.unlink(missing_ok=True)


def _temporary(file: Path) -> Path:
    """Return a name of our own beside the file; the same in each run, so that the next tidies."""
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

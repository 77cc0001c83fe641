"""What an unknown name was probably meant to be."""

import difflib
from collections.abc import Iterable

from memkv_sglang.config.settings import FILE_VARIABLE, PREFIX, all_settings, sections

_SURE = 0.85
"""Likeness from which a variable outside our sections is taken for a misspelt one of ours."""


def suggestion(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return `; did you mean ...?`, or for `otherwise` a list of what is known after that word."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; {otherwise}: {', '.join(names)}" if otherwise else ""


def unknown_key(key: str) -> str:
    """Say what to do about a key that no setting has."""
    keys = [setting.key for setting in all_settings()]
    name = key.rpartition(".")[2]
    elsewhere = [known for known in keys if known.endswith(f".{name}")]
    hint = suggestion(key, elsewhere or keys)
    return f"unknown setting{hint or '; `memkv config` lists them all'}"


def unknown_variable(variable: str) -> str:
    """Say what to do about a variable that no setting has; empty if it is not meant for us."""
    if not variable.startswith(PREFIX) or variable == FILE_VARIABLE:
        return ""
    known = [FILE_VARIABLE, *(setting.variable for setting in all_settings())]
    ours = variable.removeprefix(PREFIX).partition("_")[0].lower() in sections()
    if not ours and not difflib.get_close_matches(variable, known, n=1, cutoff=_SURE):
        return ""
    hint = suggestion(variable, known, otherwise="unset it; known")
    return f"unknown variable{hint}"

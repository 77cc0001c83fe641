"""Suggest corrections for unknown names."""

import difflib
from collections.abc import Iterable

from memkv_sglang.config.settings import FILE_VARIABLE, PREFIX, all_settings, sections

_TYPO_SIMILARITY = 0.85
"""A variable that names none of our sections still counts as a typo if it is this similar to one of
ours."""


def suggestion(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return `; did you mean ...?`. If no name is close, return `otherwise` and all known names."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; {otherwise}: {', '.join(names)}" if otherwise else ""


def unknown_key(key: str) -> str:
    """Return an error message for a key that is not a setting."""
    keys = [setting.key for setting in all_settings()]
    name = key.rpartition(".")[2]
    elsewhere = [known for known in keys if known.endswith(f".{name}")]
    hint = suggestion(key, elsewhere or keys)
    return f"unknown setting{hint or '; run `memkv config` for a list'}"


def unknown_variable(variable: str) -> str:
    """Return an error message for an unknown variable; "" if the variable is not for memkv."""
    if not variable.startswith(PREFIX) or variable == FILE_VARIABLE:
        return ""
    known = [FILE_VARIABLE, *(setting.variable for setting in all_settings())]
    ours = variable.removeprefix(PREFIX).partition("_")[0].lower() in sections()
    if not ours and not difflib.get_close_matches(variable, known, n=1, cutoff=_TYPO_SIMILARITY):
        return ""
    hint = suggestion(variable, known, otherwise="unset it; known")
    return f"unknown variable{hint}"

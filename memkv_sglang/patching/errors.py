"""The one error of this package."""


class PatchError(Exception):
    """SGLang stays as it is. The text is one line: what is in the way, and the way out."""

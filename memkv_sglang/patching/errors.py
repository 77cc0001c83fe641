"""The exception of this package."""


class PatchError(Exception):
    """SGLang was not changed. The text is one line that says why and what to do."""

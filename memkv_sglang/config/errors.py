"""The one error that bad input leads to."""


class ConfigError(ValueError):
    """A setting that cannot work. The text is one line: the setting, what is wrong, the way out."""

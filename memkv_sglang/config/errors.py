"""The errors that bad input leads to."""


class ConfigError(ValueError):
    """A setting that cannot work. The text is one line: the setting, what is wrong, the way out."""


class BrokenDiskError(ConfigError):
    """The directory that is named may be right, but the disk under it does not work."""

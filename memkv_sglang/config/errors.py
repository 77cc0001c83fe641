"""Exceptions for settings that do not work."""


class ConfigError(ValueError):
    """A setting does not work. The message is one line: the setting, the problem, the fix."""


class BrokenDiskError(ConfigError):
    """The setting may be right, but the disk that it leads to has failed."""

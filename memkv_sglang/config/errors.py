"""Errors for settings that cannot work."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the setting, the problem, the fix."""


class BrokenDiskError(ConfigError):
    """The setting may be right, but the disk of the directory it names has failed."""

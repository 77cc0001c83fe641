"""List all settings with their names in files, variables, flags and the documentation."""

import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from msgspec.structs import fields

from memkv_sglang.config.schema import SECRET, SHARDS, Config, Section, field_meta
from memkv_sglang.config.shards import show_shards
from memkv_sglang.config.units import format_size, format_time

PREFIX = "MEMKV_"
"""Prefix of every variable's name."""

FILE_VARIABLE = "MEMKV_CONFIG"
"""Variable with the path of the TOML file. If its value is empty, no file is read."""

_BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}


@dataclass(frozen=True)
class Setting:
    """One setting, as the schema declares it."""

    section: str
    name: str
    annotation: Any
    """The field's type with its `Meta`, for `msgspec.convert`."""
    default: Any
    unit: str | None
    """How the value is written: as `bytes`, `seconds`, a `path`, `paths` separated by commas,
    `shards`, or None for its plain type."""
    secret: bool
    description: str
    bounds: Mapping[str, float]
    """Limits of the value by operator: `gt`, `ge`, `lt` or `le`."""

    @property
    def key(self) -> str:
        """Name in files and messages, such as `nvme.capacity`."""
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """Name in the environment, such as `MEMKV_NVME_CAPACITY`."""
        return f"{PREFIX}{self.section}_{self.name}".upper()

    @property
    def flag(self) -> str:
        """Name on the command line, such as `--nvme-capacity`. Secrets have no flag."""
        return f"--{self.section}-{self.name}".replace("_", "-")

    @property
    def type(self) -> Any:
        """The type without its `Meta`: `str`, `int`, `float`, `bool` or a `Literal`."""
        return getattr(self.annotation, "__origin__", self.annotation)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values, in the schema's order; empty if the type is not an enumeration."""
        if self.type is bool:
            return ("true", "false")
        literal = get_origin(self.type) is Literal
        return get_args(self.type) if literal else ()

    @property
    def range(self) -> str:
        """The allowed values, in words; empty if every value of the type is allowed."""
        if self.choices:
            return ", ".join(self.choices)
        bounds = {name: self.show(bound) for name, bound in self.bounds.items()}
        if bounds.keys() == {"ge", "le"}:
            return f"{bounds['ge']} to {bounds['le']}"
        return ", ".join(f"{_BOUNDS[name]} {bound}" for name, bound in bounds.items())

    def value_in(self, config: Config) -> Any:
        """Return the setting's value in a configuration; shards as text, without secrets."""
        value = getattr(getattr(config, self.section), self.name)
        return show_shards(value) if self.unit == SHARDS["unit"] else value

    def show(self, value: Any) -> str:
        """Format a value as in a file or flag, with its unit."""
        if self.unit == "bytes":
            return format_size(value)
        if self.unit == "seconds":
            return format_time(value)
        return str(value).lower() if isinstance(value, bool) else str(value)


@cache
def all_settings() -> tuple[Setting, ...]:
    """Return every setting in the schema's order."""
    return tuple(
        setting
        for section, section_type in sections().items()
        for setting in settings_of(section, section_type)
    )


def settings_of(section: str, section_type: type[Section]) -> tuple[Setting, ...]:
    """Return the settings of a section's type, in the schema's order."""
    return tuple(_setting(section, field) for field in fields(section_type))


@cache
def sections() -> Mapping[str, type[Section]]:
    """Return each section's type by name, in the schema's order."""
    return types.MappingProxyType({field.name: field.type for field in fields(Config)})


def section_title(section: str) -> str:
    """Return a section's one-line description."""
    return inspect.getdoc(sections()[section]) or section


def _setting(section: str, field: Any) -> Setting:
    meta = field_meta(field)
    bounds = {name: getattr(meta, name) for name in ("gt", "ge", "lt", "le")}
    unit = (meta.extra or {}).get("unit")
    return Setting(
        section=section,
        name=field.name,
        annotation=field.type,
        default="" if meta.extra == SHARDS else field.default,
        unit=unit,
        secret=meta.extra == SECRET,
        description=meta.description or "",
        bounds={name: bound for name, bound in bounds.items() if bound is not None},
    )

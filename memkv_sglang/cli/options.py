"""A flag for every setting, generated from the schema."""

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from typing_extensions import override

from memkv_sglang.cli.output import print_line
from memkv_sglang.config.load import SYSTEM_FILE, USER_FILE, load
from memkv_sglang.config.service_links import service_links_note
from memkv_sglang.config.settings import (
    FILE_VARIABLE,
    Setting,
    all_settings,
    section_title,
    sections,
)
from memkv_sglang.config.units import parse_time

Command = TypeVar("Command", bound=Callable[..., Any])

_METAVARS = {"bytes": "SIZE", "seconds": "TIME", "path": "PATH", "paths": "PATHS"}
FILE_PARAMETER = "config_file"
"""Name of the parameter of `--config`."""


class Duration(click.ParamType[float]):
    """A time such as `250ms` or `7d`, within bounds."""

    name = "time"

    def __init__(self, shortest: str, longest: str) -> None:
        """Set the bounds, such as `1s`."""
        self._shortest, self._longest = shortest, longest

    @override
    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if not isinstance(value, str):
            return value
        try:
            seconds = parse_time(value)
        except ValueError:
            self.fail(f"{value[:60]!r} is not a time such as 250ms, 2s or 1h", param, ctx)
        if not parse_time(self._shortest) <= seconds <= parse_time(self._longest):
            bounds = f"{self._shortest} to {self._longest}"
            self.fail(f"{value[:60]!r} is out of range; use {bounds}", param, ctx)
        return seconds


def timeout_option(command: Command) -> Command:
    """Add `--timeout`; the command gets its value in seconds, or None, as `timeout`."""
    add = click.option(
        "--timeout",
        type=Duration("1s", "30d"),
        metavar="TIME",
        help="Give up after this time, with exit status 1. The next run continues.  [default: no "
        "limit]",
    )
    return add(command)


class SettingOption(click.Option):
    """A flag that overrides one setting."""

    def __init__(self, setting: Setting) -> None:
        """Make the flag of a setting. A secret's flag is hidden; using it fails with a hint."""
        self.setting = setting
        flag = setting.flag
        if setting.type is bool:
            super().__init__([_parameter(setting), f"{flag}/--no-{flag[2:]}"], default=None)
        else:
            super().__init__([_parameter(setting), flag], metavar=_metavar(setting), type=str)
        self.help = _help(setting)
        self.hidden = setting.secret

    @override
    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if self.setting.unit in ("path", "paths"):
            return [CompletionItem(incomplete, type="file")]
        choices = self.setting.choices
        return [CompletionItem(choice) for choice in choices if choice.startswith(incomplete)]


class SettingsCommand(click.Command):
    """A command with `--config` and a flag for every setting.

    Calls the function with `loaded`, the configuration. The help shows the command's own options
    first, then the settings of some sections.
    """

    def __init__(self, *, shown: tuple[str, ...], **attributes: Any) -> None:
        """Add the flags. The help shows those of the sections in `shown`."""
        super().__init__(**attributes)
        self._shown = shown
        self.params += [_file_option(), *(SettingOption(setting) for setting in all_settings())]

    def invoke(self, ctx: click.Context) -> Any:
        """Load the configuration, then call the function. Raises `ConfigError`."""
        file: Path | None = ctx.params.pop(FILE_PARAMETER)
        given = {setting.key: ctx.params.pop(_parameter(setting)) for setting in all_settings()}
        overrides = {key: _as_text(value) for key, value in given.items() if value is not None}
        loaded = load(file, os.environ, overrides)
        if loaded.service_links:
            print_line(f"note: {service_links_note(loaded.service_links)}", err=True)
        ctx.params["loaded"] = loaded
        return super().invoke(ctx)

    @override
    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[click.Parameter]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue  # the usage line shows this argument
            section = parameter.setting.section if isinstance(parameter, SettingOption) else ""
            groups[section].append(parameter)
        _write_group(ctx, formatter, "Options", groups[""])
        for section in self._shown:
            _write_group(ctx, formatter, _title(section), groups[section])
        if set(self._shown) != set(sections()):
            formatter.write_paragraph()
            formatter.write_text("All other settings have flags too; see memkv config --help.")


def _file_option() -> click.Option:
    return click.Option(
        [FILE_PARAMETER, "--config"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        help=f"TOML file with settings.  [default: {FILE_VARIABLE} if set, else "
        f"{SYSTEM_FILE} and then $XDG_CONFIG_HOME/{USER_FILE}]",
    )


def _parameter(setting: Setting) -> str:
    return f"{setting.section}__{setting.name}"


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join(setting.choices)
    number = "N" if setting.type in (int, float) else "TEXT"
    return _METAVARS.get(setting.unit or "", number)


def _help(setting: Setting) -> str:
    default = setting.show(setting.default) if setting.default != "" else "empty"
    notes = [f"default: {default}"]
    if setting.range and not setting.choices:
        notes.append(setting.range)
    return f"{setting.description.replace('`', '')}  [{'; '.join(notes)}]"


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _title(section: str) -> str:
    return f"[{section}] {section_title(section).removesuffix('.')}"


def _write_group(
    ctx: click.Context,
    formatter: click.HelpFormatter,
    title: str,
    parameters: list[click.Parameter],
) -> None:
    records = [record for parameter in parameters if (record := parameter.get_help_record(ctx))]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)

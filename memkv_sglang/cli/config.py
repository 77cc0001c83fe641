"""`memkv config`."""

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import make_console, print_json
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import REDACTED
from memkv_sglang.config.settings import Setting, all_settings, sections


@click.command(
    cls=SettingsCommand,
    shown=tuple(sections()),
    short_help="Show every setting and where its value comes from.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config(loaded: LoadedConfig, as_json: bool) -> None:
    """Show every setting and where its value comes from. Secrets are hidden."""
    if as_json:
        print_json({setting.key: _entry(setting, loaded) for setting in all_settings()})
        return
    from rich.table import Table

    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for setting in all_settings():
        origin = _source(setting, loaded)
        style = "dim" if origin == "default" else "bold"
        table.add_row(setting.key, _shown(setting, loaded), origin, style=style)
    make_console().print(table)


def _entry(setting: Setting, loaded: LoadedConfig) -> dict[str, object]:
    value = setting.value_in(loaded.config)
    shown = REDACTED if setting.secret and value else value
    return {"value": shown, "from": _source(setting, loaded)}


def _shown(setting: Setting, loaded: LoadedConfig) -> str:
    value = setting.value_in(loaded.config)
    if setting.secret and value:
        return REDACTED
    return setting.show(value) if value != "" else "-"


def _source(setting: Setting, loaded: LoadedConfig) -> str:
    return loaded.origins[setting.key].source if setting.key in loaded.origins else "default"

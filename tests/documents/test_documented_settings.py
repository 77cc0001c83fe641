"""Every configuration file, setting and variable in the documentation."""

import configparser
import json
import re
import tomllib
from pathlib import Path

import pytest

from memkv_sglang.config.load import load_config
from memkv_sglang.config.settings import FILE_VARIABLE, all_settings, sections
from memkv_sglang.encryption.keys import load_key_ring
from memkv_sglang.tiers.minio.auth.credentials_file import read_credentials
from tests.documents.pages import PAGES, ROOT, Block, blocks, spans

_SETTING = re.compile(rf"({'|'.join(sections())})\.([a-z_]+)( = .*)?")
_VARIABLE = re.compile(r"\bMEMKV_[A-Z_]+\b(?!\*)")
_SHARD_VARIABLE = re.compile(r"MEMKV_MINIO_SHARD_[A-Z]+_(ACCESS|SECRET)_KEY")

OTHER_VARIABLES = {
    FILE_VARIABLE,
    "MEMKV_MINIO_PORT",  # Kubernetes sets it for a service called memkv-minio
    "MEMKV_TEST_PATCHED",
}


NO_SETTINGS = {"engine.py", "agent.log", "agent.sock", "agent.settings"}
"""Names with a dot that are not settings: files, and a value of the Helm chart."""


def of_language(*languages: str) -> list[Block]:
    return [block for block in blocks() if block.language in languages]


def check_toml(path: Path) -> None:
    """Read a file as configuration, credentials or keys, whichever it is. Raises `ConfigError`."""
    tables = tomllib.loads(path.read_text())
    if "access_key" in tables:
        read_credentials(str(path))
    elif "keys" in tables:
        load_key_ring(str(path))
    else:
        load_config(path, {})


@pytest.mark.parametrize("block", of_language("toml"), ids=lambda block: block.place)
def test_toml_files_are_accepted(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_text(block.text)
    path.chmod(0o600)
    check_toml(path)


def test_other_files_can_be_parsed() -> None:
    yaml = pytest.importorskip("yaml")
    for block in of_language("yaml"):
        assert yaml.safe_load(block.text), block.place
    for block in of_language("json"):
        assert json.loads(block.text), block.place
    for block in of_language("ini"):
        configparser.ConfigParser(strict=False, interpolation=None).read_string(block.text)


def test_settings_named_in_sentences_exist() -> None:
    known = {setting.key for setting in all_settings()}
    named = [
        (span, found)
        for span in spans()
        if span.text not in NO_SETTINGS and (found := _SETTING.fullmatch(span.text))
    ]
    unknown = [span for span, found in named if f"{found[1]}.{found[2]}" not in known]
    assert not unknown, "\n".join(f"{span.place}: {span.text}" for span in unknown)
    assert len(named) > 50


def test_variables_exist() -> None:
    known = {setting.variable for setting in all_settings()} | OTHER_VARIABLES
    for page in PAGES:
        named = set(_VARIABLE.findall(page.read_text()))
        unknown = {name for name in named - known if not _SHARD_VARIABLE.fullmatch(name)}
        assert not unknown, page.relative_to(ROOT)

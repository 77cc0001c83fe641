"""Where values come from, and which source takes precedence."""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memkv_sglang.config import load as load_module
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load, load_config
from memkv_sglang.config.schema import Config
from memkv_sglang.config.settings import Setting, all_settings
from memkv_sglang.config.shards import shard_configs
from memkv_sglang.config.units import parse_time

# Values that are valid together with any other values here.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "agent.http_port": st.integers(0, 65535),
    "agent.log_level": st.sampled_from(["debug", "info", "warning", "error"]),
    "engine.lookup_budget": st.integers(1, 4000).map(lambda ms: f"{ms}ms"),
    "nvme.capacity": st.integers(1, 1 << 20).map(lambda size: f"{size}MiB"),
    "nvme.directory": st.sampled_from(["/a", "/b/c", "/d"]),
    "minio.connections": st.integers(1, 256),
    "minio.create_bucket": st.booleans(),
}
KNOWN = {setting.key: setting for setting in all_settings()}

layers = st.fixed_dictionaries({}, optional=VALUES)


def as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(layer: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in layer.items())


def value_of(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=layers, environ=layers, flags=layers)
def test_flags_override_variables_override_the_file_override_defaults(
    tmp_path: Path, file: dict[str, Any], environ: dict[str, Any], flags: dict[str, Any]
) -> None:
    path = tmp_path / "memkv.toml"
    path.write_text(as_toml(file))
    loaded = load(
        path,
        {KNOWN[key].variable: as_text(value) for key, value in environ.items()},
        {key: as_text(value) for key, value in flags.items()},
    )
    for key, setting in KNOWN.items():
        winner = next((layer[key] for layer in (flags, environ, file) if key in layer), None)
        only = load(None, {}, {} if winner is None else {key: as_text(winner)})
        assert value_of(loaded.config, key) == value_of(only.config, key)
        sources = [
            (flags, setting.flag), (environ, setting.variable), (file, str(path))
        ]  # fmt: skip
        expected = next((source for layer, source in sources if key in layer), None)
        assert (loaded.origins[key].source if key in loaded.origins else None) == expected


def test_without_input_every_setting_has_its_default() -> None:
    assert load_config(None, {}, {}) == Config()


def test_the_variable_names_the_file_unless_the_caller_does(tmp_path: Path) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text("nvme.queue_depth = 1")
    other.write_text("nvme.queue_depth = 2")
    assert load_config(None, {"MEMKV_CONFIG": str(one)}, {}).nvme.queue_depth == 1
    assert load_config(other, {"MEMKV_CONFIG": str(one)}, {}).nvme.queue_depth == 2


def test_default_files_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, home = tmp_path / "etc" / "config.toml", tmp_path / "home"
    user = home / ".config" / "memkv" / "config.toml"
    monkeypatch.setattr(load_module, "SYSTEM_FILE", system)
    environ = {"HOME": str(home)}
    assert load_config(None, environ, {}) == Config()
    system.parent.mkdir()
    system.write_text("nvme.queue_depth = 1\nnvme.directory = 'cache'")
    user.parent.mkdir(parents=True)
    user.write_text("nvme.queue_depth = 2")
    loaded = load(None, environ, {})
    assert loaded.config.nvme.queue_depth == 2
    assert loaded.config.nvme.directory == str(system.parent / "cache")
    assert loaded.origins["nvme.queue_depth"].source == str(user)
    assert loaded.origins["nvme.directory"].source == str(system)
    relative = {**environ, "XDG_CONFIG_HOME": "relative"}
    assert load_config(None, relative, {}).nvme.queue_depth == 2
    other = {**environ, "XDG_CONFIG_HOME": str(tmp_path / "elsewhere")}
    assert load_config(None, other, {}).nvme.queue_depth == 1


def test_a_named_file_replaces_the_default_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, named = tmp_path / "config.toml", tmp_path / "named.toml"
    monkeypatch.setattr(load_module, "SYSTEM_FILE", system)
    system.write_text("nvme.queue_depth = 1\nnvme.directory = '/cache'")
    named.write_text("nvme.queue_depth = 3")
    for config in (
        load_config(named, {}, {}),
        load_config(None, {"MEMKV_CONFIG": str(named)}, {}),
    ):
        assert (config.nvme.queue_depth, config.nvme.directory) == (3, "")
    assert load_config(None, {"MEMKV_CONFIG": ""}, {}) == Config()


@pytest.mark.parametrize(
    "home", ["", "/nonexistent", "/proc/self/mem", "relative", "/" + "x" * 5000]
)
def test_a_home_without_a_file_is_no_error(home: str) -> None:
    assert load_config(None, {"HOME": home}, {}) == Config()


def test_a_default_file_that_cannot_be_used_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "config.toml"
    monkeypatch.setattr(load_module, "SYSTEM_FILE", system)
    system.symlink_to("none")
    with pytest.raises(ConfigError, match=f"cannot read {system}"):
        load_config(None, {}, {})
    system.unlink()
    system.write_text("[nvme")
    with pytest.raises(ConfigError, match=f"{system}: not valid TOML"):
        load_config(None, {}, {})


def test_units_work_in_every_source(tmp_path: Path) -> None:
    path = tmp_path / "memkv.toml"
    path.write_text(
        '[nvme]\ncapacity = 4194304\n[engine]\nlookup_budget = "50ms"\nbatch_deadline = 3'
    )
    config = load_config(path, {"MEMKV_AGENT_DRAIN_TIMEOUT": "1m"}, {"nvme.segment_size": "2MiB"})
    assert config.nvme.capacity == 4 << 20
    assert config.nvme.segment_size == 2 << 20
    assert (config.engine.lookup_budget, config.engine.batch_deadline) == (0.05, 3.0)
    assert config.agent.drain_timeout == 60.0


def test_relative_paths_are_relative_to_the_file_or_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "etc" / "memkv.toml"
    path.parent.mkdir()
    path.write_text('nvme.directory = "../cache"\nminio.ca_file = "~/ca.pem"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(path, {"MEMKV_AGENT_SOCKET": "run/agent.sock"}, {})
    assert config.nvme.directory == str(tmp_path / "cache")
    assert config.minio.ca_file == "/home/me/ca.pem"
    assert config.agent.socket == str(tmp_path / "run" / "agent.sock")


def test_other_programs_variables_are_ignored() -> None:
    environ = {"PATH": "/bin", "MEMKVX": "1", "MEMKV_LAUNCHER_SOMETHING": "1", "MEMKV_CONFIG": ""}
    assert load_config(None, environ, {}) == Config()


def test_every_default_is_valid_and_survives_a_round_trip() -> None:
    for setting in all_settings():
        if setting.default != "":
            text = setting.show(setting.default)
            assert value_of(load_config(None, {setting.variable: text}, {}), setting.key) == (
                setting.default
            )
    assert msgspec.json.decode(msgspec.json.encode(Config()), type=Config) == Config()


TWO_SHARDS = {
    "MEMKV_MINIO_SHARDS": '[{name = "a", endpoint = "http://one:9000"}, '
    '{name = "b-2", endpoint = "https://two:9000,https://three:9000", region = "r"}]'
}


def test_shards_inherit_what_they_do_not_set(tmp_path: Path) -> None:
    path = tmp_path / "memkv.toml"
    path.write_text(
        """
        [minio]
        bucket = "pages"
        credentials_file = "common.toml"
        connections = 3
        replicas = 2
        [[minio.shards]]
        name = "a"
        endpoint = "http://one:9000"
        [[minio.shards]]
        name = "b-2"
        endpoint = "https://two:9000,https://three:9000"
        bucket = "others"
        access_key = "key"
        ca_file = "ca.pem"
        """
    )
    path.chmod(0o600)
    config = load_config(path, {"MEMKV_MINIO_SHARD_B_2_SECRET_KEY": "hunter2"}, {})
    a, b = shard_configs(config.minio).values()
    assert (a.endpoint, a.bucket) == ("http://one:9000", "pages")
    assert a.credentials_file == str(tmp_path / "common.toml")
    assert (b.endpoint, b.bucket) == ("https://two:9000,https://three:9000", "others")
    assert (b.access_key, b.secret_key, b.credentials_file) == ("key", "hunter2", "")
    assert b.ca_file == str(tmp_path / "ca.pem")
    assert a.connections == b.connections == 3
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config
    for text in (repr(config), str(KNOWN["minio.shards"].value_in(config))):
        assert "b-2" in text and "hunter2" not in text


def test_shards_in_a_variable_are_as_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "memkv.toml"
    path.write_text(f"minio.shards = {TWO_SHARDS['MEMKV_MINIO_SHARDS']}")
    assert load_config(path, {}, {}) == load_config(None, TWO_SHARDS, {})
    flags = {"minio.shards": TWO_SHARDS["MEMKV_MINIO_SHARDS"]}
    assert load_config(None, {}, flags) == load_config(None, TWO_SHARDS, {})
    assert list(shard_configs(load_config(None, TWO_SHARDS, {}).minio)) == ["a", "b-2"]
    assert shard_configs(load_config(None, {}, {}).minio) == {}
    one = load_config(None, {}, {"minio.endpoint": "http://one:9000"}).minio
    assert shard_configs(one) == {"": one}


@pytest.mark.parametrize("setting", [s for s in all_settings() if s.bounds], ids=lambda s: s.key)
def test_ranges_hold_at_their_ends(setting: Setting) -> None:
    for bound, limit in setting.bounds.items():
        inside = bound in ("ge", "le")
        step = 1 if setting.type is int else 1e-6
        outer = limit - step if bound in ("gt", "ge") else limit + step
        if outer >= 0:
            with pytest.raises(ConfigError, match=setting.variable):
                load(None, {setting.variable: f"{outer:.7f}".rstrip("0").rstrip(".")}, {})
        if inside and limit > 0 and setting.type is int:
            load(None, {**TWO_SHARDS, setting.variable: str(limit)}, {})


def test_only_a_file_with_secrets_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "memkv.toml"
    path.write_text('[minio]\naccess_key = "A"\nsecret_key = "S"')
    path.chmod(0o600)
    assert load_config(path, {}, {}).minio.secret_key == "S"
    for mode in (0o644, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"minio.access_key in {path}.*chmod 600 {path}"):
            load_config(path, {}, {})
    path.write_text("nvme.queue_depth = 1")
    load_config(path, {}, {})


def test_ranges_of_times_are_shown_with_their_unit() -> None:
    with pytest.raises(ConfigError, match="more than 0s, at most 4s"):
        load(None, {"MEMKV_ENGINE_LOOKUP_BUDGET": "5s"}, {})
    assert parse_time("4s") == 4.0


def test_only_the_given_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MEMKV_NVME_THREADS", "7")
    assert load_config(None, {}, {}).nvme.queue_depth == Config().nvme.queue_depth


@pytest.mark.parametrize("value", ['["one", "/two/../2"]', "'one, /two/../2'"])
def test_several_directories_are_a_list_or_separated_by_commas(tmp_path: Path, value: str) -> None:
    file = tmp_path / "memkv.toml"
    file.write_text(f"nvme.directory = {value}")
    nvme = load_config(file, {}).nvme
    assert [one.directory for one in nvme.for_each_directory()] == [str(tmp_path / "one"), "/2"]
    assert nvme.for_each_directory()[0].capacity == nvme.capacity


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ('["/a", 1]', "1 is not text"),
        ('["/a,b"]', "contains a comma"),
        ('["/a", "/b/../a"]', "names /a twice"),
        ('"/a,/a"', "names /a twice"),
    ],
)
def test_wrong_lists_of_directories_are_refused(tmp_path: Path, value: str, problem: str) -> None:
    file = tmp_path / "memkv.toml"
    file.write_text(f"nvme.directory = {value}")
    with pytest.raises(ConfigError, match=problem) as error:
        load_config(file, {})
    assert str(error.value).startswith(f"nvme.directory in {file}: ")

"""Odd values, files and environments give a valid setting, or one line and exit status 2."""

import contextlib
import os
import pwd
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.cli.main import main
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load_config
from memkv_sglang.config.private import SIZE_LIMIT, parse_toml
from memkv_sglang.config.settings import Setting, all_settings
from memkv_sglang.config.units import MAX_SIZE, MAX_TIME, parse_size, parse_time
from memkv_sglang.config.values import MAX_COUNT
from tests.cases.commands import assert_clean, memkv

LIMITS = {"bytes": MAX_SIZE, "seconds": MAX_TIME}

ODD_TEXTS = (
    *("", " ", "-", "-1", "-0", "+5", "1_000", "0x10", "1e3", "1e308", "1e999", "nan", "inf"),
    *(
        "-inf",
        "NaN",
        "Infinity",
        "\u0661",
        "\u00bd",
        "1,5",
        "1.5.2",
        ".5",
        "5.",
        "0" * 50,
        "9" * 40,
    ),
    *("9" * 5000, "1" * 39 + "PiB", "99999999d", "1e3s", "1 GiB s", "1GiBs", "true", "null", "[]"),
    *("\x00", "\x1b[2J", "a\nb", "\udcff", "\u202e", "~", "~nobody/x", "/" * 5000, "x" * 200),
)

ODD_VALUES = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=8),
    st.integers(),
    st.sampled_from((10**30, -(10**30), 10**400, 2**63, 2**64)),
    st.floats(),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.dates(),
    st.from_regex(r"[0-9]{1,25}(\.[0-9]{1,25})? ?(ms|s|m|h|d|B|KB|GiB|PiB|XB)?", fullmatch=True),
)
settings = st.sampled_from([setting for setting in all_settings() if not setting.secret])


def attempt(setting: Setting, load: Callable[[], Any]) -> None:
    """Load the settings; require a valid value or one clean line that names the setting."""
    try:
        config = load()
    except ConfigError as error:
        line = str(error)
        assert len(line) < 800
        assert "\n" not in line
        assert line.isprintable()
        return
    value = getattr(getattr(config, setting.section), setting.name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert 0 <= value <= LIMITS.get(setting.unit or "", MAX_COUNT)


@given(settings, ODD_VALUES)
def test_any_value_of_a_flag_or_variable(setting: Setting, value: object) -> None:
    text = str(value) if not isinstance(value, int) else f"{value:x}"
    attempt(setting, lambda: load_config(None, {}, {setting.key: text}))
    attempt(setting, lambda: load_config(None, {setting.variable: text}, {}))


@given(settings, ODD_VALUES)
def test_any_value_in_a_file(setting: Setting, value: object) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "memkv.toml"
        line = f"[{setting.section}]\n{setting.name} = {_toml(value)}\n"
        path.write_text(line, errors="surrogatepass")
        attempt(setting, lambda: load_config(path, {}, {}))


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(char):08x}" for char in value) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {item}" for key, item in value.items()) + "}"
    return f"0x{value:x}" if isinstance(value, int) and value >= 10**30 else str(value)


@given(st.sampled_from(ODD_TEXTS) | st.text(max_size=60))
def test_any_quantity_is_a_number_or_refused(text: str) -> None:
    for parse in (parse_size, parse_time):
        try:
            value = parse(text)
        except ValueError:
            continue
        assert 0 <= value < 1e80
        assert text.isascii() or text.strip().isascii()


@given(st.binary(max_size=200) | st.text("[]{}\"'=.#\n ab1\u00e9", max_size=200).map(str.encode))
def test_any_content_is_a_document_or_refused(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_toml(content), dict)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 50_000,
        b"[nvme]\ncapacity = " + b"[" * 50_000,
        b"[nvme]\ncapacity = " + b"9" * 5_000,
        b"# " + b"x" * SIZE_LIMIT,
        b"\xff\xfe[\x00n\x00",
        b"\x00",
        b"nvme = 1",
        b"nvme = []",
        b"[[nvme]]\ncapacity = 1",
        b"[nvme]\ncapacity = {}",
        b"[nvme]\ncapacity = 2026-01-01",
        b"[nvme]\n\"\\u001b[2J\" = 1",
        b"\"\\u001b[2J\" = 1",
        b"[\"\\u202e\"]\nx = 1",
    ],
    ids=lambda content: repr(content[:30]),
)  # fmt: skip
def test_a_malformed_file_is_a_one_line_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "memkv.toml"
    path.write_bytes(content)
    done = memkv("config", "--config", str(path))
    assert done.returncode == 2
    assert_clean(done.stderr)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "missing", "loop", "not UTF-8"])
def test_a_configuration_that_is_not_a_file_is_one_line(tmp_path: Path, kind: str) -> None:
    path: str | bytes = str(tmp_path / "thing")
    match kind:
        case "directory":
            Path(tmp_path / "thing").mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path = "/dev/zero"
        case "loop":
            Path(tmp_path / "thing").symlink_to("thing")
        case "not UTF-8":
            path = os.fsencode(path) + b"\xff\x1b[2J"
    by_flag = memkv("config", "--config", path)
    by_variable = memkv("config", environ={"MEMKV_CONFIG": os.fsdecode(path)})
    for done in (by_flag, by_variable):
        assert done.returncode == 2
        assert_clean(done.stderr)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: configuration file: ")
        assert line.endswith("; name another file")


@pytest.mark.parametrize(
    "variables",
    [
        {"LANG": "C"},
        pytest.param({"LC_ALL": "POSIX"}, marks=pytest.mark.slow),
        pytest.param({"LC_ALL": "xx_YY.nonsense"}, marks=pytest.mark.slow),
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
        {"PYTHONIOENCODING": "ascii:strict"},
        pytest.param({"PYTHONIOENCODING": "latin-1"}, marks=pytest.mark.slow),
        pytest.param({"TERM": "dumb"}, marks=pytest.mark.slow),
        {"TERM": "dumb", "FORCE_COLOR": "1"},
        pytest.param({"COLUMNS": "nonsense"}, marks=pytest.mark.slow),
        {"COLUMNS": "1"},
        pytest.param({"COLUMNS": "-5"}, marks=pytest.mark.slow),
        {"HOME": "/nonexistent"},
        pytest.param({"HOME": "/proc"}, marks=pytest.mark.slow),
        pytest.param({"HOME": ""}, marks=pytest.mark.slow),
        {"TMPDIR": "/nonexistent"},
        {"XDG_RUNTIME_DIR": "/nonexistent"},
        pytest.param({"XDG_RUNTIME_DIR": ""}, marks=pytest.mark.slow),
        pytest.param({"XDG_RUNTIME_DIR": "/proc"}, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_any_environment_is_accepted(variables: dict[str, str], tmp_path: Path) -> None:
    environ = {"MEMKV_NVME_DIRECTORY": str(tmp_path / "nvme"), **variables}
    for arguments in (("config",), ("doctor",), ("--help",), ("inspect", "\u00e9[/x]")):
        done = memkv(*arguments, environ=environ)
        assert_clean(done.stderr)
        assert "Traceback" not in done.stdout
        assert done.returncode == (2 if arguments[0] == "inspect" else 0), done
    path = "/tmp/nvm\u00e9"
    shown = memkv("config", "--json", environ={**environ, "MEMKV_NVME_DIRECTORY": path})
    assert '"/tmp/nvm\\u00e9"' in shown.stdout or "unprintable" in shown.stderr


@pytest.mark.parametrize("verb", ["config", "doctor", "pins", "inspect"])
def test_a_user_without_a_name_or_a_home(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("MEMKV_MINIO_ENDPOINT", "http://127.0.0.1:1")
    assert main([verb]) == (verb != "config")
    if verb == "pins":
        assert "no credentials for MinIO" in capsys.readouterr().err


VERBS = (("config",), ("config", "--json"), ("doctor",), ("--version",), ("--help",))


@pytest.mark.parametrize("arguments", VERBS, ids=" ".join)
def test_closed_output_pipe(arguments: tuple[str, ...], tmp_path: Path) -> None:
    environ = {"MEMKV_NVME_DIRECTORY": str(tmp_path / "nvme")}
    with Path("/dev/full").open("w") as full:
        done = memkv(*arguments, environ=environ, capture_output=False, stdout=full, stderr=-1)
        assert done.returncode == 1
        assert done.stderr.startswith("error: cannot write the output (No space left on device)")
        assert_clean(done.stderr)
        assert memkv("inspect", "zz", capture_output=False, stderr=full).returncode == 2
    reader, writer = os.pipe()
    os.close(reader)
    done = memkv(*arguments, environ=environ, capture_output=False, stdout=writer, stderr=-1)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    closed = memkv(*arguments, environ=environ, preexec_fn=lambda: os.close(1))
    assert (closed.returncode, closed.stderr) == (0, "")
    assert (
        memkv(*arguments, environ=environ, preexec_fn=lambda: os.closerange(1, 3)).returncode == 0
    )

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from memkv_sglang.cli.main import main
from memkv_sglang.patching import replace
from memkv_sglang.patching.change import apply_series, revert_series
from memkv_sglang.patching.errors import PatchError
from memkv_sglang.patching.series import Series, checksum, read_diffs, read_series, series_folder
from memkv_sglang.patching.state import FileState, State, overall, read_states
from memkv_sglang.plugin.hooks import required_hooks
from memkv_sglang.plugin.versions import SUPPORTED

Run = Callable[[str], int]

SERVER_ARGS = "sglang/srt/server_args.py"
NEW_FILE = "sglang/srt/mem_cache/memkv.py"


@pytest.fixture
def patch(site_packages: Path) -> Run:
    return lambda verb: main(["patch", verb, "--site-packages", str(site_packages)])


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(root)): (file.read_bytes(), file.stat().st_mode)
        for file in root.rglob("*")
        if file.is_file()
    }


def state(root: Path, series: Series) -> State:
    return overall(read_states(root, series))


def test_revert_restores_every_byte(
    site_packages: Path, patch: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (site_packages / SERVER_ARGS).chmod(0o640)
    before = contents(site_packages)
    assert patch("status") == 0
    assert "not patched\n" in capsys.readouterr().out
    assert patch("apply") == 0
    assert patch("status") == 0
    assert ": patched\n" in capsys.readouterr().out
    after = contents(site_packages)
    assert NEW_FILE in after
    assert after[SERVER_ARGS][1] == before[SERVER_ARGS][1]
    for file in (file for file in after if file.endswith(".py")):
        compile(after[file][0], file, "exec")
    assert patch("revert") == 0
    assert contents(site_packages) == before


@pytest.mark.parametrize("verbs", [["apply", "apply"], ["revert"], ["apply", "revert", "revert"]])
def test_a_second_time_changes_nothing(
    site_packages: Path, patch: Run, verbs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in verbs[:-1]:
        assert patch(verb) == 0
    before = contents(site_packages)
    assert patch(verbs[-1]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(site_packages) == before


def test_compiled_files_are_removed(site_packages: Path, patch: Run) -> None:
    module = site_packages / "sglang/srt/mem_cache/storage/mmap/mmap_allocator.py"
    compiled = module.parent / "__pycache__" / "mmap_allocator.cpython-311.pyc"
    other = compiled.with_name("mmap_allocator_of_others.cpython-311.pyc")
    for verb in ("apply", "revert"):
        compiled.parent.mkdir(exist_ok=True)
        compiled.write_bytes(b"of the old text")
        other.write_bytes(b"")
        assert patch(verb) == 0
        assert not compiled.exists()
        assert other.exists()


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_an_edited_file_is_named_and_nothing_changed(
    site_packages: Path, patch: Run, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if verb == "revert":
        patch("apply")
    with (site_packages / SERVER_ARGS).open("a") as file:
        file.write("# mine\n")
    before = contents(site_packages)
    assert patch("status") == 1
    capsys.readouterr()
    assert patch(verb) == 1
    error = capsys.readouterr().err
    assert str(site_packages / SERVER_ARGS) in error
    assert "pip install --force-reinstall" in error
    assert error.count("\n") == 1
    assert contents(site_packages) == before


def test_an_existing_file_is_not_overwritten_by_the_new_one(
    site_packages: Path, patch: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (site_packages / NEW_FILE).write_text("mine")
    assert patch("apply") == 1
    assert f"{site_packages / NEW_FILE} is not a file of SGLang" in capsys.readouterr().err
    assert (site_packages / NEW_FILE).read_text() == "mine"


@pytest.mark.parametrize("verb", ["status", "apply", "revert"])
def test_an_unknown_version_is_refused_and_known_ones_are_named(
    site_packages: Path,
    series: Series,
    patch: Run,
    verb: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    metadata = next(site_packages.glob("*.dist-info"))
    given = f"Version: {series.version}"
    text = (metadata / "METADATA").read_text().replace(given, "Version: 0.5.99")
    metadata.rename(site_packages / "sglang-0.5.99.dist-info")
    (site_packages / "sglang-0.5.99.dist-info" / "METADATA").write_text(text)
    before = contents(site_packages)
    assert patch(verb) == 1
    assert "SGLang 0.5.99: patches exist only for 0.5.22, 0.5.23" in capsys.readouterr().err
    assert contents(site_packages) == before


def test_missing_sglang_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "status", "--site-packages", str(tmp_path)]) == 1
    assert "--site-packages DIR" in capsys.readouterr().err


@pytest.mark.parametrize("change", [apply_series, revert_series])
@pytest.mark.parametrize("failing", [1, 6, 12, 17])
def test_a_full_disk_leaves_every_file_as_it_was(
    site_packages: Path,
    series: Series,
    change: Callable[[Path, Series], int],
    failing: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if change is revert_series:
        apply_series(site_packages, series)
    before = contents(site_packages)
    calls = iter(range(1, 1000))

    def fail_once(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            if next(calls) == failing:
                raise OSError(28, "No space left on device", "a file")
            real(*args, **kwargs)

        return call

    monkeypatch.setattr(replace, "_write", fail_once(replace._write))
    monkeypatch.setattr(replace, "_move", fail_once(replace._move))
    with pytest.raises(PatchError, match="No space left on device; nothing was changed"):
        change(site_packages, series)
    assert contents(site_packages) == before


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from memkv_sglang.patching import change, replace
from memkv_sglang.patching.series import read_series, series_folder

def stop_at(real, count=iter(range(1000))):
    def call(*args, **kwargs):
        if next(count) == int(sys.argv[3]):
            os.kill(os.getpid(), getattr(signal, sys.argv[4]))
        real(*args, **kwargs)
    return call

replace._write, replace._move = stop_at(replace._write), stop_at(replace._move)
getattr(change, sys.argv[2])(Path(sys.argv[1]), read_series(series_folder(), sys.argv[5]))
"""


def run_until(site_packages: Path, series: Series, change: str, step: int, how: str) -> int:
    given = [str(site_packages), change, str(step), how, series.version]
    return subprocess.run(
        [sys.executable, "-c", KILLED_AT, *given],
        stderr=subprocess.DEVNULL,
        check=False,
    ).returncode


WRAPPED = re.compile(r"^\+\s*@memkv_hook\n(?:^ .*\n)*?^ \s*(?:async )?def (\w+)", re.MULTILINE)


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_supported_version_has_a_series_that_wraps_every_required_function(
    version: str,
) -> None:
    folder = series_folder()
    text = "".join(path.read_text() for path in (folder / f"sglang-{version}").glob("*.patch"))
    wrapped = Counter(WRAPPED.findall(text))
    needed = Counter(hook.target.rpartition(".")[2] for hook in required_hooks())
    assert wrapped == needed + Counter(["resolve_once"])
    assert set(read_series(folder, version).manifest) == set(read_diffs(folder, version))


def importable(site_packages: Path, series: Series) -> bool:
    """Return whether the new file exists if any patched file needs it."""
    states = read_states(site_packages, series)
    return FileState.PATCHED not in states.values() or states[NEW_FILE] is FileState.PATCHED


@pytest.mark.parametrize(
    ("steps_per_file", "left"),
    [
        # All files are written before the first is moved.
        (0.0, State.ORIGINAL),
        (0.5, State.ORIGINAL),
        (1.25, State.INTERRUPTED),
        (1.75, State.INTERRUPTED),
    ],
)
def test_the_next_run_completes_or_reverts_a_killed_one(
    site_packages: Path, series: Series, steps_per_file: float, left: State
) -> None:
    step = int(steps_per_file * len(series.manifest))
    before = contents(site_packages)
    assert run_until(site_packages, series, "apply_series", step, "SIGKILL") == -signal.SIGKILL
    assert state(site_packages, series) is left
    assert importable(site_packages, series)
    revert_series(site_packages, series)
    assert contents(site_packages) == before
    run_until(site_packages, series, "apply_series", step, "SIGKILL")
    apply_series(site_packages, series)
    assert state(site_packages, series) is State.PATCHED
    assert run_until(site_packages, series, "revert_series", step, "SIGKILL") == -signal.SIGKILL
    assert importable(site_packages, series)
    revert_series(site_packages, series)
    assert contents(site_packages) == before


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_ctrl_c_is_deferred_until_all_files_are_changed(
    site_packages: Path, series: Series, how: str
) -> None:
    assert run_until(site_packages, series, "apply_series", 15, how) != 0
    assert state(site_packages, series) is State.PATCHED
    assert not list(site_packages.rglob("*.memkv-patch"))


def test_hard_linked_files_of_another_environment_do_not_change(
    site_packages: Path, series: Series, tmp_path: Path
) -> None:
    os.link(site_packages / SERVER_ARGS, tmp_path / "shared.py")
    apply_series(site_packages, series)
    assert checksum((tmp_path / "shared.py").read_bytes()) == series.manifest[SERVER_ARGS].before

"""A node's ranks read a model once, and notice every change of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memkv_sglang.plugin import fingerprint_cache
from memkv_sglang.plugin.fingerprint import SMALL_FILE, fingerprint
from memkv_sglang.plugin.fingerprint_cache import cached_fingerprint
from tests.plugin.test_plugin_fingerprint import change, write_weights

TENSORS = 1000
FILES = 4
RANKS = 3

RANK = """
import sys
from pathlib import Path
opens = 0
def count(event, arguments):
    global opens
    opens += event == "open" and str(arguments[0]).startswith(sys.argv[1])
from memkv_sglang.plugin.fingerprint_cache import cached_fingerprint
sys.addaudithook(count)
print(cached_fingerprint(Path(sys.argv[1])), opens)
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.setattr("memkv_sglang.agent.paths.SERVICE_DIRECTORY", tmp_path / "none")
    return directory


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a thousand tensors, unchanged for a while, in files too large to be read
    completely.
    """
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    each = TENSORS // FILES
    for number in range(FILES):
        size = SMALL_FILE // each + 4096
        tensors = {f"layer.{number}.{tensor}": size for tensor in range(each)}
        write_weights(model / f"model-{number}.safetensors", tensors)
    monkeypatch.setattr(fingerprint_cache, "SETTLED_SECONDS", 0.0)
    return model


def settle() -> None:
    time.sleep(0.05)


def test_a_model_of_a_thousand_tensors_is_opened_once_per_file_and_node(model: Path) -> None:
    time.sleep(2.1)  # fingerprints of files changed in the last 2 s are not kept
    command = [sys.executable, "-c", RANK, str(model)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(RANKS)]
    results = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert {result[0] for result in results} == {fingerprint(model)}
    opens = sorted(int(result[1]) for result in results)
    assert opens[:-1] == [0] * (RANKS - 1)
    assert opens[-1] < 2 * (FILES + 1)


def test_weights_overwritten_in_place_are_noticed_although_size_and_time_are_kept(
    model: Path,
) -> None:
    settle()
    before = cached_fingerprint(model)
    path = model / "model-0.safetensors"
    status = path.stat()
    change(path, -1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert cached_fingerprint(model) == fingerprint(model) != before


def test_a_kept_fingerprint_is_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle()
    before = cached_fingerprint(model)
    monkeypatch.setattr(fingerprint_cache, "fingerprint", lambda path: pytest.fail("read again"))
    assert cached_fingerprint(model) == before


def test_files_changed_just_now_are_not_kept(
    model: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint_cache, "SETTLED_SECONDS", 3600.0)
    assert cached_fingerprint(model) == fingerprint(model)
    assert list((runtime / "memkv" / "fingerprints").iterdir()) == []


def test_a_damaged_entry_is_read_again(model: Path, runtime: Path) -> None:
    settle()
    before = cached_fingerprint(model)
    (entry,) = (runtime / "memkv" / "fingerprints").iterdir()
    for content in (b"", b"\xff", b"no digest", before.encode() + b"0"):
        entry.write_bytes(content)
        assert cached_fingerprint(model) == before


def test_old_entries_are_removed(
    model: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint_cache, "KEPT", 2)
    for number in range(4):
        (model / "config.json").write_text(f'{{"layers": {number}}}')
        settle()
        cached_fingerprint(model)
    assert len(list((runtime / "memkv" / "fingerprints").iterdir())) == 2


def test_without_a_private_directory_every_rank_reads(model: Path, runtime: Path) -> None:
    (runtime / "memkv").mkdir(mode=0o777)
    (runtime / "memkv").chmod(0o777)
    assert cached_fingerprint(model) == fingerprint(model)
    assert list((runtime / "memkv").iterdir()) == []

"""Locking and permissions of the directory, and errors for bad settings."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MIB
from memkv_sglang.testing.conformance import load, spill
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.nvme import NvmeTier
from tests.tiers.nvme.nvme_support import SLOT, Disk, disk

KEYS = make_chain(make_namespace(), 3).keys()


def refuse(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EIO, "broken")


def assert_one_line(error: pytest.ExceptionInfo[ConfigError], setting: str) -> None:
    text = str(error.value)
    assert text.startswith(setting)
    assert "\n" not in text
    assert ";" in text  # the problem; the fix


def test_files_are_private_to_the_owner(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with disk(tmp_path / "a" / "nvme") as nvme:
            nvme.tier.describe(make_namespace())
            spill(nvme.tier, KEYS)
            nvme.flip(KEYS[0])
            nvme.tier.verify(True, lambda done, total: None)
            nvme.reopen()
    finally:
        os.umask(old)
    paths = [nvme.path, *nvme.path.rglob("*")]
    assert len(paths) == 9
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_descriptions_without_pages_are_removed_at_the_next_start(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme") as nvme:
        old, new = make_namespace(revision="old"), make_namespace(revision="new")
        for namespace in (old, new):
            nvme.tier.describe(namespace)
            spill(nvme.tier, make_chain(namespace, 2).keys())
        assert nvme.tier.remove(make_chain(old, 2).keys()) == 2
        assert nvme.tier.namespaces().keys() == {old.digest, new.digest}
        assert nvme.reopen().namespaces() == {new.digest: new}


def test_start_succeeds_if_a_description_cannot_be_removed(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme") as nvme:
        spill(nvme.tier, KEYS)
        foreign = nvme.path / "namespaces" / f"{'0' * 32}.json"
        foreign.mkdir()
        load(nvme.reopen(), KEYS)
        assert foreign.is_dir()


def test_descriptions_stay_while_a_segment_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk(tmp_path / "nvme") as nvme:
        nvme.tier.describe(make_namespace())
        spill(nvme.tier, KEYS)
        nvme.tier.close()
        with monkeypatch.context() as patch:
            patch.setattr("memkv_sglang.tiers.nvme.segments.open_segment", refuse)
            assert nvme.open().lookup(make_chain(make_namespace(), 3), 0).length == 0
            nvme.tier.close()
        assert nvme.open().namespaces().keys() == {make_namespace().digest}
        load(nvme.tier, KEYS)


def test_two_agents_on_one_directory(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme") as nvme:
        with pytest.raises(ConfigError, match="in use by another agent") as error:
            NvmeTier(nvme.config)
        assert_one_line(error, "nvme.directory")
        spill(nvme.tier, KEYS)
        load(nvme.reopen(), KEYS)


def test_directory_of_a_killed_agent_is_unlocked(tmp_path: Path) -> None:
    directory = tmp_path / "nvme"
    code = (
        "import sys, time\n"
        "from memkv_sglang.config.schema import NvmeConfig\n"
        "from memkv_sglang.tiers.nvme import NvmeTier\n"
        "tier = NvmeTier(NvmeConfig(directory=sys.argv[1], capacity=1 << 20))\n"
        "print('open', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match="in use by another agent"):
            Disk(directory)
        other.kill()
    with disk(directory) as nvme:
        assert nvme.tier.usage().pages == 0


def test_directory_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to uid") as error:
        Disk(tmp_path)
    assert_one_line(error, "nvme.directory")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_directory_that_is_a_file(tmp_path: Path, below: str) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConfigError, match="is not a directory") as error:
        Disk(path / below, capacity=1 << 60)
    assert_one_line(error, "nvme.directory")


def test_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(
        self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
    ) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match="Permission denied") as error:
        Disk(tmp_path / "nvme")
    assert_one_line(error, "nvme.directory")


def test_capacity_above_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exceeds the file system") as error:
        Disk(tmp_path / "nvme", capacity=1 << 60)
    assert_one_line(error, "nvme.capacity")
    assert list(tmp_path.iterdir()) == []


def test_directory_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "format").write_text("memkv nvme 99\n")
    with pytest.raises(ConfigError, match="another version") as error:
        Disk(tmp_path)
    assert_one_line(error, "nvme.directory")
    (tmp_path / "format").unlink()
    with disk(tmp_path) as nvme:  # the failed start released the lock
        spill(nvme.tier, KEYS)


def test_segments_have_the_configured_size(tmp_path: Path) -> None:
    """If the capacity is large enough. There are no segments before the first spill."""
    size = 64 * MIB
    with disk(tmp_path / "nvme", capacity=2048 * MIB, segment_size=size) as nvme:
        assert nvme.segments() == []
        spill(nvme.tier, KEYS)
        (segment,) = nvme.segments()
        assert size - 2 * SLOT < segment.stat().st_size <= size

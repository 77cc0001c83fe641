"""Small files survive a power failure or are recreated, and a broken disk does not stop a node."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MIB, Config, MinioConfig, NvmeConfig
from memkv_sglang.testing.conformance import load, spill
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.nvme.directory import FORMAT
from memkv_sglang.tiers.nvme.files import Folder
from tests.cases.disk_agents import NAMESPACE, agent, chains
from tests.tiers.nvme.nvme_support import disk

KEYS = make_chain(make_namespace(), 6).keys()
WHOLE = FORMAT.encode()


@pytest.mark.parametrize(
    "content",
    [b"", WHOLE[:1], WHOLE[:7], WHOLE[:-1], bytes(len(WHOLE)), WHOLE[:5] + bytes(8), bytes(60)],
)
def test_a_torn_format_is_written_again(tmp_path: Path, content: bytes) -> None:
    with disk(tmp_path / "nvme") as nvme:
        spill(nvme.tier, KEYS)
        nvme.kill()
        (nvme.path / "format").write_bytes(content)
        load(nvme.open(), KEYS)
        assert (nvme.path / "format").read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"memkv nvme 2\n", "another version"),
        (b"memkv nvme 12\n", "another version"),
        (b"memkv nvme 0\n", "another version"),
        (b'{"version": 1}', "not a memkv directory"),
        (b"xfs", "not a memkv directory"),
        (WHOLE + b"more", "not a memkv directory"),
        (b"\0" + WHOLE, "not a memkv directory"),
        (b"x" * (1 << 20), "not a memkv directory"),
    ],
)
def test_another_format_is_refused_with_minio_too(
    tmp_path: Path, minio_config: MinioConfig, content: bytes, reason: str
) -> None:
    (tmp_path / "format").write_bytes(content)
    nvme = NvmeConfig(directory=str(tmp_path), capacity=MIB)
    for config in Config(nvme=nvme), Config(nvme=nvme, minio=minio_config):
        with pytest.raises(ConfigError, match=reason) as error:
            build_engine(config, CollectorRegistry())
        assert "\n" not in str(error.value)
        assert ";" in str(error.value)
    assert (tmp_path / "format").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["format"]


@pytest.mark.parametrize(
    "content", [b"", b"{", bytes(300), b"null", b"[" * 5000, b"\xff\xfe", b"x" * (1 << 20)]
)
def test_a_torn_description_is_written_again(tmp_path: Path, content: bytes) -> None:
    namespace = make_namespace()
    with disk(tmp_path / "nvme") as nvme:
        spill(nvme.tier, KEYS)
        nvme.tier.describe(namespace)
        nvme.tier.close()
        path = nvme.path / "namespaces" / f"{namespace.digest.hex()}.json"
        path.write_bytes(content)
        tier = nvme.open()
        assert tier.namespaces() == {}
        tier.describe(namespace)
        assert tier.namespaces() == {namespace.digest: namespace}
        assert path.read_bytes() == namespace.description


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path: Path) -> None:
    namespace = make_namespace()
    with disk(tmp_path / "nvme") as nvme:
        nvme.tier.close()
        digest = namespace.digest.hex()
        left = ["format.new", "journal.new", f"namespaces/{digest}.json.new"]
        stays = ["namespaces/other.json.new", "namespaces/notes.new", "segments/backup.seg.new"]
        for name in (*left, *stays):
            (nvme.path / name).write_bytes(b"half")
        nvme.open()
        assert not any((nvme.path / name).exists() for name in left)
        assert all((nvme.path / name).read_bytes() == b"half" for name in stays)


class Recorder:
    """Records which files and directories are synced and renamed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._synced(getattr(os, name)))
        self._rename = os.rename
        monkeypatch.setattr(os, "rename", self._renamed)

    def _synced(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            real(descriptor)
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            name = Path(f"/proc/self/fd/{descriptor}").readlink().name
            self.calls.append(f"folder {name}" if is_folder else f"file {name}")

        return call

    def _renamed(self, old: Any, new: Any, **kwargs: Any) -> None:
        self._rename(old, new, **kwargs)
        self.calls.append(f"rename {new}")

    def assert_durable(self, name: str, folder: str) -> None:
        """Fail unless the content was synced before the rename and the folder after it."""
        at = [self.calls.index(call) for call in (f"file {name}.new", f"rename {name}")]
        assert at == sorted(at)
        assert f"folder {folder}" in self.calls[at[-1] :]


def test_small_files_are_synced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace()
    recorder = Recorder(monkeypatch)
    with disk(tmp_path / "nvme") as nvme:
        recorder.assert_durable("format", "nvme")
        recorder.assert_durable("journal", "nvme")
        nvme.tier.describe(namespace)
        recorder.assert_durable(f"{namespace.digest.hex()}.json", "namespaces")
        spill(nvme.tier, KEYS)
        recorder.assert_durable("00000000.seg", "segments")
        recorder.calls.clear()
        nvme.tier._catalog.compact()
        recorder.assert_durable("journal", "nvme")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    folder = Folder.at(tmp_path)
    folder.write_durably("small", b"old")

    def fail(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(error)):
        folder.write_durably("small", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert (tmp_path / "small").read_bytes() == b"old"
    folder.close()


def _directory(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).mkdir()


def _file(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).touch()


def _loop(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).symlink_to(name)


def _pipe(name: str) -> Callable[[Path], None]:
    return lambda path: os.mkfifo(path / name)


@pytest.mark.parametrize(
    "spoil",
    [
        *(make(name) for name in ("format", "journal") for make in (_directory, _loop, _pipe)),
        *(make(name) for name in ("segments", "namespaces") for make in (_file, _loop, _pipe)),
    ],
)
def test_a_disk_that_cannot_be_used_is_left_out(
    tmp_path: Path,
    minio_config: MinioConfig,
    spoil: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "nvme"
    path.mkdir()
    spoil(path)
    nvme, registry = NvmeConfig(directory=str(path), capacity=MIB), CollectorRegistry()
    engine = build_engine(Config(nvme=nvme, minio=minio_config), registry)
    pages = [make_page(key, (4096, 4096), filled=True) for key in KEYS]
    assert engine.spill(pages) == [SpillResult.STORED] * len(KEYS)
    engine.close(drain=0)
    assert [record.message for record in caplog.records].count(
        "disk does not work, its pages count as missing"
    ) == 1
    assert registry.get_sample_value("memkv_tier_works", {"tier": "nvme"}) == 0
    with pytest.raises(ConfigError, match=r"nvme\.directory: cannot use .*; ") as error:
        build_engine(Config(nvme=nvme), CollectorRegistry())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", ["os.mkdir", "os.rename", "os.fsync", "os.pwrite", "os.open"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE])
def test_a_disk_that_fails_at_the_start_is_left_out(
    tmp_path: Path, minio_config: MinioConfig, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    real = getattr(os, call.removeprefix("os."))

    def fail(*args: Any, **kwargs: Any) -> Any:
        if kwargs.keys() & {"dir_fd", "src_dir_fd"} or call in ("os.fsync", "os.pwrite"):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    nvme = NvmeConfig(directory=str(tmp_path / "nvme"), capacity=MIB)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(os, call.removeprefix("os."), fail)
        with pytest.raises(ConfigError, match=r"nvme\.directory: cannot use"):
            build_engine(Config(nvme=nvme), CollectorRegistry())
        # Fewer are fine: descriptors of earlier tests may be closed in the background.
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
        engine = build_engine(Config(nvme=nvme, minio=minio_config), CollectorRegistry())
    pages = [make_page(key, (4096, 4096), filled=True) for key in KEYS]
    assert engine.spill(pages) == [SpillResult.STORED] * len(KEYS)
    engine.close(drain=0)


def test_an_agent_starts_after_a_power_failure(tmp_path: Path) -> None:
    path, (chain,) = tmp_path / "nvme", chains("chain", 1)
    with agent(tmp_path / "a", path) as first:
        assert first.spill(chain) == {SpillResult.STORED}
        first.kill()
    description = path / "namespaces" / f"{NAMESPACE.digest.hex()}.json"
    for file in (path / "format", description):
        file.write_bytes(b"")
    with agent(tmp_path / "a", path) as second:
        assert second.loaded(chain) == len(chain.hashes)
    assert description.read_bytes() == NAMESPACE.description
    code = "import sys; from memkv_sglang.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", code, "inspect", f"--nvme-directory={path}"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    shown = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert NAMESPACE.digest.hex() in shown.stdout
    assert "no description" not in shown.stdout


def test_descriptions_of_a_directory_without_them(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme") as nvme:
        spill(nvme.tier, KEYS)
        (nvme.path / "namespaces").rmdir()
        load(nvme.reopen(), KEYS)
        assert nvme.tier.namespaces() == {}

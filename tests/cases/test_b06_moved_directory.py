"""An agent writes only into the directory that it locked, even if its path leads elsewhere
later.
"""

import logging
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.testing.conformance import load, spill
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.nvme import NvmeTier
from tests.agent.agent_harness import eventually
from tests.cases.disk_agents import PAGES, Agent, agent, chains, mounted
from tests.tiers.nvme.nvme_support import Disk, disk, present

STORED = {SpillResult.STORED}
REFUSED = {SpillResult.REFUSED}


def move(path: Path, _: ExitStack) -> None:
    path.rename(path.with_name("moved"))


def mount_over(path: Path, stack: ExitStack) -> None:
    stack.enter_context(mounted(["-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs"], path))


def retarget(path: Path, _: ExitStack) -> None:
    """Point the path's symbolic link at another directory."""
    elsewhere = path.with_name("elsewhere")
    elsewhere.mkdir()
    path.unlink()
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("displace", [move, mount_over, retarget])
def test_two_agents_at_one_path_keep_all_acknowledged_pages(
    displace: Callable[[Path, ExitStack], None], tmp_path: Path
) -> None:
    path = tmp_path / "nvme"
    if displace is retarget:
        (tmp_path / "first").mkdir()
        path.symlink_to(tmp_path / "first")
    ours, late, theirs = chains("a", 2), chains("late", 4), chains("b", 5)
    with ExitStack() as stack:
        first = stack.enter_context(agent(tmp_path / "a", path))
        assert all(first.spill(chain) == STORED for chain in ours)
        displace(path, stack)
        with agent(tmp_path / "b", path) as second:
            assert all(second.spill(chain) == STORED for chain in theirs[:3])
            eventually(lambda: first.spill(late[0]) == REFUSED)
            assert all(first.spill(chain) == REFUSED for chain in late[1:])
            assert [first.loaded(chain) for chain in ours] == [PAGES, PAGES]
            assert works(first) == 0.0
            assert works(second) == 1.0
            first.client.close()
            assert first.terminate() == 0  # which writes its journal anew
            assert all(second.spill(chain) == STORED for chain in theirs[3:])
            second.kill()
        with agent(tmp_path / "b", path) as second:
            assert [second.loaded(chain) for chain in theirs] == [PAGES] * 5
            found = [second.client.lookup(chain) for chain in (*ours, *late)]
            assert {lookup.length for lookup in found if lookup is not None} == {0}
    lines = [line for line in first.log.read_text().splitlines() if "accepts no pages" in line]
    assert len(lines) == 1
    assert str(path) in lines[0]


def works(running: Agent) -> float:
    """Return the value of the agent's metric."""
    report = running.client.status()
    assert report is not None
    url = f"http://127.0.0.1:{report.agent.http_port}/metrics"
    with urllib.request.urlopen(url) as answer:
        lines = answer.read().decode().splitlines()
    (value,) = (line for line in lines if line.startswith('memkv_tier_works{tier="nvme"}'))
    return float(value.split()[-1])


KEYS, MORE = (make_chain(make_namespace(), 24, name).keys() for name in ("old", "more"))


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "nvme") as opened:
        spill(opened.tier, KEYS)
        yield opened


def results(tier: NvmeTier) -> set[int]:
    return set(spill(tier, MORE))


def wait_until_noticed(tier: NvmeTier) -> None:
    eventually(lambda: tier.problem())
    assert results(tier) == REFUSED


@pytest.mark.parametrize("name", ["segments", "namespaces", "quarantine"])
@pytest.mark.parametrize("then", ["nothing", "another directory", "a symbolic link", "a file"])
def test_a_part_that_was_moved(nvme: Disk, name: str, then: str, tmp_path: Path) -> None:
    part, aside, foreign = nvme.path / name, tmp_path / "aside", tmp_path / "foreign"
    foreign.mkdir()
    part.rename(aside)
    match then:
        case "another directory":
            part.mkdir()
        case "a symbolic link":
            part.symlink_to(foreign)
        case "a file":
            part.touch()
    wait_until_noticed(nvme.tier)
    load(nvme.tier, KEYS)
    nvme.tier.describe(make_namespace(revision="later"))
    nvme.tier._catalog.compact()
    nvme.flip(KEYS[0]) if name != "segments" else None
    assert list(foreign.iterdir()) == []
    assert not part.is_dir() or list(part.iterdir()) == []
    if part.is_symlink() or part.is_file():
        part.unlink()
    elif part.is_dir():
        part.rmdir()
    aside.rename(part)
    eventually(lambda: not nvme.tier.problem())
    assert results(nvme.tier) == STORED
    load(nvme.reopen(), [*KEYS[1:], *MORE])


def test_a_directory_that_was_removed(nvme: Disk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    shutil.rmtree(nvme.path)
    wait_until_noticed(nvme.tier)
    load(nvme.tier, KEYS)
    nvme.tier.close()
    assert not nvme.path.exists()
    assert sum("accepts no pages" in record.message for record in caplog.records) <= 2
    assert results(nvme.open()) == STORED


def test_a_directory_that_cannot_be_looked_at(nvme: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(os, "fstatvfs", fail)
        wait_until_noticed(nvme.tier)
        load(nvme.tier, KEYS)
    eventually(lambda: not nvme.tier.problem())
    assert results(nvme.tier) == STORED


@pytest.mark.parametrize("then", ["removed", "replaced"])
def test_a_lost_journal_is_rewritten(
    tmp_path: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv_sglang.tiers.nvme.tier._CHECK_INTERVAL", 0.05)
    with disk(tmp_path / "nvme") as nvme:
        spill(nvme.tier, KEYS)
        before = nvme.tier._catalog.journal
        nvme.journal.unlink()
        if then == "replaced":
            nvme.journal.write_bytes(b"another one")
        eventually(lambda: nvme.tier._catalog.journal is not before)
        nvme.kill()
        tier = nvme.open()
        load(tier, KEYS)
        # The journal was read; without it, all pages would be pending.
        assert list(tier.pending()) == []


@pytest.mark.parametrize("name", ["segments", "namespaces", "quarantine"])
def test_a_symbolic_link_in_the_place_of_a_part_is_refused(tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    path = tmp_path / "nvme"
    path.mkdir()
    (path / name).symlink_to(foreign)
    with pytest.raises(ConfigError, match=f"'{name}'") as error:
        Disk(path)
    assert "\n" not in str(error.value)
    assert list(foreign.iterdir()) == []


@pytest.mark.parametrize("name", ["journal", "format", "journal.new", "format.new"])
def test_symbolic_links_in_the_place_of_files_are_not_followed(tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"mine")
    path = tmp_path / "nvme"
    path.mkdir()
    (path / name).symlink_to(foreign)
    with ExitStack() as stack:
        stack.callback(lambda: None)
        try:
            tier = stack.enter_context(disk(path)).tier
            spill(tier, KEYS)
        except ConfigError as error:
            assert "\n" not in str(error)
            assert name.removesuffix(".new") in str(error)
    assert foreign.read_bytes() == b"mine"


def test_two_directories_do_not_share_segments(nvme: Disk, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "segments").mkdir(parents=True)
    bind = mounted(["--bind", str(nvme.path / "segments")], other / "segments")
    with bind, pytest.raises(ConfigError, match="in use by another agent"):
        NvmeTier(NvmeConfig(directory=str(other), capacity=8 * MIB))
    load(nvme.tier, KEYS)


def test_an_inherited_segment_descriptor_does_not_hold_the_lock(nvme: Disk) -> None:
    kept = os.dup(nvme.tier.segments_descriptor)
    try:
        load(nvme.reopen(), KEYS)
    finally:
        os.close(kept)


def test_repair_leaves_the_journal_of_an_agent_that_started_meanwhile(nvme: Disk) -> None:
    """The journal is removed while the directory is locked; what an agent writes later remains."""
    nvme.tier.discard_journal()
    nvme.tier.close()
    assert not nvme.journal.exists()
    load(nvme.open(), KEYS)
    assert all(present(nvme.tier, KEYS))

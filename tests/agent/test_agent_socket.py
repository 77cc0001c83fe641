"""The agent's socket: permissions, ownership, replacement."""

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from memkv_sglang.agent import paths
from memkv_sglang.agent.listener import Listener, serving_peer
from memkv_sglang.agent.paths import locked_directory, socket_path
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import AgentConfig


def test_default_path_is_private_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert socket_path(AgentConfig()) == Path("/run/user/1000/memkv/agent.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert socket_path(AgentConfig()) == Path(f"/tmp/memkv-{os.getuid()}/agent.sock")


def test_longest_path_works_and_one_more_byte_is_refused(tmp_path: Path) -> None:
    room = 107 - len(os.fsencode(tmp_path)) - 1
    longest = str(tmp_path / ("s" * room))
    Listener(socket_path(AgentConfig(socket=longest)), locked=False).close()
    with pytest.raises(ConfigError, match=r"^agent\.socket: .* has 108 bytes"):
        socket_path(AgentConfig(socket=longest + "s"))


def test_socket_and_new_directory_are_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "agent.sock"
    listener = Listener(path, locked=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.stat().st_uid == os.getuid()
    assert [entry.name for entry in path.parent.iterdir()] == ["agent.sock"]
    listener.close()
    assert list(path.parent.iterdir()) == []


def test_directory_accessible_to_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match=r"^agent\.socket: .* chmod 700"):
        Listener(tmp_path / "agent.sock", locked=False)


def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.getuid() == 0:
        os.chown(tmp_path, 65534, 65534)
        directory = tmp_path
    else:
        directory = Path("/")
    with pytest.raises(ConfigError, match=r"^agent\.socket: .* belongs to uid"):
        Listener(directory / "agent.sock", locked=False)


def test_symlinked_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match=r"^agent\.socket: cannot use the directory"):
        Listener(tmp_path / "link" / "agent.sock", locked=False)


def test_regular_file_at_the_path_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        Listener(path, locked=False)
    assert path.read_text() == "precious"


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = Listener(path, locked=False)
    assert serving_peer(path) == (os.getpid(), os.getuid())
    listener.close()
    assert serving_peer(path) is None


def test_second_agent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    first = Listener(path, locked=False)
    with pytest.raises(ConfigError, match=rf"another agent \(pid {os.getpid()}\) serves"):
        Listener(path, locked=False)
    assert serving_peer(path) is not None
    first.close()


def test_close_keeps_a_successors_socket(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    first = Listener(path, locked=False)
    path.unlink()
    second = Listener(path, locked=False)
    first.close()
    assert serving_peer(path) is not None
    second.close()


def test_lock_waits_for_its_holder_and_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "agent.sock"
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locked_directory(path):
            entered.set()
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(10)
    monkeypatch.setattr(paths, "LOCK_LIMIT", 0.1)
    with pytest.raises(ConfigError, match="locked"), locked_directory(path):
        pass
    monkeypatch.setattr(paths, "LOCK_LIMIT", 10.0)
    release.set()
    with locked_directory(path):
        pass
    holder.join()

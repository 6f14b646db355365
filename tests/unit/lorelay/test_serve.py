"""`lorelay serve`: a whole start and stop with stand-ins for API and worker, and what it starts."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from lorelay import options, serve
from lorelay.embedded import StateFolder, running_url
from lorelay.main import main
from lorelay.plan import ServePlan, make_plan
from lorelay.probes import is_http_ready
from lorelay.processes import ChildSpec
from lorelay.specs import api_spec, worker_specs
from lorelay.supervisor import say
from shared.model_cards import ModelCard
from shared.queue import registry
from tests.redis_server import RedisServer, free_port

pytestmark = pytest.mark.usefixtures("bare_environment")

WORKER = """
import os, signal, socket, sys, time, redis
from shared.queue import keys, registry
from shared.model_cards import ModelCard
if os.environ.get("STAND_IN") == "broken":
    sys.exit("adapter folder missing: /some/where")
signal.signal(signal.SIGTERM, lambda *_: sys.exit("worker drained"))
base = os.environ["LORELAY_MODEL_NAME"]
with redis.Redis.from_url(os.environ["RQ_REDIS_URL"]) as client:
    client.hset("rq:worker:w", mapping={"hostname": socket.gethostname(), "pid": os.getpid()})
    client.zadd(keys.workers(base), {"w": "inf"})
    time.sleep(0.3)  # A real worker, too, has its lease before it has registered its models.
    registry.register(client, [ModelCard(base, base, "src", os.environ["STAND_IN"], 1, 64)])
while True:
    signal.pause()
"""
API = """
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit("api drained"))
http.server.HTTPServer(("127.0.0.1", int(os.environ["LORELAY_SERVER_PORT"])), Handler).serve_forever()
"""


class Launch:
    """`lorelay serve` in this process, with stand-ins for worker and API as its children."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd
        monkeypatch.setattr(serve, "api_spec", lambda *args: stand_in(api_spec(*args), API))
        monkeypatch.setattr(
            serve, "worker_specs", lambda *args: [stand_in(spec, WORKER) for spec in worker_specs(*args)]
        )

    def run(self, *words: str, version: str = "v1", **acts: Callable[[], object]) -> int:
        """Serves; does something once it has said a line with these words. Returns the exit code."""

        def listen(line: str) -> None:
            say(line)
            for said, act in acts.items():
                if said.replace("_", " ") in line:
                    act()

        self._monkeypatch.setenv("STAND_IN", version)
        self._monkeypatch.setattr(serve, "say", listen)
        return main(["serve", *words])

    def output(self) -> str:
        printed = self._capfd.readouterr()
        return printed.out + printed.err


def stand_in(spec: ChildSpec, code: str) -> ChildSpec:
    return dataclasses.replace(spec, command=(sys.executable, "-c", code))


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def launch(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Launch]:
    yield Launch(monkeypatch, capfd)
    assert not (tmp_path / "state" / "redis.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_starts_all_parts_and_stops_them_in_order(
    launch: Launch, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch.run("smol", is_ready=lambda: os.kill(os.getpid(), number)) == 0
    printed = capfd.readouterr()
    url = f"http://127.0.0.1:{os.environ['LORELAY_SERVER_PORT']}"
    stages = ["starting the embedded server", "starting 1 worker", "starting the API"]
    stages += [f"{url}/v1 is ready and serves smol; API documentation at {url}/docs"]
    stages += ["stopping api", "stopping worker 0", "stopping server"]
    found = [printed.out.index(f"lorelay: {stage}") for stage in stages]
    assert found == sorted(found)
    assert printed.err.split("\n") == ["api drained", "worker drained", ""]


def test_it_is_ready_only_once_the_models_are_registered(
    launch: Launch, redis_server: RedisServer, connection: redis.Redis
) -> None:
    registered = []

    def look() -> None:
        registered.extend(card.name for card in registry.list_cards(connection))
        stop()

    assert launch.run("smol", "--redis-url", redis_server.url, is_ready=look) == 0
    assert registered == ["smol"]


def test_a_new_command_line_replaces_what_the_embedded_server_had_registered(launch: Launch) -> None:
    for version in ("v1", "v2"):
        # The stand-in's card of another version would be a conflict if the old one were still there.
        assert launch.run("smol", is_ready=stop, version=version) == 0


def test_on_a_redis_of_others_it_starts_no_server_and_drops_no_card(
    launch: Launch, redis_server: RedisServer, connection: redis.Redis
) -> None:
    registry.register(connection, [ModelCard("other", "other", "src", "v1", 1, 64)])
    assert launch.run("smol", "--redis-url", redis_server.url, is_ready=stop) == 0
    assert {card.name for card in registry.list_cards(connection)} == {"smol", "other"}
    assert "embedded" not in launch.output()


def test_what_dies_later_is_started_again(launch: Launch, tmp_path: Path) -> None:
    def kill_worker() -> None:
        with redis.Redis.from_url(running_url(tmp_path / "state")) as client:
            os.kill(int(client.hget("rq:worker:w", "pid") or 0), signal.SIGKILL)

    assert launch.run("smol", is_ready=kill_worker, starting_worker_0_again=stop) == 0
    assert "worker 0 was ended by SIGKILL; starting it again in 0.5 s" in launch.output()


def test_a_worker_that_fails_at_its_start_ends_the_whole_start_with_its_message(launch: Launch) -> None:
    assert launch.run("smol", is_ready=stop, version="broken") == 1
    said = launch.output()
    assert "adapter folder missing: /some/where" in said
    assert "lorelay: worker 0 ended with exit code 1 before it was ready; its messages are above" in said
    assert "again" not in said


def test_a_server_that_fails_at_its_start_shows_the_end_of_its_log(launch: Launch, tmp_path: Path) -> None:
    with StateFolder(tmp_path / "state") as state:
        files = state.path / "appendonlydir"
    files.mkdir()
    (files / "appendonly.aof.manifest").write_text("nonsense\n")
    assert launch.run("smol", is_ready=stop) == 1
    said = launch.output()
    assert "server ended with exit code 1 before it was ready" in said
    assert "manifest" in said


@pytest.mark.parametrize("at", ["starting the embedded", "starting 1 worker", "starting the API"])
def test_a_stop_during_the_start_is_a_stop(launch: Launch, at: str) -> None:
    assert launch.run("smol", **{at: stop}) == 0
    assert "is ready" not in launch.output()


def test_status_finds_the_embedded_server_by_its_folder(launch: Launch, tmp_path: Path) -> None:
    codes = []

    def look() -> None:
        codes.append(main(["status", "--state-dir", str(tmp_path / "state")]))
        codes.append(main(["status"]))
        stop()

    assert launch.run("smol", is_ready=look) == 0
    assert codes == [0, 0]
    assert launch.output().count("OLDEST WAIT") == 2
    assert main(["status"]) == 2
    assert "no embedded server runs in" in launch.output()


# The commands of the children


def plan_for(*words: str) -> ServePlan:
    args = options.build_parser().parse_args(["serve", *words])
    values = options.given_values(args)
    return make_plan(values, options.as_variables(values), use_ssl=args.ssl)


def test_the_api_is_started_as_the_readme_starts_it(model: Path) -> None:
    plan = plan_for("smol", "--server-name", "127.0.0.1", "--server-port", str(free_port()))
    spec = api_spec(plan, "unix:///s")
    assert spec.command[1:5] == ("-m", "uvicorn", "--factory", "api.main:create_app")
    assert "--ssl-keyfile" not in spec.command
    assert spec.env["LORELAY_REDIS_URL"] == "unix:///s"
    assert spec.stop_limit_s > plan.api.api_drain_s


@pytest.mark.parametrize(("given", "expected"), [(None, "75"), ("620", "620")])
def test_idle_connections_outlive_those_of_proxies_and_pools(
    model: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    if given is not None:
        monkeypatch.setenv("LORELAY_KEEP_ALIVE_S", given)
    command = api_spec(plan_for("smol"), "unix:///s").command
    assert command[command.index("--timeout-keep-alive") + 1] == expected


def test_ssl_files_reach_the_api(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEYFILE", "CERTFILE"):
        (model / name).touch()
        monkeypatch.setenv(f"SSL_{name}", f"smol/{name}")
    plan = plan_for("smol", "--ssl")
    command = api_spec(plan, "unix:///s").command
    assert command[command.index("--ssl-keyfile") + 1] == str(model / "KEYFILE")
    assert command[command.index("--ssl-certfile") + 1] == str(model / "CERTFILE")
    assert plan.url.startswith("https://")


def test_the_workers_are_stock_rq_workers_with_variables_of_their_own(model: Path) -> None:
    specs = worker_specs(plan_for("smol", "--workers", "2"), "redis://:secret@host")
    for spec in specs:
        assert spec.command[1:6] == ("-m", "rq.cli", "worker", "-w", "worker.LoraWorker")
        # A password in the arguments would show in the list of processes.
        assert spec.env["RQ_REDIS_URL"] == spec.env["LORELAY_REDIS_URL"] == "redis://:secret@host"
        assert "LORELAY_NUM_THREADS" in spec.env
        assert spec.stop_limit_s > 30
    assert [spec.name for spec in specs] == ["worker 0", "worker 1"]


def test_an_api_that_is_not_there_is_not_ready() -> None:
    assert not is_http_ready(f"http://127.0.0.1:{free_port()}")
    assert not is_http_ready(f"https://127.0.0.1:{free_port()}")

"""`lorelay dashboard` during load: what it shows is true, and no prompt is in it."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq.worker import BaseWorker, WorkerStatus

from lorelay.main import main
from shared.errors import GenerationFailed
from tests.redis_server import RedisServer, free_port
from tests.streams import BASE, SECRET, BlockingApi, claim, last, make_request, token, worker_streams
from tests.waiting import wait_until

PIRATE_QUEUE = "tiny-pirate"
ROOT = Path(__file__).parent.parent.parent


class Dashboard:
    """Its pages."""

    def __init__(self, port: int) -> None:
        self.port = port
        # No proxy, whatever the environment says.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def get(self, path: str, method: str = "GET") -> str:
        """The text of a page; any status but 200 is an error."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        with self._open(request, timeout=30) as response:
            assert response.status == 200
            return str(response.read().decode())

    def get_json(self, path: str, method: str = "GET") -> Any:
        return json.loads(self.get(path, method))

    def answers(self) -> bool:
        try:
            return bool(self.get("/"))
        except urllib.error.URLError:
            return False


@pytest.fixture(scope="module")
def dashboard(redis_server: RedisServer) -> Iterator[Dashboard]:
    """The command as a user starts it, on the server that the tests fill."""
    client = Dashboard(free_port())
    command = [sys.executable, "-m", "lorelay", "dashboard", "--redis-url", redis_server.url]
    with subprocess.Popen([*command, "--port", str(client.port)], cwd=ROOT) as process:
        try:
            wait_until(client.answers, 60, "the dashboard answers")
            yield client
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.fixture
def load(redis_server: RedisServer, connection: redis.Redis) -> Iterator[dict[str, str]]:
    """Requests in every state: of five on the adapter's queue one ended, one failed, one runs, two wait."""
    worker = BaseWorker([BASE, PIRATE_QUEUE], name="worker-of-the-test", connection=connection)
    worker.register_birth()
    worker.set_state(WorkerStatus.IDLE)
    api = BlockingApi(redis_server.url)
    ids = [api.enqueue(make_request("pirate")) for _ in range(5)]
    streams = worker_streams(connection, worker.name)
    done, broken, _ = claimed = claim(streams, 3)
    held = [each.held for each in claimed]
    streams.append(held, [token(each, 0, text="an answer word") for each in claimed])
    error = {"finish_reason": "error", "usage": None, "error": GenerationFailed().to_info()}
    streams.append(held, [last(done, 1), last(broken, 1, **error)])
    names = ("finished", "failed", "running", "queued", "next")
    yield dict(zip(names, ids, strict=True))
    worker.register_death()


def test_its_queues_have_the_right_counts(dashboard: Dashboard, load: dict[str, str]) -> None:
    queues = {queue["name"]: queue for queue in dashboard.get_json("/0/data/queues.json")["queues"]}
    pirate = queues[PIRATE_QUEUE]
    assert pirate["count"] == 2
    registries = ("started", "finished", "failed", "canceled")
    assert [pirate[f"{name}_job_registry_count"] for name in registries] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        ("queued", ["queued", "next"]),
        ("started", ["running"]),
        ("finished", ["finished"]),
        ("failed", ["failed"]),
    ],
)
def test_it_lists_the_jobs_of_each_state(
    dashboard: Dashboard, load: dict[str, str], registry: str, names: list[str]
) -> None:
    listed = dashboard.get_json(f"/0/data/jobs/{PIRATE_QUEUE}/{registry}/8/asc/1.json")
    assert [job["id"] for job in listed["jobs"]] == [load[name] for name in names]


def test_its_workers_page_shows_the_busy_worker(dashboard: Dashboard, load: dict[str, str]) -> None:
    (worker,) = dashboard.get_json("/0/data/workers.json")["workers"]
    assert (worker["name"], worker["state"]) == ("worker-of-the-test", "busy")
    assert worker["queues"] == [BASE, PIRATE_QUEUE]


@pytest.mark.parametrize("state", ["queued", "running", "finished", "failed"])
def test_each_job_can_be_opened(dashboard: Dashboard, load: dict[str, str], state: str) -> None:
    dashboard.get(f"/0/view/job/{load[state]}")
    job = dashboard.get_json(f"/0/data/job/{load[state]}.json")
    assert (job["id"], job["origin"]) == (load[state], PIRATE_QUEUE)


def test_no_page_and_no_json_shows_a_prompt_or_an_answer(dashboard: Dashboard, load: dict[str, str]) -> None:
    pages = ["/", "/0/view/workers", "/0/view/jobs", "/0/data/queues.json"]
    pages += ["/0/data/workers.json", f"/0/view/jobs/{PIRATE_QUEUE}/queued/8/asc/1"]
    pages += [
        f"/0/data/jobs/{PIRATE_QUEUE}/{name}/8/asc/1.json" for name in ("queued", "started", "finished")
    ]
    pages += [f"/0/view/job/{request_id}" for request_id in load.values()]
    pages += [f"/0/data/job/{request_id}.json" for request_id in load.values()]
    shown = "\n".join(dashboard.get(page) for page in pages)
    assert "request to pirate" in shown
    assert SECRET not in shown
    assert "an answer word" not in shown


def test_its_buttons_that_delete_are_off(
    dashboard: Dashboard, load: dict[str, str], connection: redis.Redis
) -> None:
    for path in (f"/job/{load['queued']}/delete", f"/queue/{PIRATE_QUEUE}/queued/empty"):
        assert dashboard.get_json(path, method="POST") == {"status": "DISABLED"}
    assert connection.llen(f"rq:queue:{PIRATE_QUEUE}") == 2
    assert connection.exists(f"rq:job:{load['queued']}")


def test_a_port_in_use_is_refused_with_one_line(
    dashboard: Dashboard, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(dashboard.port)
    assert main(["dashboard", "--redis-url", redis_server.url, "--port", port]) == 2
    assert capsys.readouterr().err.startswith("lorelay: --port: can't listen on 127.0.0.1:")

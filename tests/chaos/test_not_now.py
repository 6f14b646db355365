"""A server that says "not now": workers wait wherever they are, APIs say so, and streams go on."""

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import httpx
import pytest
import redis
from rq.command import send_stop_job_command
from rq.serializers import JSONSerializer

from tests.chaos.checker import Reference, check_complete, check_partial, check_quiet
from tests.chaos.cluster import BASE, LEASE_S, ChaosWorker, Cluster
from tests.chaos.gated_worker import LOADED
from tests.chaos.proxy import Proxy, script_marker
from tests.chaos.recorder import Recorder
from tests.chaos.stages import ASKS, pick_victim
from tests.forked import Nursery
from tests.redis_server import free_port
from tests.server_faults import BUSY_OPTIONS, FAULTS
from tests.unit.shared.queue.test_not_now import PASSING
from tests.waiting import wait_until

AWAY_S = 1.5 * LEASE_S
LOST, BACK = "Redis is not available, waiting", "Redis is back"
REPLIES = {said: replies[0] for said, replies in PASSING.items()}
CODES = {"OOM": "queue_out_of_memory"}


def seldom(codes: Iterable[str]) -> list[Any]:
    """Parameters of long runs."""
    return [pytest.param(code, marks=pytest.mark.long) for code in codes]


DRAWN = ["BUSY", "NOREPLICAS", "READONLY", *seldom(["MASTERDOWN", "OOM"])]
GATED = "tests.chaos.gated_worker.GatedWorker"


class Wired(NamedTuple):
    """One worker and an API, each behind a proxy of its own."""

    cluster: Cluster
    recorder: Recorder
    worker_proxy: Proxy
    api_proxy: Proxy

    @property
    def worker(self) -> ChaosWorker:
        (worker,) = self.cluster.workers
        return worker


@pytest.fixture(scope="module")
def wired_cluster(models: dict[str, str], nursery: Nursery, reference: Reference) -> Iterator[Wired]:
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(models, nursery, tcp=True, options=BUSY_OPTIONS))
        proxies = [stack.enter_context(Proxy(cluster.port)) for _ in range(2)]
        cluster.start_api(proxies[1].url)
        recorder = stack.enter_context(Recorder(cluster.server.url))
        yield Wired(cluster, recorder, *proxies)


@pytest.fixture
def wired(wired_cluster: Wired) -> Iterator[Wired]:
    """Quiet, with the worker at work, before and after."""
    cluster, _, worker_proxy, api_proxy = wired_cluster
    for worker in cluster.live_workers():
        if worker.url != worker_proxy.url or not worker.is_plain:
            worker.kill()
    if not cluster.live_workers():
        cluster.start_worker(worker_proxy.url)
    cluster.wait_until_leased(1)
    yield wired_cluster
    for proxy in (worker_proxy, api_proxy):
        proxy.refuse(None)
        proxy.release()
    check_quiet(cluster.connection, BASE)
    assert not cluster.take_complaints()


def lines(worker: ChaosWorker, text: str) -> int:
    """The number of lines in a worker's log that contain a text."""
    return worker.process.output.count(text)


def ready(cluster: Cluster) -> tuple[int, str | None, str | None]:
    """Status, code and Retry-After of /ready."""
    response = httpx.get(f"{cluster.api.url}/ready", timeout=5, trust_env=False)
    code = response.json().get("error", {}).get("code")
    return response.status_code, code, response.headers.get("retry-after")


@pytest.mark.parametrize("code", DRAWN)
def test_open_streams_pause_and_go_on_with_the_same_worker(
    wired: Wired, reference: Reference, code: str
) -> None:
    cluster, worker = wired.cluster, wired.worker
    before = lines(worker, LOST)
    run = wired.recorder.start(cluster.api.url, ASKS)
    # A request that comes later would be refused.
    wait_until(lambda: run.num_started == len(ASKS), 30, "all streams")
    with FAULTS[code](cluster.connection):
        wait_until(lambda: ready(cluster)[0] == 503, what="/ready to turn 503")
        status, error_code, retry_after = ready(cluster)
        refused = wired.recorder.start(cluster.api.url, ASKS[:2]).wait()
        time.sleep(AWAY_S)
    assert (status, error_code) == (503, CODES.get(code, "queue_unavailable"))
    assert retry_after is not None
    assert {(answer.status, answer.error_code) for answer in refused} == {(503, error_code)}
    check_complete(run.wait(), reference)
    check_complete(wired.recorder.start(cluster.api.url, ASKS[:8]).wait(), reference)
    assert cluster.workers == [worker]
    assert worker.is_running
    wait_until(lambda: lines(worker, BACK) == lines(worker, LOST), what="the end of the outage in the log")
    assert lines(worker, LOST) - before in (1, 2)
    assert lines(worker, "serving ") == 1


def test_every_reply_that_says_not_now_is_waited_out_by_worker_and_api(
    wired: Wired, reference: Reference
) -> None:
    worker, proxies = wired.worker, (wired.worker_proxy, wired.api_proxy)
    load = wired.recorder.keep_busy(wired.cluster.api.url, ASKS, num_clients=16)
    for said, reply in REPLIES.items():
        wait_until(lambda: lines(worker, BACK) == lines(worker, LOST), what="quiet before the next one")
        before = lines(worker, LOST)
        for proxy in proxies:
            proxy.refuse(reply)
        wait_until(lambda before=before: lines(worker, LOST) > before, what=f"{said} in the log")
        assert ready(wired.cluster)[:2] == (503, CODES.get(said, "queue_unavailable"))
        for proxy in proxies:
            proxy.refuse(None)
    answers = load.stop()
    check_partial(answers, reference)
    assert {answer.error_code for answer in answers} <= {None, *CODES.values(), "queue_unavailable"}
    assert {answer.status for answer in answers if answer.error_code} <= {503}
    assert worker.is_running


@pytest.mark.parametrize("code", DRAWN)
def test_a_worker_that_starts_meanwhile_waits_and_then_serves(wired: Wired, code: str) -> None:
    cluster = wired.cluster
    with FAULTS[code](cluster.connection):
        newcomer = cluster.start_worker(wait=False)
        wait_until(lambda: lines(newcomer, LOST) or not newcomer.is_running, 30, "the outage in its log")
        time.sleep(LEASE_S)
    newcomer.wait_until_serving()
    assert lines(newcomer, BACK)


@pytest.fixture
def gated(wired: Wired) -> Iterator[ChaosWorker]:
    """A worker that has loaded its model and told nobody; it goes on when thawed. There is no other."""
    wired.worker.kill()
    wired.cluster.live_workers()
    worker = wired.cluster.start_worker(wired.worker_proxy.url, wait=False, worker_class=GATED)
    worker.process.wait_for(LOADED)
    yield worker
    worker.kill()


@pytest.mark.parametrize("said", ["BUSY", *seldom(sorted(REPLIES.keys() - {"BUSY"}))])
def test_a_loaded_model_is_not_thrown_away_for_a_reply_that_says_not_now(
    wired: Wired, gated: ChaosWorker, reference: Reference, said: str
) -> None:
    wired.worker_proxy.refuse(REPLIES[said])
    gated.thaw()
    gated.process.wait_for(LOST)
    wired.worker_proxy.refuse(None)
    gated.wait_until_serving()
    check_complete(wired.recorder.start(wired.cluster.api.url, ASKS[:4]).wait(), reference)


def test_a_loaded_model_is_not_thrown_away_for_a_lost_connection(wired: Wired, gated: ChaosWorker) -> None:
    wired.cluster.server.kill()
    gated.thaw()
    gated.process.wait_for(LOST)
    wired.cluster.server.start()
    gated.wait_until_serving()


@pytest.mark.parametrize("script", ["renew", "sweep"])
def test_a_loaded_model_is_not_thrown_away_for_a_lost_reply(
    wired: Wired, gated: ChaosWorker, script: str
) -> None:
    wired.worker_proxy.swallow_replies(script_marker(script), count=3)
    gated.thaw()
    gated.wait_until_serving()


@pytest.mark.parametrize("stage", ["before the model is loaded", "after the model was loaded", "at work"])
def test_sigterm_ends_a_worker_that_waits(wired: Wired, request: pytest.FixtureRequest, stage: str) -> None:
    cluster, proxy = wired.cluster, wired.worker_proxy
    worker = request.getfixturevalue("gated") if stage.startswith("after") else wired.worker
    with FAULTS["BUSY"](cluster.connection):
        if stage.startswith("before"):
            worker = cluster.start_worker(proxy.url, wait=False)
        worker.thaw()
        worker.process.wait_for(LOST)
        asked_at = time.monotonic()
        worker.terminate()
        code = worker.process.wait()
    # RQ asks the server before it makes a worker, which could handle the signal.
    assert code == (-signal.SIGTERM if stage.startswith("before") else 0)
    assert time.monotonic() - asked_at < 10 * LEASE_S
    if stage == "at work":
        assert lines(worker, "its end was not recorded: Redis is not available") == 1


@contextmanager
def forbidden(connection: redis.Redis, command: str) -> Iterator[None]:
    """Nobody may send this command, for the time of the context."""
    connection.acl_setuser("default", enabled=True, commands=[f"-{command}"])
    try:
        yield
    finally:
        connection.acl_setuser("default", enabled=True, commands=["+@all"])


@pytest.mark.parametrize(
    ("command", "name"), [("blpop", "BLPOP"), ("zremrangebyscore", "the script renew"), ("expire", "EXPIRE")]
)
def test_a_reply_that_lasts_ends_a_worker_with_one_line_that_says_what_to_do(
    wired: Wired, command: str, name: str
) -> None:
    worker = wired.worker
    with forbidden(wired.cluster.connection, command):
        assert worker.process.wait() == 1
    said = [line for line in worker.process.output.splitlines() if "Redis refused" in line]
    (line,) = (line for line in said if "its end was not recorded" not in line)
    assert f"Redis refused {name}: " in line
    assert "permission" in line
    assert "docs/operations.md" in line
    assert "Traceback" not in worker.process.output


def test_a_loaded_model_that_can_not_be_registered_ends_the_worker_with_one_line(
    wired: Wired, gated: ChaosWorker
) -> None:
    with forbidden(wired.cluster.connection, "hsetnx"):
        gated.thaw()
        assert gated.process.wait() == 1
    assert lines(gated, "Redis refused HSETNX: ") == 1
    assert "Traceback" not in gated.process.output


def test_a_worker_at_a_url_that_leads_nowhere_ends_with_one_line(wired: Wired) -> None:
    worker = wired.cluster.start_worker(f"redis://127.0.0.1:{free_port()}", wait=False)
    assert worker.process.wait() == 1
    assert lines(worker, "Connection refused") == 1
    assert "Traceback" not in worker.process.output


def test_rqs_commands_reach_a_worker_that_lost_its_subscription_meanwhile(
    wired: Wired, reference: Reference
) -> None:
    cluster, worker = wired.cluster, wired.worker
    with FAULTS["BUSY"](cluster.connection):
        num_accepted = wired.worker_proxy.num_accepted
        wired.worker_proxy.reset_all()
        wait_until(lambda: wired.worker_proxy.num_accepted >= num_accepted + 4, what="new connections")
        time.sleep(LEASE_S)
    channel = f"rq:pubsub:{worker.name}"
    wait_until(lambda: cluster.connection.pubsub_numsub(channel)[0][1], what="the subscription")
    run = wired.recorder.start(cluster.api.url, ASKS)
    victim = pick_victim([worker]).owned_ids()[0]
    send_stop_job_command(cluster.connection, victim, serializer=JSONSerializer)
    stopped = [answer for answer in run.wait() if answer.error_code == "generation_stopped"]
    assert [answer.request_id for answer in stopped] == [victim]
    check_complete((answer for answer in run.answers if answer not in stopped), reference)

"""`lorelay status`, on a real server."""

import json
import socket
from collections.abc import Iterator

import pytest
import redis
from rq.worker import BaseWorker

from lorelay.main import main
from lorelay.status import live_workers, read_status
from lorelay.status_text import to_text
from shared.model_cards import ModelCard, WorkerFacts
from shared.queue import keys, registry
from tests.redis_server import RedisServer
from tests.streams import BASE, SECRET, BlockingApi, claim, make_request, worker_streams
from tests.waiting import wait_until


def card(name: str, adapter_name: str | None = None) -> ModelCard:
    return ModelCard(
        name=name,
        base=BASE,
        source=f"/models/{name}",
        version="0" * 64,
        created=1,
        max_model_len=64,
        adapter_name=adapter_name,
    )


@pytest.fixture
def api(redis_server: RedisServer, connection: redis.Redis) -> BlockingApi:
    registry.register(connection, [card(BASE), card("pirate", "pirate")])
    return BlockingApi(redis_server.url)


GARBLED = {
    "a pid": lambda connection: connection.hset("rq:worker:w1", "pid", "abc"),
    "a host": lambda connection: connection.hset("rq:worker:w1", "hostname", b"\xff"),
    "a time": lambda connection: connection.hset(
        b"rq:job:" + connection.lindex(f"rq:queue:{BASE}", 0), "enqueued_ms", "abc"
    ),
    "a name": lambda connection: connection.zadd(keys.workers(BASE), {b"\xff": 1e15}),
    "a worker": lambda connection: connection.set("rq:worker:w2", "") and connection.sadd("rq:workers", "w2"),
    "all workers": lambda connection: connection.rename("rq:queues", "rq:workers") and None,
    "a queue": lambda connection: (
        connection.delete("rq:queue:x")
        or (connection.set("rq:queue:x", "") and connection.sadd("rq:queues", "rq:queue:x"))
    ),
    "the registry": lambda connection: connection.delete(keys.MODELS) and connection.set(keys.MODELS, ""),
}


@pytest.mark.parametrize("name", GARBLED)
def test_a_garbled_record_is_shown_as_far_as_it_can_be_read(
    api: BlockingApi, connection: redis.Redis, name: str
) -> None:
    api.enqueue(make_request())
    worker_streams(connection, "w1").renew([])
    GARBLED[name](connection)
    assert to_text(read_status(connection))


def test_an_empty_server_has_nothing_to_show(connection: redis.Redis) -> None:
    status = read_status(connection)
    assert (status.workers, status.bases, status.adapters, status.queues) == ([], [], [], [])
    assert to_text(status).count("none") == 5


def num_workers(connection: redis.Redis) -> dict[str, int]:
    """The number of live workers of each model."""
    status = read_status(connection)
    return {model.name: model.num_workers for model in [*status.bases, *status.adapters]}


def test_a_model_counts_the_live_workers_that_serve_its_queue(
    api: BlockingApi, connection: redis.Redis
) -> None:
    assert num_workers(connection) == {BASE: 0, "pirate": 0}
    worker_streams(connection, "w1", served=["tiny-pirate"]).renew([])
    worker_streams(connection, "dead", lease_s=-1).renew([])
    assert num_workers(connection) == {BASE: 0, "pirate": 1}
    both = worker_streams(connection, "w2")
    both.renew([])
    assert num_workers(connection) == {BASE: 1, "pirate": 2}
    shown = {queue.name: queue.num_workers for queue in read_status(connection).queues}
    assert shown == {BASE: 1, "tiny-pirate": 2}
    both.serve({})
    assert num_workers(connection) == {BASE: 0, "pirate": 1}


def test_a_worker_with_other_weights_does_not_count_for_the_registered_model(
    api: BlockingApi, connection: redis.Redis
) -> None:
    worker_streams(connection, "w1", served={BASE: "1" * 64}).renew([])
    worker_streams(connection, "w2", served={BASE: "0" * 64}).renew([])
    assert num_workers(connection)[BASE] == 1


def test_models_without_a_live_worker_stand_above_the_tables(
    api: BlockingApi, connection: redis.Redis
) -> None:
    streams = worker_streams(connection, "w1", served=[BASE])
    streams.renew([])
    first, *_, adapters, _, queues = to_text(read_status(connection)).split("\n\n")
    assert first == "! No live worker serves: pirate"
    assert adapters.splitlines()[1].split() == ["pirate", BASE, "NONE", "/models/pirate"]
    assert [line.split()[2] for line in queues.splitlines()[1:]] == ["1", "NONE"]
    streams.serve(dict.fromkeys([BASE, "tiny-pirate"], ""))
    assert "!" not in to_text(read_status(connection))


def test_the_queues_of_a_worker_are_shown_in_short(api: BlockingApi, connection: redis.Redis) -> None:
    worker_streams(connection, "w1", served=[f"q{number}" for number in range(9)]).renew([])
    (worker,) = read_status(connection).workers
    assert len(worker.queues) == 9
    assert ", 6 more" in to_text(read_status(connection))


def describe(connection: redis.Redis, name: str, facts: WorkerFacts) -> None:
    """Makes a live worker that tells this about itself."""
    worker_streams(connection, name).renew([])
    connection.hset(f"rq:worker:{name}", "facts", facts.encode())


def test_a_worker_tells_where_its_adapters_are_and_what_they_take(
    api: BlockingApi, connection: redis.Redis
) -> None:
    facts = WorkerFacts(64, "bfloat16", 9, 2, 3 * 2**20, 4, 5, 7 * 2**20, 3, 11)
    describe(connection, "w1", facts)
    worker_streams(connection, "of-the-release-before").renew([])
    connection.hset("rq:worker:garbled", "facts", "no JSON")
    worker_streams(connection, "garbled").renew([])
    status = read_status(connection)
    assert [worker.facts for worker in status.workers if worker.name == "w1"] == [facts]
    (table,) = [table for table in to_text(status).split("\n\n") if "SLOT MIB" in table]
    rows = [line.split() for line in table.splitlines()[1:]]
    assert rows == [["w1", "64", "bfloat16", "9", "2", "4", "3.0", "5", "7.0", "3", "11"]]
    assert "differ" not in to_text(status)


@pytest.mark.parametrize("other", [WorkerFacts(32, "bfloat16"), WorkerFacts(64, "float32")])
def test_live_workers_of_a_base_that_differ_stand_above_the_tables(
    api: BlockingApi, connection: redis.Redis, other: WorkerFacts
) -> None:
    describe(connection, "w1", WorkerFacts(64, "bfloat16"))
    describe(connection, "w2", other)
    first = to_text(read_status(connection)).split("\n\n")[0]
    assert first.startswith(f"! The live workers of {BASE} differ: ")
    assert f"{other.max_model_len} tokens in {other.dtype}" in first
    worker_streams(connection, "w2", lease_s=-1).renew([])
    assert "differ" not in to_text(read_status(connection))


class StatesOfWorkers:
    """One worker that goes through its life, and what `lorelay status` says about it."""

    def __init__(self, connection: redis.Redis) -> None:
        self.connection = connection
        self.rq = BaseWorker([BASE, "tiny-pirate"], name="w1", connection=connection)
        self.rq.register_birth()
        self.streams = worker_streams(connection, "w1")
        self.commands = connection.pubsub()

    @property
    def state(self) -> str:
        (worker,) = read_status(self.connection).workers
        return worker.state

    def begin(self) -> None:
        """Listens to commands and loads, as a worker does before it serves."""
        self.commands.subscribe("rq:pubsub:w1")
        assert self.commands.get_message(timeout=5)
        self.connection.hset(self.rq.key, "state", "started")

    def serve(self, state: str = "idle") -> None:
        self.connection.hset(self.rq.key, "state", state)
        self.streams.renew([])

    def hang_up(self) -> None:
        """Closes its connections, as a process does when it is killed."""
        self.commands.close()


@pytest.fixture
def life(api: BlockingApi, connection: redis.Redis) -> Iterator[StatesOfWorkers]:
    life = StatesOfWorkers(connection)
    yield life
    life.hang_up()


def test_a_worker_is_loading_until_it_serves_then_idle_or_busy(life: StatesOfWorkers) -> None:
    assert life.state == "loading"
    life.begin()
    assert life.state == "loading"
    (worker,) = read_status(life.connection).workers
    assert worker.queues == [BASE, "tiny-pirate"]
    for state in ("idle", "busy", "suspended"):
        life.serve(state)
        assert life.state == state


def test_a_worker_that_is_killed_while_it_loads_is_lost(life: StatesOfWorkers) -> None:
    life.begin()
    life.hang_up()
    wait_until(lambda: life.state == "lost", what="the end of its connection")


def test_a_worker_that_serves_no_queue_any_more_drains_then_it_has_left(life: StatesOfWorkers) -> None:
    life.serve("busy")
    life.streams.serve({})
    assert life.state == "draining"
    life.rq.register_death()
    worker_streams(life.connection, "w1", lease_s=-1).renew([])
    assert life.state == "left"


def test_a_worker_whose_lease_runs_out_is_lost_whatever_it_did(life: StatesOfWorkers) -> None:
    life.serve("busy")
    worker_streams(life.connection, "w1", lease_s=-1).renew([])
    assert life.state == "lost"


def test_a_queue_tells_its_depth_what_runs_and_its_oldest_wait(
    api: BlockingApi, connection: redis.Redis
) -> None:
    ids = [api.enqueue(make_request("pirate")) for _ in range(3)]
    assert len(claim(worker_streams(connection), 1)) == 1
    # The head waits since it was enqueued: move that back instead of waiting.
    enqueued_ms = float(connection.hget(f"rq:job:{ids[1]}", "enqueued_ms"))
    connection.hset(f"rq:job:{ids[1]}", "enqueued_ms", enqueued_ms - 5000)

    base, pirate = read_status(connection).queues

    assert (base.name, base.model, base.depth, base.num_running) == (BASE, BASE, 0, 0)
    assert base.oldest_wait_s is None
    assert (pirate.name, pirate.model, pirate.depth, pirate.num_running) == ("tiny-pirate", "pirate", 2, 1)
    assert pirate.oldest_wait_s == pytest.approx(5, abs=4)


def test_a_queue_without_a_registered_model_is_shown_too(api: BlockingApi, connection: redis.Redis) -> None:
    api.enqueue(make_request("gone"))
    assert [(queue.name, queue.model) for queue in read_status(connection).queues][-1] == ("tiny-gone", None)


def test_a_worker_is_shown_as_rq_and_its_lease_have_it(api: BlockingApi, connection: redis.Redis) -> None:
    worker = BaseWorker([BASE], name="w1", connection=connection)
    worker.register_birth()
    connection.hset(worker.key, mapping={"state": "idle", "forward": "compiling"})
    api.enqueue(make_request())
    streams = worker_streams(connection, "w1")
    streams.renew([])
    claim(streams)

    (shown,) = read_status(connection).workers

    assert (shown.name, shown.base, shown.host, shown.pid) == ("w1", BASE, worker.hostname, worker.pid)
    assert (shown.state, shown.num_running, shown.alive) == ("busy", 1, True)
    assert shown.forward == "compiling"
    assert live_workers(connection, BASE) == {(worker.hostname, worker.pid): shown}
    worker.register_death()


def test_a_worker_that_still_loads_is_shown_without_a_base(api: BlockingApi, connection: redis.Redis) -> None:
    worker = BaseWorker([BASE], name="w2", connection=connection)
    worker.register_birth()
    (shown,) = read_status(connection).workers
    assert (shown.name, shown.base, shown.alive) == ("w2", None, False)
    assert live_workers(connection, BASE) == {}
    worker.register_death()


def test_a_worker_whose_lease_ran_out_and_that_rq_forgot_is_not_shown(
    api: BlockingApi, connection: redis.Redis
) -> None:
    connection.zadd(keys.workers(BASE), {"old": 1})
    assert read_status(connection).workers == []


def test_the_command_prints_tables_for_people(
    api: BlockingApi, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    api.enqueue(make_request("pirate"))
    assert main(["status", "--redis-url", redis_server.url]) == 0
    printed = capsys.readouterr().out
    assert "FORWARD" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("tiny-pirate "))
    assert row[:5] == ["tiny-pirate", "pirate", "NONE", "1", "0"]
    assert SECRET not in printed


def test_the_command_prints_json_for_programs(
    api: BlockingApi, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--redis-url", redis_server.url, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in printed["bases"]] == [BASE]
    assert set(printed) == {"workers", "bases", "adapters", "queues"}


def test_a_health_check_fails_without_a_live_worker_on_this_host(
    api: BlockingApi, connection: redis.Redis, redis_server: RedisServer
) -> None:
    command = ["status", "--here", "--redis-url", redis_server.url]
    worker_streams(connection, "elsewhere").renew([])
    connection.hset("rq:worker:elsewhere", mapping={"hostname": "elsewhere", "pid": 1})
    assert main(command) == 1
    worker_streams(connection, "here").renew([])
    connection.hset("rq:worker:here", mapping={"hostname": socket.gethostname(), "pid": 1})
    assert main(command) == 0


def test_without_a_server_the_command_fails_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--redis-url", "redis://127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lorelay: can't reach Redis: ")
    assert error.count("\n") == 1

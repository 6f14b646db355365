"""`lorelay status`, on a real server."""

import json
import socket

import pytest
import redis
from rq.worker import BaseWorker

from lorelay.main import main
from lorelay.status import live_workers, read_status, to_text
from shared.messages import ModelCard
from shared.queue import keys, registry
from tests.redis_server import RedisServer
from tests.streams import BASE, SECRET, BlockingApi, claim, make_request, worker_streams


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
    assert to_text(status).count("none") == 4


def test_models_are_listed_with_their_live_workers(api: BlockingApi, connection: redis.Redis) -> None:
    worker_streams(connection).renew([])
    status = read_status(connection)
    assert [(model.name, model.num_workers) for model in status.bases] == [(BASE, 1)]
    assert [(model.name, model.base, model.num_workers) for model in status.adapters] == [("pirate", BASE, 1)]


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
    assert row[:4] == ["tiny-pirate", "pirate", "1", "0"]
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

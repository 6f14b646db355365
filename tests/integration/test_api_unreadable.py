"""Records in Redis that an API can't read: each concerns its own request or model, and nobody else's."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import redis

from shared.queue import keys, registry
from shared.queue.records import Claim
from tests.integration.api_harness import (
    ADAPTER,
    BASE,
    CHAT,
    HELLO,
    ApiServer,
    ScriptedWorker,
    decode_stream,
    error_in,
    running_api,
)
from tests.redis_server import RedisServer
from tests.waiting import wait_until

Break = Callable[[redis.Redis, str], object]


def as_string(connection: redis.Redis, key: str) -> None:
    connection.delete(key)
    connection.set(key, "garbage")


LOGS: dict[str, Break] = {
    "another type": lambda connection, request_id: as_string(connection, keys.log(request_id)),
    "no JSON": lambda connection, request_id: connection.rpush(keys.log(request_id), b"\xff"),
    "JSON without end": lambda connection, request_id: connection.rpush(keys.log(request_id), "[" * 9999),
    "another number": lambda connection, request_id: connection.rpush(
        keys.log(request_id), '{"event_no": 999, "text": "?"}'
    ),
    "another message": lambda connection, request_id: connection.rpush(keys.log(request_id), '{"a": 1}'),
}
JOBS: dict[str, Break] = {
    "another type": lambda connection, request_id: as_string(connection, f"rq:job:{request_id}"),
    "request no JSON": lambda connection, request_id: connection.hset(
        f"rq:job:{request_id}", "outline", "no JSON"
    ),
    "request of another shape": lambda connection, request_id: connection.hset(
        f"rq:job:{request_id}", "outline", '{"request_id": 5}'
    ),
}


@pytest.fixture
def api(redis_server: RedisServer, connection: redis.Redis) -> Iterator[ApiServer]:
    with running_api(redis_server.url) as api:
        yield api


@pytest.fixture
def worker(connection: redis.Redis, api: ApiServer) -> ScriptedWorker:
    return ScriptedWorker(connection)


def ask(api: ApiServer, *, detached: bool = False, **fields: object) -> httpx.Response:
    headers = {"X-Lorelay-Detach": "true"} if detached else {}
    return httpx.post(f"{api.url}{CHAT}", json=HELLO | fields, headers=headers, timeout=30, trust_env=False)


def claims(worker: ScriptedWorker, num_requests: int) -> list[Claim]:
    return [worker.claim() for _ in range(num_requests)]


@pytest.mark.parametrize("name", LOGS)
def test_a_log_that_can_not_be_read_ends_its_stream_and_no_other(
    api: ApiServer, worker: ScriptedWorker, name: str
) -> None:
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(ask, api, stream=True) for _ in range(2)]
        broken, other = claims(worker, 2)
        for claim in (broken, other):
            worker.emit(claim, "so far ")
        LOGS[name](worker.connection, broken.held.request_id)
        worker.finish(other, "and on")
        answers = {id_of(stream.result()): stream.result() for stream in streams}
    told = decode_stream(answers[broken.held.request_id].text)
    assert "can't be read" in told[-2]
    assert told[-1] == "[DONE]"
    assert "and on" in answers[other.held.request_id].text


def id_of(answer: httpx.Response) -> str:
    return answer.headers["x-request-id"]


@pytest.mark.parametrize("name", JOBS)
def test_resuming_a_request_whose_job_can_not_be_read_is_told_so(
    api: ApiServer, worker: ScriptedWorker, name: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, api, detached=True, stream=True)
        claim = worker.claim()
        worker.emit(claim, "one ")
        worker.finish(claim)
        answer.result()
    JOBS[name](worker.connection, claim.held.request_id)
    path = f"{CHAT}/{claim.held.request_id}/stream"
    resumed = httpx.get(f"{api.url}{path}", timeout=30, trust_env=False)
    assert resumed.status_code == 500
    assert error_in(resumed)["code"] == "generation_failed"


def test_a_request_set_aside_in_the_queue_is_told_to_its_client(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, api)
        (waiting,) = wait_until(lambda: worker.connection.lrange("rq:queue:base", 0, -1), what="the request")
        worker.connection.hset(f"rq:job:{waiting.decode()}", "schema_version", "abc")
        assert worker.try_claim() is None
        assert answer.result().status_code == 500
        assert "can't be read" in error_in(answer.result())["message"]
        good = pool.submit(ask, api)
        worker.finish(worker.claim(), "fine")
        assert good.result().status_code == 200


@pytest.mark.parametrize("is_log_lost", [False, True], ids=["log kept", "log lost"])
def test_a_running_request_that_is_set_aside_ends_its_stream(
    api: ApiServer, worker: ScriptedWorker, is_log_lost: bool
) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, api, stream=True)
        claim = worker.claim()
        worker.emit(claim, "so ", "far ")
        as_string(worker.connection, keys.owner(claim.held.request_id))
        if is_log_lost:
            worker.connection.delete(keys.log(claim.held.request_id))
        worker.emit(claim, "lost")
        told = decode_stream(answer.result().text)
    assert '"so "' in told[1]
    assert '"code":"generation_failed"' in told[-2]
    job = worker.connection.hgetall(f"rq:job:{claim.held.request_id}")
    assert job[b"status"] == b"failed"
    assert b"WRONGTYPE" in job[b"unreadable"]


def test_a_stream_whose_log_lost_its_end_is_told_so(api: ApiServer, worker: ScriptedWorker) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, api, detached=True)
        claim = worker.claim()
        worker.emit(claim, "one ")
        worker.finish(claim)
        answer.result()
    worker.connection.rpop(keys.log(claim.held.request_id))
    path = f"{CHAT}/{claim.held.request_id}/stream"
    resumed = httpx.get(f"{api.url}{path}", timeout=30, trust_env=False)
    assert "its log has lost the last event" in decode_stream(resumed.text.replace("id: ", ": id "))[-2]


def test_garbage_on_the_channel_harms_no_stream(api: ApiServer, worker: ScriptedWorker) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, api, stream=True)
        claim = worker.claim()
        worker.emit(claim, "one ")
        channel = worker.connection.get(keys.reader(claim.held.request_id)) or b""
        for garbage in (b"", b"\xff", b"x y", f"{claim.held.request_id} {{".encode()):
            worker.connection.publish(channel, garbage)
        worker.emit(claim, "two ")
        worker.finish(claim)
        assert decode_stream(answer.result().text)[-1] == "[DONE]"
    assert '"two "' in answer.result().text


def test_a_registry_entry_that_can_not_be_read_hides_its_model_only(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    for garbage in ("no JSON", "{}", BASE.encode(), b"\xff"):
        worker.connection.hset(keys.MODELS, ADAPTER.name, garbage)
        listed = httpx.get(f"{api.url}/v1/models", trust_env=False)
        assert [model["id"] for model in listed.json()["data"]] == [BASE.name]
        refused = ask(api, model=ADAPTER.name)
        assert (refused.status_code, error_in(refused)["code"]) == (500, "internal_error")
        assert "registry" in error_in(refused)["message"]
        registry.register(worker.connection, [BASE, ADAPTER])
        listed = httpx.get(f"{api.url}/v1/models", trust_env=False)
        assert [model["id"] for model in listed.json()["data"]] == [BASE.name, ADAPTER.name]


def test_a_registry_of_another_type_is_replaced_by_the_next_worker(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    as_string(worker.connection, keys.MODELS)
    assert httpx.get(f"{api.url}/v1/models", trust_env=False).status_code == 503
    registry.register(worker.connection, [BASE, ADAPTER])
    assert len(httpx.get(f"{api.url}/v1/models", trust_env=False).json()["data"]) == 2
    assert worker.connection.get(keys.unreadable(keys.MODELS)) == b"garbage"

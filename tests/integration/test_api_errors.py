"""The errors of docs/errors.md over HTTP: bad requests, states of the queue, errors of a worker."""

import asyncio
import hashlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis
from rq import Queue, SimpleWorker
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from api.relay import upkeep
from shared.queue.names import queue_name
from tests.integration.api_harness import (
    CHAT,
    HELLO,
    ApiServer,
    ScriptedWorker,
    asking,
    error_in,
    eventually,
    running_api,
)
from tests.redis_server import BINARIES, RedisServer, free_port, server_binary

KEY = "sk-one"
JSON = {"Content-Type": "application/json"}
NO_REDIS_LIMIT_S = 3.0
"""Longest time in which an API without Redis must answer 503."""


@pytest.fixture
def worker(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection)


@pytest.fixture
def api(redis_server: RedisServer, worker: ScriptedWorker) -> Iterator[ApiServer]:
    with running_api(redis_server.url, max_body_bytes=10_000) as server:
        yield server


def assert_refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """Checks an answer that refuses a request for good."""
    error = error_in(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-should-retry"] == "false"


BAD_REQUESTS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "invalid_request_error", "messages"),
    ({"messages": None}, "invalid_request_error", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_request_error", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "invalid_request_error", "messages[0].content"),
    ({"model": 7}, "invalid_request_error", "model"),
    ({"temperature": "hot"}, "invalid_request_error", "temperature"),
    ({"temperature": 2.1}, "invalid_request_error", "temperature"),
    ({"max_tokens": 0}, "invalid_request_error", "max_tokens"),
    ({"stream_options": {"include_usage": True}}, "invalid_request_error", "stream_options"),
    ({"colour": "blue"}, "invalid_request_error", "colour"),
    ({"n": 129}, "invalid_request_error", "n"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "unsupported_parameter", "tools[0].type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "unsupported_parameter",
        "messages[0].content[0].type",
    ),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD_REQUESTS, ids=str)
def test_a_bad_request_is_refused_and_the_fault_is_named(
    api: ApiServer, connection: redis.Redis, fields: dict[str, Any], code: str, param: str
) -> None:
    assert_refused(httpx.post(api.url + CHAT, json={**HELLO, **fields}), 400, code, param)
    assert connection.llen(f"rq:queue:{queue_name('base', None)}") == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": NaN}', b'"text"', b"[" * 9_999])
def test_a_body_that_is_no_json_object_is_refused(api: ApiServer, body: bytes) -> None:
    assert_refused(httpx.post(api.url + CHAT, content=body, headers=JSON), 400, "invalid_request_error")


def test_a_model_that_does_not_exist_is_refused(api: ApiServer) -> None:
    response = httpx.post(api.url + CHAT, json={**HELLO, "model": "x"})
    assert_refused(response, 404, "model_not_found", "model")
    assert error_in(response)["message"] == "The model 'x' does not exist."
    assert_refused(httpx.get(f"{api.url}/v1/models/x/y"), 404, "model_not_found", "model")


def test_openais_client_raises_its_own_exceptions_and_does_not_repeat(api: ApiServer) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none") as client:
        with pytest.raises(openai.NotFoundError) as not_found:
            client.chat.completions.create(model="x", messages=messages)
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="base", messages=messages, store=True)
    assert (not_found.value.code, bad.value.code, bad.value.param) == (
        "model_not_found",
        "unsupported_parameter",
        "store",
    )


def test_a_body_over_the_limit_is_refused_by_its_announced_length(api: ApiServer) -> None:
    assert_refused(httpx.post(api.url + CHAT, content=b"x" * 10_001, headers=JSON), 413, "request_too_large")


def test_a_body_over_the_limit_is_refused_without_a_length(api: ApiServer) -> None:
    pieces = (b"x" * 1_000 for _ in range(11))
    assert_refused(httpx.post(api.url + CHAT, content=pieces, headers=JSON), 413, "request_too_large")


def test_unknown_paths_and_methods_are_refused_in_the_same_form(api: ApiServer) -> None:
    assert_refused(httpx.get(f"{api.url}/v1/nothing"), 404, "not_found")
    wrong_method = httpx.get(api.url + CHAT)
    assert_refused(wrong_method, 405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path", ["/health/", "/docs/", "//", "/v1/models/", "/v1/chat/completions/", "/openapi.json/"]
)
def test_no_path_redirects_to_the_host_that_a_client_names(api: ApiServer, path: str) -> None:
    answer = httpx.get(api.url + path, headers={"Host": "evil.example"}, follow_redirects=False)
    assert answer.status_code in (404, 405)
    assert "location" not in answer.headers
    assert "evil" not in answer.text


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_answer_head(api: ApiServer, path: str) -> None:
    answer = httpx.head(api.url + path)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer sk-two", f"Basic {KEY}", KEY, "Bearer \xff"])
def test_a_wrong_key_or_none_is_refused(
    redis_server: RedisServer, worker: ScriptedWorker, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with running_api(redis_server.url, api_keys=("sk-zero", KEY)) as api:
        for response in (
            httpx.post(api.url + CHAT, json=HELLO, headers=headers),
            httpx.post(api.url + CHAT, content=b"{", headers=headers),
            httpx.get(f"{api.url}/v1/models", headers=headers),
            httpx.get(f"{api.url}/v1/models/base", headers=headers),
        ):
            assert_refused(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"


def test_each_of_the_keys_opens_and_probes_and_documentation_need_none(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with running_api(redis_server.url, api_keys=("sk-zero", KEY)) as api, worker.answering("Paris"):
        for key in ("sk-zero", KEY):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.post(api.url + CHAT, json=HELLO, headers=headers).status_code == 200
        for path in ("/", "/docs", "/openapi.json", "/health", "/ready", "/docs-assets/swagger-ui.css"):
            assert httpx.get(api.url + path).status_code == 200, path


def assert_unavailable(api: ApiServer, code: str = "queue_unavailable") -> None:
    """A request is answered with 503 in time."""
    begun_at = time.monotonic()
    response = httpx.post(api.url + CHAT, json=HELLO, timeout=30)
    assert time.monotonic() - begun_at < NO_REDIS_LIMIT_S
    assert (response.status_code, error_in(response)["code"]) == (503, code)
    assert int(response.headers["retry-after"]) >= 1
    assert "x-should-retry" not in response.headers


def test_an_api_that_starts_before_redis_says_so_and_serves_as_soon_as_it_is_there(tmp_path: Path) -> None:
    redis_server = RedisServer(server_binary(), tmp_path, port=free_port())
    with running_api(redis_server.url) as api:
        assert_unavailable(api)
        assert httpx.get(f"{api.url}/health").status_code == 200
        assert httpx.get(f"{api.url}/ready").status_code == 503
        assert "can't be read" in httpx.get(f"{api.url}/openapi.json").json()["info"]["description"]
        with redis_server, redis.Redis.from_url(redis_server.url) as connection:
            assert httpx.get(f"{api.url}/ready").status_code == 200
            with ScriptedWorker(connection).answering("Paris"):
                assert httpx.post(api.url + CHAT, json=HELLO).status_code == 200


def test_a_redis_that_is_killed_or_answers_no_more_is_reported_in_time(tmp_path: Path) -> None:
    with (
        RedisServer(server_binary(), tmp_path, append_only=True) as redis_server,
        redis.Redis.from_url(redis_server.url) as connection,
        running_api(redis_server.url) as api,
    ):
        worker = ScriptedWorker(connection)
        with worker.answering("Paris"):
            assert httpx.post(api.url + CHAT, json=HELLO).status_code == 200
        redis_server.freeze()
        assert_unavailable(api)
        assert httpx.get(f"{api.url}/ready", timeout=30).status_code == 503
        redis_server.thaw()
        redis_server.kill()
        assert_unavailable(api)
        redis_server.start()
        with worker.answering("Paris"):
            assert httpx.post(api.url + CHAT, json=HELLO).status_code == 200


@pytest.mark.parametrize("binary", BINARIES)
def test_a_redis_without_memory_is_reported_and_nothing_of_the_request_stays(
    tmp_path: Path, binary: str
) -> None:
    with (
        RedisServer(BINARIES[binary](), tmp_path) as redis_server,
        redis.Redis.from_url(redis_server.url) as connection,
        running_api(redis_server.url) as api,
    ):
        worker = ScriptedWorker(connection)
        connection.config_set("maxmemory", 1)
        assert_unavailable(api, "queue_out_of_memory")
        connection.config_set("maxmemory", 0)
        assert worker.try_claim() is None
        with worker.answering("Paris"):
            assert httpx.post(api.url + CHAT, json=HELLO).status_code == 200


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with running_api(redis_server.url, max_queue_depth=1) as api:
        async with asking(api) as first:
            await eventually(lambda: worker.connection.llen("rq:queue:base"), "the first request")
            second = httpx.post(api.url + CHAT, json=HELLO)
            assert (second.status_code, error_in(second)["code"]) == (429, "queue_full")
            assert int(second.headers["retry-after"]) >= 1
            assert "x-should-retry" not in second.headers
            worker.finish(worker.claim())
            assert (await first).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("has_worker", "code"), [(True, "queue_timeout"), (False, "no_worker")])
def test_a_request_that_no_worker_takes_in_time_ends_and_never_runs(
    redis_server: RedisServer, worker: ScriptedWorker, has_worker: bool, code: str, stream: bool
) -> None:
    if has_worker:
        worker.report()
    with running_api(redis_server.url, queue_time_limit_s=0.3) as api:
        response = httpx.post(api.url + CHAT, json={**HELLO, "stream": stream})
    assert (response.status_code, error_in(response)["code"]) == (503, code)
    assert int(response.headers["retry-after"]) >= 1
    assert worker.try_claim() is None
    (job_key,) = worker.connection.keys("rq:job:*")
    job = Job.fetch(job_key.decode().removeprefix("rq:job:"), worker.connection, JSONSerializer)
    assert job.get_status() == JobStatus.CANCELED


async def test_a_request_that_a_worker_finds_overdue_ends_as_the_api_would_end_it(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    async with asking(api) as task:
        (job,) = await eventually(lambda: worker.connection.keys("rq:job:*"), "the request")
        worker.connection.hset(job, "deadline_ms", 1)
        assert worker.try_claim() is None
        response = await task
    assert (response.status_code, error_in(response)["code"]) == (503, "queue_timeout")
    assert int(response.headers["retry-after"]) >= 1


async def test_a_request_that_a_stock_worker_took_is_answered_by_a_worker_of_ours(
    redis_server: RedisServer, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "VANISH_CHECK_S", 0.05)
    monkeypatch.setattr(upkeep, "MIN_QUIET_S", 0.05)
    worker.report()
    with running_api(redis_server.url, redis_timeout_s=0.1) as api:
        async with asking(api) as task:
            await eventually(lambda: worker.connection.llen("rq:queue:base"), "the request")
            stock = SimpleWorker([Queue("base", connection=worker.connection)], connection=worker.connection)
            stock.work(burst=True, max_jobs=1, logging_level="ERROR")
            claim = await eventually(worker.try_claim, "the request's return")
            assert worker.connection.hget(Job.key_for(claim.held.request_id), "taken") == b"1"
            worker.finish(claim, "Paris")
            assert (await task).json()["choices"][0]["message"]["content"] == "Paris"


async def test_a_detached_request_waits_no_longer_than_another_and_its_key_is_its_tenant(
    redis_server: RedisServer, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with running_api(redis_server.url, api_keys=("team-z:sk-zero", KEY)) as api:
        tenants = set()
        for key in ("sk-zero", KEY, KEY):
            headers = {"Authorization": f"Bearer {key}", "X-Lorelay-Detach": "true"}
            async with httpx.AsyncClient(base_url=api.url, headers=headers) as client:
                task = asyncio.create_task(client.post(CHAT, json=HELLO, timeout=30))
                claim = await eventually(worker.try_claim, "the request")
                worker.finish(claim, "Paris")
                assert (await task).status_code == 200
            assert claim.request.wait_limit_s == 30
            tenants.add(claim.request.tenant)
            assert httpx.get(f"{api.url}/v1/models/missing", headers=headers).status_code == 404
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    assert "GET /v1/models/missing for team-z ended" in caplog.text
    assert tenants == {"team-z", digest}
    assert "for team-z ended" in caplog.text
    assert f"for {digest[:12]} ended" in caplog.text
    assert KEY not in caplog.text
    assert "sk-zero" not in caplog.text


async def test_the_queue_time_limit_leaves_a_running_request_alone(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with running_api(redis_server.url, queue_time_limit_s=0.2) as api:
        async with asking(api) as task:
            claim = await eventually(worker.try_claim, "the request")
            await asyncio.wait([task], timeout=0.6)
            assert not task.done()
            assert not worker.is_aborted(claim)
            worker.finish(claim, "late")
            assert (await task).json()["choices"][0]["message"]["content"] == "late"


def test_a_client_that_leaves_while_it_sends_its_body_harms_nothing(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    with socket.create_connection(("127.0.0.1", api.port)) as half:
        half.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{{".encode())
    with worker.answering("Paris"):
        assert httpx.post(api.url + CHAT, json=HELLO).status_code == 200

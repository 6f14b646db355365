"""Every exception has its place in HTTP, and every failure of Redis its exception."""

import asyncio
import json
import logging
from pathlib import Path

import httpx
import pytest
import redis
from starlette.requests import ClientDisconnect

from api.errors import MAPPING, error_response
from api.main import create_app
from api.relay.queue_client import queue_errors
from shared.errors import (
    ERRORS_BY_CODE,
    ConfigurationError,
    InvalidRequest,
    LorelayError,
    NoWorker,
    QueueFull,
    QueueOutOfMemory,
    QueueUnavailable,
)
from shared.settings import ApiSettings, RedisSettings

RETRYABLE = {408, 409, 429, *range(500, 600)}
"""Statuses after which the official clients repeat a request unless they are told not to."""


def test_every_exception_of_lorelay_has_a_mapping_of_its_own() -> None:
    assert set(MAPPING) == set(ERRORS_BY_CODE.values())


@pytest.mark.parametrize("cls", MAPPING, ids=lambda cls: cls.__name__)
def test_every_code_that_a_client_may_get_is_documented(cls: type[LorelayError]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "errors.md").read_text()
    assert issubclass(cls, ConfigurationError) or f"`{cls.code}`" in page


@pytest.mark.parametrize("cls", MAPPING, ids=lambda cls: cls.__name__)
def test_every_answer_has_the_whole_envelope_and_says_whether_to_come_back(cls: type[LorelayError]) -> None:
    response = error_response(cls(param="p"))
    error = json.loads(response.body)["error"]
    assert error == {"message": cls().message, "type": error["type"], "param": "p", "code": cls.code}
    permanent = response.headers.get("x-should-retry") == "false"
    assert permanent != ("retry-after" in response.headers) or cls in (LorelayError, NoWorker)
    assert permanent or response.status_code in RETRYABLE


def test_a_full_queue_tells_its_measured_time() -> None:
    assert error_response(QueueFull(retry_after_s=17)).headers["retry-after"] == "17"


def test_an_exception_that_has_no_mapping_yet_is_treated_like_its_ancestor() -> None:
    class Novelty(InvalidRequest):
        """Something new."""

    assert error_response(Novelty()).status_code == 400


IN_SCRIPT = "Error running script (call to f_0): @user_script:1: @user_script: 1: "
FAILURES = [
    (redis.ConnectionError("refused"), QueueUnavailable),
    (redis.TimeoutError("late"), QueueUnavailable),
    (redis.BusyLoadingError("loading"), QueueUnavailable),
    (redis.ResponseError("READONLY"), QueueUnavailable),
    (ConnectionResetError(), QueueUnavailable),
    (redis.OutOfMemoryError("command not allowed"), QueueOutOfMemory),
    (redis.ResponseError(f"{IN_SCRIPT}-OOM command not allowed"), QueueOutOfMemory),
]


@pytest.mark.parametrize(("failure", "cls"), FAILURES, ids=repr)
async def test_a_failure_of_redis_becomes_an_exception_of_ours(
    failure: Exception, cls: type[QueueUnavailable]
) -> None:
    with pytest.raises(QueueUnavailable) as caught:
        async with queue_errors(until=float("inf")):
            raise failure
    assert type(caught.value) is cls
    assert caught.value.__cause__ is failure


async def test_a_redis_that_takes_too_long_is_unavailable() -> None:
    with pytest.raises(QueueUnavailable):
        async with queue_errors(asyncio.get_running_loop().time() + 0.01):
            await asyncio.Event().wait()


async def test_other_exceptions_pass_as_they_are() -> None:
    with pytest.raises(KeyError):
        async with queue_errors(until=float("inf")):
            raise KeyError


async def test_an_exception_that_nobody_foresaw_is_logged_and_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = create_app(ApiSettings(), RedisSettings(redis_url="redis://127.0.0.1:1"))

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("a secret")

    @app.get("/left")
    async def left() -> None:
        raise ClientDisconnect

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        response = await client.get("/broken")
        assert (await client.get("/left")).status_code == 400
    assert response.status_code == 500
    assert response.json() == {
        "error": {
            "message": "An internal error.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError

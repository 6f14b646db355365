"""The id and the log line of every exchange, whatever writes its response."""

import logging
import re
from typing import Any

import httpx
import pytest

from tests.unit.api.test_layers import CHAT, WRITERS, ask, make_app

HELLO = {"model": "org/pirate", "messages": [{"role": "user", "content": "a secret"}]}


def line_of(caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    """The one line about an exchange."""
    (record,) = [record for record in caplog.records if getattr(record, "action", "") == "request_end"]
    return record


@pytest.mark.parametrize("given", [None, "trace-1.2:a/b"])
@pytest.mark.parametrize(("method", "path", "status"), WRITERS.values(), ids=WRITERS)
async def test_every_response_has_an_id_which_its_log_line_names(
    method: str, path: str, status: int, given: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    app = make_app()

    @app.get("/crash", include_in_schema=False)
    async def crash() -> None:
        raise ZeroDivisionError

    response = await ask(app, method, path, headers={} if given is None else {"X-Request-Id": given})
    (answered,) = response.headers.get_list("x-request-id")
    assert answered == given or (given is None and re.fullmatch("req-[0-9a-f]{32}", answered))
    record = line_of(caplog)
    assert f" id={answered} " in record.getMessage()
    assert record.__dict__["status"] == response.status_code
    is_quiet = response.status_code < 400 and not path.startswith("/v1")
    assert (record.levelno == logging.DEBUG) == is_quiet


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a field": ({**HELLO, "store": True}, "unsupported_parameter", "model=org/pirate .* param=store$"),
    "a long body": ({"messages": [0] * 60_000, "model": "m"}, "invalid_request_error", "model=m "),
    "a model that forges": (
        {**HELLO, "model": "x id=y\nz", "store": True},
        "unsupported",
        r'model="x id=y\\nz" ',
    ),
    "a huge model": ({**HELLO, "model": "m" * 999, "store": True}, "unsupported_parameter", "model=m{100}… "),
    "no model": ({"messages": []}, "invalid_request_error", "model=- .* param=model$"),
}


@pytest.mark.parametrize(("body", "code", "words"), REFUSED.values(), ids=REFUSED)
async def test_the_line_of_a_refused_request_names_model_code_and_parameter(
    body: dict[str, Any], code: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await ask(make_app(), "POST", CHAT, json=body)
    line = line_of(caplog).getMessage()
    assert line.startswith(f"POST {CHAT} ended: {code}")
    assert re.search(words, line), line
    assert "\n" not in line
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("given", "answered"),
    [
        (b"a b\tc", "a_b_c"),
        (b"id=1 model=evil", "id=1_model=evil"),
        (b"\xff\xfe", "__"),
        (b"x" * 5_000, "x" * 128),
        (b"  padded  ", "padded"),
    ],
)
async def test_an_id_from_a_client_is_bounded_and_can_not_forge_a_line(given: bytes, answered: str) -> None:
    response = await ask(make_app(), "GET", "/health", headers={b"X-Request-Id": given})
    assert response.headers["x-request-id"] == answered


async def test_an_empty_id_from_a_client_counts_as_none() -> None:
    response = await ask(make_app(), "GET", "/health", headers={"X-Request-Id": " "})
    assert response.headers["x-request-id"].startswith("req-")


async def test_the_line_of_a_fault_is_a_warning_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    response: httpx.Response = await ask(make_app(), "GET", "/v1/models/org/pirate")
    assert response.status_code == 503
    record = line_of(caplog)
    assert record.levelno == logging.WARNING
    assert "queue_unavailable, 503" in record.getMessage()
    assert "model=org/pirate code=queue_unavailable param=-: The queue is unavailable" in record.getMessage()
    assert "ConnectionError" in record.getMessage()

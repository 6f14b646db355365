"""Limits on connections: what clients send and don't send, read and don't read."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from api import connections
from tests.integration.api_harness import CHAT, HELLO, ApiServer, ScriptedWorker, error_in, running_api
from tests.redis_server import RedisServer, free_port
from tests.waiting import wait_until

NO_REDIS = "redis://127.0.0.1:1"
NEVER_S = 100.0
LARGE_FILE = "/docs-assets/swagger-ui-bundle.js"
Start = Callable[..., ApiServer]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an API with settings; it checks its connections often."""
    monkeypatch.setattr(connections, "SWEEP_S", 0.02)
    monkeypatch.setattr(connections, "LINGER_S", 0.2)
    monkeypatch.setattr(connections, "CLOSE_LIMIT_S", 0.2)
    with contextlib.ExitStack() as stack:
        yield lambda url=NO_REDIS, **settings: stack.enter_context(running_api(url, **settings))


def connect(api: ApiServer, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", api.port), timeout=10)
    client.sendall(sent)
    return client


def answer(client: socket.socket) -> httpx.Response:
    """Reads a response; the connection may stay open."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = client.recv(65536)
        assert piece, f"the connection was closed after {received!r}"
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += client.recv(65536)
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


def code(client: socket.socket) -> str:
    """Reads a response, which must be an error; returns its code."""
    return str(error_in(answer(client))["code"])


def is_closed(client: socket.socket) -> bool:
    """Waits until the server closes the connection."""
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def post(body: bytes, *, announced: int | None = None, key: str = "") -> bytes:
    """A chat request whose body may be shorter than announced."""
    headers = {
        "host": "x",
        "authorization": f"Bearer {key}",
        "content-type": "application/json",
        "content-length": str(len(body) if announced is None else announced),
    }
    lines = [f"POST {CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
ENDLESS = {
    "one header": (GET + b"a: ", b"x" * 50_000),
    "the name of a header": (GET, b"x" * 50_000),
    "many headers": (GET, b"a: b\r\n" * 10_000),
    "the path": (b"GET /", b"x" * 50_000),
    "blank lines": (b"", b"\r\n" * 25_000),
    "trailers": (
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
        b"a: b\r\n" * 10_000,
    ),
    "an extension of a chunk": (
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1;",
        b"x" * 50_000,
    ),
    "a second request": (GET + b"\r\n" + GET + b"a: ", b"x" * 50_000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_head_without_end_is_refused_at_64_kib(start: Start, name: str) -> None:
    first, more = ENDLESS[name]
    api = start()
    with connect(api, first) as client:
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 2_000_000:
                client.sendall(more)
                sent += len(more)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(65536):
                received += piece
    refusal = received.rpartition(b"HTTP/1.1 ")[2]
    assert refusal.startswith(b"431 Request Header Fields Too Large\r\n")
    assert json.loads(refusal.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"
    assert httpx.get(f"{api.url}/health").status_code == 200


def test_a_head_of_60_kib_is_served_in_one_piece_or_in_many(start: Start) -> None:
    api = start()
    with connect(api) as client:
        for piece_size in (1_000_000, 1_000):
            head = GET + b"a: b\r\n" * 5_000 + b"c: " + b"x" * 30_000 + b"\r\n\r\n"
            for begin in range(0, len(head), piece_size):
                client.sendall(head[begin : begin + piece_size])
            assert answer(client).status_code == 200


def test_what_is_no_http_gets_an_error_in_the_usual_form(start: Start) -> None:
    with connect(start(), b"\x16\x03\x01 hello\r\n\r\n") as client:
        assert code(client) == "invalid_request_error"
        assert is_closed(client)


def test_a_head_that_does_not_arrive_in_time_ends_its_connection(start: Start) -> None:
    api = start(head_limit_s=0.1)
    with connect(api, GET) as client, connect(api) as silent, connect(api, GET + b"\r\n") as kept:
        assert code(client) == "request_timeout"
        assert is_closed(client)
        assert is_closed(silent)
        assert answer(kept).status_code == 200
        kept.sendall(GET)
        assert code(kept) == "request_timeout"


def test_a_body_that_does_not_arrive_in_time_is_refused(start: Start) -> None:
    api = start(body_limit_s=0.1)
    chunked = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    chunked = (chunked + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n") % CHAT.encode()
    for sent in (post(b"{", announced=100), chunked):
        with connect(api, sent) as client:
            assert code(client) == "request_timeout"
            assert is_closed(client)


def test_a_body_that_no_route_reads_ends_its_connection_too(start: Start) -> None:
    api = start(body_limit_s=0.1)
    with connect(api, GET + b"content-length: 100\r\n\r\n") as client:
        assert answer(client).status_code == 200
        assert is_closed(client)


def test_the_key_is_checked_before_the_body_is_read(start: Start) -> None:
    api = start(api_keys=("sk-one",))
    for key in ("", "sk-two"):
        with connect(api, post(b"{", announced=1_000_000, key=key)) as client:
            assert code(client) == "invalid_api_key"


def test_bodies_that_never_end_keep_no_other_out(start: Start) -> None:
    api = start(max_arriving_bytes=100_000, redis_timeout_s=0.1)
    unfinished = post(b"x" * 40_000, announced=50_000)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(api, unfinished)) for _ in range(8)]
        assert [code(client) for client in slow[:4]] == ["server_busy"] * 4
        message = {"role": "user", "content": "x" * 60_000}
        answered = httpx.post(api.url + CHAT, json={**HELLO, "messages": [message]}, timeout=10)
        assert error_in(answered)["code"] == "queue_unavailable"


def test_idle_connections_keep_no_other_out(start: Start) -> None:
    api = start(max_connections=5)
    with contextlib.ExitStack() as stack:
        for sent in (b"", GET, GET + b"\r\n", post(b"{", announced=100)):
            for _ in range(10):
                stack.enter_context(connect(api, sent))
            assert httpx.get(f"{api.url}/health").status_code == 200
            answered = httpx.post(api.url + CHAT, json={}, timeout=10)
            assert error_in(answered)["code"] == "invalid_request_error"


def test_if_all_connections_have_requests_only_probes_get_in(
    start: Start, redis_server: RedisServer, connection: redis.Redis
) -> None:
    ScriptedWorker(connection)
    api = start(redis_server.url, max_connections=3)
    body = json.dumps(HELLO).encode()
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(connect(api, post(body))) for _ in range(3)]
        wait_until(lambda: len(api.relay.inboxes) == 3, what="the requests")
        assert httpx.get(f"{api.url}/health").status_code == 200
        assert httpx.get(f"{api.url}/ready").status_code == 200
        refused = httpx.post(api.url + CHAT, json=HELLO)
        assert (refused.status_code, error_in(refused)["code"]) == (503, "server_busy")
        assert refused.headers["retry-after"] == "1"
        more = [stack.enter_context(connect(api)) for _ in range(connections.NUM_RESERVED + 10)]
        assert is_closed(more[0])
        assert httpx.get(f"{api.url}/health").status_code == 200
        assert len(api.relay.inboxes) == 3
        running.pop().close()
        wait_until(lambda: len(api.relay.inboxes) == 2, what="the end of one")


def never_reading(port: int) -> socket.socket:
    """A client that asks for more than the buffers hold, and reads none of it."""
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.sendall(f"GET {LARGE_FILE} HTTP/1.1\r\nhost: x\r\n\r\n".encode() * 20)
    return client


def num_connections(api: ApiServer) -> int:
    return len(api.app.state.guard.connections)


def test_a_client_that_never_reads_is_cut(start: Start) -> None:
    api = start(send_limit_s=0.3)
    with never_reading(api.port), connect(api):
        wait_until(lambda: num_connections(api) == 2, what="the connections")
        wait_until(lambda: num_connections(api) == 1, what="the end of one")


def wait_for_answer(process: "subprocess.Popen[bytes]", url: str) -> None:
    """Waits until a process answers at `url`."""

    def answers() -> bool:
        assert process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(url).status_code == 200
        return False

    wait_until(answers, what=url, timeout_s=60)


def test_sigterm_ends_an_api_that_uvicorn_started_whatever_its_clients_do() -> None:
    port = free_port()
    environment: dict[str, Any] = {"LORELAY_REDIS_URL": NO_REDIS, "LORELAY_API_DRAIN_S": "0.5"}
    command = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app", "--port", str(port)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, **environment}, stderr=subprocess.PIPE)
    try:
        wait_for_answer(process, f"http://127.0.0.1:{port}/health")
        with never_reading(port), socket.create_connection(("127.0.0.1", port)) as unfinished:
            unfinished.sendall(post(b"{", announced=100))
            too_long = socket.create_connection(("127.0.0.1", port))
            too_long.sendall(GET + b"a: " + b"x" * 100_000)
            with too_long:
                assert code(too_long) == "headers_too_large"
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=5 * (0.5 + connections.LAST_WORDS_S + 2))
        assert b"Finished server process" in log
        assert b"Traceback" not in log, log.decode()
    finally:
        process.kill()
        process.wait()

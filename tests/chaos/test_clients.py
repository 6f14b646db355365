"""Clients that leave, or read too slowly: what they hold is freed, and nobody else notices."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from api.relay.queue_client import NUM_CONNECTIONS
from shared.queue import keys
from tests.chaos.checker import Reference, check_complete, find_remains
from tests.chaos.cluster import BASE, Cluster
from tests.chaos.conftest import Measure
from tests.chaos.recorder import CHAT, Ask, Recorder, workload
from tests.chaos.stages import ASKS
from tests.integration.api_harness import running_api
from tests.waiting import wait_until

ABORT_LIMIT_S = 0.4
"""One step, slowed and in company, and 250 ms."""
BYSTANDERS = workload(8, tag="bystander")
LONG_PROMPT = "word " * 80


@contextlib.contextmanager
def client_of(url: str, ask: Ask, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    """A client that sent its request, and leaves at the end of the context without having read anything."""
    body = json.dumps(ask.body).encode()
    with socket.socket() as connection:
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        address = urlsplit(url)
        connection.connect((address.hostname, address.port))
        lines = (
            f"POST {CHAT} HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        head = "\r\n".join([*lines, "", ""]).encode()
        connection.sendall(head + body)
        yield connection


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "not streaming"])
@pytest.mark.parametrize("when", ["in prefill", "between tokens"])
def test_a_running_request_whose_client_leaves_is_gone_after_a_step(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure, when: str, stream: bool
) -> None:
    reference.prepare(BYSTANDERS)
    cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, BYSTANDERS)
    wait_until(lambda: run.num_started == len(BYSTANDERS), 30, "the bystanders")
    known = cluster.owned_ids()
    ask = Ask("tiny", LONG_PROMPT if when == "in prefill" else "hi", max_tokens=80, stream=stream)
    with client_of(cluster.api.url, ask):
        (request_id,) = wait_until(lambda: cluster.owned_ids() - known, what="the claim")
        if when == "between tokens":
            wait_until(lambda: cluster.connection.llen(keys.log(request_id)) > 5, what="some tokens")
        num_events = cluster.connection.llen(keys.log(request_id))
        assert (num_events == 0) == (when == "in prefill")
    left_at = time.monotonic()
    wait_until(lambda: not cluster.connection.exists(keys.owner(request_id)), what="the abort")
    measure("until it was gone", time.monotonic() - left_at, ABORT_LIMIT_S)
    assert cluster.connection.hget(f"rq:job:{request_id}", "status") == b"canceled"
    check_complete(run.wait(), reference)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "not streaming"])
def test_a_queued_request_whose_client_leaves_never_starts(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure, stream: bool
) -> None:
    reference.prepare(BYSTANDERS)
    cluster.ensure_workers(2)
    with cluster.suspended():
        with client_of(cluster.api.url, Ask("tiny", "hi", max_tokens=80, stream=stream)):
            (request_id,) = wait_until(cluster.queued_ids, what="the queued request")
        left_at = time.monotonic()
        wait_until(lambda: not cluster.queued_ids(), what="the abort")
        measure("until it was gone", time.monotonic() - left_at, ABORT_LIMIT_S)
    check_complete(recorder.start(cluster.api.url, BYSTANDERS).wait(), reference)
    job = cluster.connection.hgetall(f"rq:job:{request_id}")
    assert (job[b"status"], job.get(b"started_at", b"")) == (b"canceled", b"")
    assert not cluster.connection.exists(keys.log(request_id))


@pytest.mark.parametrize("num_clients", [60, pytest.param(500, marks=pytest.mark.long)])
def test_many_disconnects_in_a_row_leave_nothing_behind(
    cluster: Cluster, recorder: Recorder, reference: Reference, num_clients: int
) -> None:
    cluster.ensure_workers(2)
    connection = cluster.connection
    with running_api(cluster.server.url, redis_timeout_s=1, api_lease_s=1.5, result_ttl_s=6) as api:
        num_connections = len(connection.client_list())
        num_tasks = api.num_tasks
        asks = workload(num_clients, max_tokens=100, tag="leaving")
        for ask in asks:
            with client_of(api.url, ask):
                wait_until(lambda: api.relay.inboxes, what="the exchange")
        wait_until(lambda: not api.relay.inboxes, what="no inbox")
        wait_until(lambda: not find_remains(connection, BASE), what="no request")
        wait_until(lambda: api.num_tasks <= num_tasks, what="no task more than before")
        assert len(connection.client_list()) <= num_connections + NUM_CONNECTIONS
        check_complete(recorder.start(api.url, ASKS).wait(), reference)
        assert not api.relay.inboxes
    for worker in cluster.live_workers():
        worker.terminate()
        assert worker.process.wait() == 0
        assert "ended with 0 requests, 0 cache blocks in use" in worker.process.output


def test_a_client_that_does_not_read_harms_nobody_else_and_gets_all_when_it_does(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure
) -> None:
    cluster.ensure_workers(0)
    worker = cluster.start_worker(step_delay_s="0")
    ask = Ask("tiny", "slow", max_tokens=440)
    reference.prepare([ask])
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(client_of(cluster.api.url, ask, receive_bytes=1024)) for _ in range(4)]
        run = recorder.start(cluster.api.url, ASKS)
        check_complete(run.wait(), reference)
        measure("longest pause of the others", run.longest_pause_s(), 2.0)
        for connection in slow:
            assert read_text(connection) == reference.of(ask).text
    worker.kill()


def read_text(connection: socket.socket) -> str:
    """The body of a stream, read to its end at once."""
    with connection.makefile("rb") as file:
        lines = []
        while (line := file.readline().strip()) != b"data: [DONE]":
            lines.append(line)
    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")]
    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

"""Requests that outlive their connection: detach, resume at another API, abort on purpose."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import httpx_sse
import pytest
import redis

from shared.messages import FinishReason
from shared.queue import keys
from shared.queue.records import Claim
from tests.integration.api_harness import (
    CHAT,
    HELLO,
    ApiServer,
    ScriptedWorker,
    error_in,
    running_api,
)
from tests.redis_server import RedisServer
from tests.waiting import wait_until

KEYS = ("alice", "bob")


@pytest.fixture
def worker(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection)


@pytest.fixture
def apis(redis_server: RedisServer, worker: ScriptedWorker) -> Iterator[list[ApiServer]]:
    """Two APIs over one server, with keys."""
    with (
        running_api(redis_server.url, api_keys=KEYS, first_event_wait_s=0.05) as first,
        running_api(redis_server.url, api_keys=KEYS, first_event_wait_s=0.05) as second,
    ):
        yield [first, second]


def client_of(api: ApiServer, key: str = "alice") -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=api.url, headers=headers, timeout=30, trust_env=False)


@contextlib.contextmanager
def stream(client: httpx.Client, detach: bool = True) -> Iterator[Iterator[str]]:
    """The lines of a stream under way."""
    headers = {"X-Lorelay-Detach": "true"} if detach else {}
    with client.stream("POST", CHAT, json={**HELLO, "stream": True}, headers=headers) as response:
        yield response.iter_lines()


def read_until(lines: Iterator[str], text: str) -> str:
    """Reads up to the event whose data has `text`; its id."""
    event_id = ""
    for line in lines:
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        if text in line:
            return event_id
    raise AssertionError(f"the stream ended without {text!r}")


def begin(api: ApiServer, worker: ScriptedWorker) -> tuple[Claim, str]:
    """A detached request whose client left after its second token; its last event id."""
    with client_of(api) as client, stream(client) as lines:
        claim = worker.claim()
        worker.emit(claim, "one ", "two ")
        return claim, read_until(lines, "two ")


def resume(api: ApiServer, claim: Claim, last: str | None, key: str = "alice") -> httpx.Response:
    headers = {} if last is None else {"Last-Event-ID": last}
    with client_of(api, key) as client:
        return client.get(f"{CHAT}/{claim.held.request_id}/stream", headers=headers)


def test_a_detached_request_runs_on_and_is_resumed_at_another_api_after_the_last_event_seen(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    claim, last = begin(apis[0], worker)
    assert last == f"{claim.held.request_id}:1"
    wait_until(lambda: not apis[0].relay.inboxes, what="the end of the first exchange")
    assert not worker.is_aborted(claim)
    worker.emit(claim, "three ")
    worker.finish(claim, "four")
    answer = resume(apis[1], claim, last)
    assert answer.status_code == 200
    assert '"one ' not in answer.text
    assert '"two ' not in answer.text
    assert '"role"' not in answer.text
    assert answer.text.index("three ") < answer.text.index("four") < answer.text.index("[DONE]")
    assert re.findall("id: .*:([0-9])", answer.text) == ["1", "2", "3"]


def test_of_several_choices_a_resumed_stream_begins_those_that_the_client_has_not_seen(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    headers = {"X-Lorelay-Detach": "true"}
    with (
        client_of(apis[0]) as client,
        client.stream("POST", CHAT, json={**HELLO, "stream": True, "n": 3}, headers=headers) as response,
    ):
        claim = worker.claim()
        worker.emit(claim, "one ", index=1)
        last = read_until(response.iter_lines(), "one ")
    worker.emit(claim, "two ", index=1)
    for index in (0, 2):
        worker.emit(claim, "end", index=index)
    worker.finish(claim)
    answer = resume(apis[1], claim, last).text
    assert re.findall('"index":([0-9]+),"delta":{"role"', answer) == ["0", "2"]


def test_a_resumed_stream_goes_on_with_what_comes_later(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    claim, last = begin(apis[0], worker)
    headers = {"Last-Event-ID": last}
    path = f"{CHAT}/{claim.held.request_id}/stream"
    with client_of(apis[1]) as client, client.stream("GET", path, headers=headers) as response:
        wait_until(lambda: apis[1].relay.inboxes, what="the resumed exchange")
        worker.emit(claim, "three ")
        lines = response.iter_lines()
        assert read_until(lines, "three ") == f"{claim.held.request_id}:2"
        worker.finish(claim)
        read_until(lines, "[DONE]")


def test_without_a_last_event_a_resumed_stream_begins_at_the_beginning(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    claim, _ = begin(apis[0], worker)
    worker.finish(claim, "three")
    answer = resume(apis[0], claim, None)
    assert answer.text.index('"role"') < answer.text.index("one ") < answer.text.index("three")


def test_another_key_can_neither_resume_nor_abort_a_request(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    claim, last = begin(apis[0], worker)
    refused = resume(apis[0], claim, last, key="bob")
    assert (refused.status_code, error_in(refused)["code"]) == (404, "request_not_found")
    with client_of(apis[0], "bob") as client:
        assert client.delete(f"{CHAT}/{claim.held.request_id}").status_code == 404
    assert not worker.is_aborted(claim)
    worker.finish(claim)


def test_a_request_that_did_not_ask_for_it_is_aborted_when_its_client_leaves(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    with client_of(apis[0]) as client, stream(client, detach=False) as lines:
        claim = worker.claim()
        worker.emit(claim, "one ")
        assert read_until(lines, "one ") == ""
    wait_until(lambda: worker.is_aborted(claim), what="the abort")


def test_a_stream_resumed_before_its_old_connection_is_gone_gets_all_the_rest(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    with client_of(apis[0]) as client, stream(client) as old:
        claim = worker.claim()
        worker.emit(claim, "one ")
        last = read_until(old, "one ")
        path = f"{CHAT}/{claim.held.request_id}/stream"
        with client.stream("GET", path, headers={"Last-Event-ID": last}) as resumed:
            read_until(old, "resumed by another connection")
            worker.emit(claim, "two ")
            lines = resumed.iter_lines()
            read_until(lines, "two ")
            worker.finish(claim)
            read_until(lines, "[DONE]")


def test_a_request_read_again_after_its_end_is_kept_no_longer(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    claim, last = begin(apis[0], worker)
    worker.finish(claim, "three")
    key = keys.reader(claim.held.request_id)
    life_ms = worker.connection.pttl(key)
    assert "three" in resume(apis[1], claim, last).text
    assert 0 < worker.connection.pttl(key) <= life_ms


def test_a_stream_resumed_after_its_end_is_done_at_once(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    claim, _ = begin(apis[0], worker)
    worker.finish(claim)
    answer = resume(apis[1], claim, f"{claim.held.request_id}:2")
    assert (answer.status_code, answer.text) == (200, f"id: {claim.held.request_id}:2\ndata: [DONE]\n\n")


def test_a_resumed_stream_that_fails_at_once_leaves_its_reader_the_id_to_come_back_with(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    claim, last = begin(apis[0], worker)
    headers = {"Last-Event-ID": last}
    path = f"{CHAT}/{claim.held.request_id}/stream"
    with client_of(apis[1]) as client, httpx_sse.connect_sse(client, "GET", path, headers=headers) as source:
        worker.fail(claim, "adapter_error", "it broke")
        events = list(source.iter_sse())
    assert [event.id for event in events] == [last, last]
    assert [event.data for event in events][1:] == ["[DONE]"]


def test_a_request_that_is_not_detached_can_not_be_resumed(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    with client_of(apis[0]) as client, stream(client, detach=False) as lines:
        claim = worker.claim()
        refused = resume(apis[1], claim, None)
        assert (refused.status_code, error_in(refused)["code"]) == (400, "invalid_request_error")
        worker.finish(claim)
        read_until(lines, "[DONE]")


def test_a_parameter_of_the_url_that_is_wrong_is_named(apis: list[ApiServer], worker: ScriptedWorker) -> None:
    with client_of(apis[0]) as client:
        refused = client.get(f"{CHAT}/x/stream?include_usage=banana")
    assert (refused.status_code, error_in(refused)["param"]) == (400, "include_usage")


@pytest.mark.parametrize("last", ["x", "other:1", "{id}:", "{id}:-1", "{id}:9", "{id}:1000000000000"])
def test_a_malformed_last_event_id_is_refused_by_name(
    apis: list[ApiServer], worker: ScriptedWorker, last: str
) -> None:
    claim, _ = begin(apis[0], worker)
    refused = resume(apis[0], claim, last.format(id=claim.held.request_id))
    assert (refused.status_code, error_in(refused)["param"]) == (400, "Last-Event-ID")
    worker.finish(claim)


def test_a_malformed_detach_header_is_refused_by_name(apis: list[ApiServer]) -> None:
    with client_of(apis[0]) as client:
        refused = client.post(CHAT, json=HELLO, headers={"X-Lorelay-Detach": "perhaps"})
    assert (refused.status_code, error_in(refused)["param"]) == (400, "X-Lorelay-Detach")


def test_a_running_request_is_aborted_on_purpose_and_its_client_told(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    with client_of(apis[0]) as client, stream(client) as lines:
        claim = worker.claim()
        worker.emit(claim, "one ")
        read_until(lines, "one ")
        with client_of(apis[1]) as other:
            deleted = other.delete(f"{CHAT}/{claim.held.request_id}")
        assert deleted.json() == {
            "id": claim.held.request_id,
            "object": "chat.completion.deleted",
            "deleted": True,
        }
        assert worker.is_aborted(claim)
        worker.finish(claim, reason=FinishReason.ABORT)
        read_until(lines, '"error"')


def test_a_queued_request_aborted_on_purpose_never_runs_and_its_client_is_told(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with (
        running_api(redis_server.url, redis_timeout_s=0.5, first_event_wait_s=0.05) as api,
        client_of(api) as client,
        client_of(api) as other,
        stream(client) as lines,
    ):
        (key,) = wait_until(lambda: worker.connection.keys("rq:job:*"), what="the job")
        request_id = key.decode().removeprefix("rq:job:")
        assert other.delete(f"{CHAT}/{request_id}").status_code == 200
        assert worker.try_claim() is None
        # The client of an abort whose answer was lost may repeat it.
        assert other.delete(f"{CHAT}/{request_id}").status_code == 200
        read_until(lines, "generation_failed")


def test_a_request_that_vanished_from_redis_ends_with_an_error(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with (
        running_api(redis_server.url, redis_timeout_s=0.5, first_event_wait_s=0.05) as api,
        client_of(api) as client,
        stream(client, detach=False) as lines,
    ):
        claim = worker.claim()
        worker.emit(claim, "one ")
        read_until(lines, "one ")
        worker.connection.flushall()
        read_until(lines, "generation_failed")


def test_an_api_renews_its_lease_and_lets_it_run_out_when_it_ends(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with running_api(redis_server.url, api_lease_s=0.6):
        (key,) = wait_until(lambda: worker.connection.keys("lorelay:events:*"), what="the lease")
        worker.connection.delete(key)
        wait_until(lambda: worker.connection.exists(key), what="the renewed lease")
    wait_until(lambda: not worker.connection.exists(key), what="the end of the lease")


def test_a_request_is_resumed_with_the_next_key_of_its_client_and_with_no_key_of_another(
    redis_server: RedisServer, worker: ScriptedWorker, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("team-a:old team-b:other")
    with running_api(redis_server.url, api_keys_file=file, first_event_wait_s=0.05) as api:
        with client_of(api, "old") as client, stream(client) as lines:
            claim = worker.claim()
            worker.emit(claim, "one ", "two ")
            last = read_until(lines, "two ")
        worker.finish(claim, "three")
        assert claim.request.tenant == "team-a"
        file.write_text("team-a:new team-b:other")
        wait_until(lambda: resume(api, claim, last, "old").status_code == 401, what="the new keys")
        assert resume(api, claim, last, "other").status_code == 404
        assert "three" in resume(api, claim, last, "new").text


def test_a_request_that_the_release_before_stored_belongs_to_the_name_of_its_key(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with running_api(redis_server.url, api_keys=("alice",)) as old, client_of(old) as client:
        with stream(client) as lines:
            claim = worker.claim()
            worker.emit(claim, "one ")
            last = read_until(lines, "one ")
        worker.finish(claim, "two")
    stored = worker.connection.hget(f"rq:job:{claim.held.request_id}", "client")
    assert stored == hashlib.sha256(b"alice").hexdigest().encode()
    with running_api(redis_server.url, api_keys=("team-a:alice", "team-a:next", "team-b:other")) as api:
        assert resume(api, claim, last, "other").status_code == 404
        assert "two" in resume(api, claim, last, "next").text


def test_a_detached_request_that_its_client_has_to_correct_still_tells_the_reason_without_its_prompt(
    apis: list[ApiServer], worker: ScriptedWorker
) -> None:
    claim, last = begin(apis[0], worker)
    worker.fail(claim, "context_length_exceeded", "so it is", "messages")
    assert "so it is" in resume(apis[1], claim, last).text
    job = worker.connection.hgetall(f"rq:job:{claim.held.request_id}")
    assert b'"content"' not in job[b"request"] + job[b"outline"]

"""One exchange, with a relay and a client that do what the test says."""

import asyncio
import contextlib
import json
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from api import responses
from api.contract.answer import Heading
from api.contract.chat_answer import BodyWriter, ChunkWriter
from api.relay import event_source
from api.relay.inbox import Inbox
from api.relay.live_workers import LiveWorkers
from api.responses import GenerationCall, GenerationResponse
from shared.errors import (
    GenerationFailed,
    GenerationTimeout,
    LorelayError,
    NoWorker,
    QueueFull,
    QueueTimeout,
    QueueUnavailable,
    ServerDraining,
)
from shared.messages import FinishReason, GenerationRequest, SamplingParams, StreamEvent, Usage
from shared.settings import ApiSettings

END = StreamEvent(1, finish_reason=FinishReason.STOP, usage=Usage(1, 1))
Script = Callable[[Inbox], Awaitable[None]]


class FakeQueue:
    """The calls of `QueueClient` that an exchange makes, answered as the test says."""

    def __init__(self) -> None:
        self.exchange_limit_s = 1_000.0
        self.enqueue_error: Exception | None = None
        self.queue_states: list[str | Exception] = []
        self.live_worker: bool | Exception = True
        self.workers_seen: list[bool] = []

    async def enqueue(self, request: GenerationRequest, client: str, until: float) -> None:
        if self.enqueue_error is not None:
            raise self.enqueue_error

    async def abort_queued(self, request_id: str) -> str:
        state = self.queue_states.pop(0)
        if isinstance(state, Exception):
            raise state
        return state

    async def has_live_worker(self, request: GenerationRequest) -> bool:
        if self.workers_seen:
            self.live_worker = self.workers_seen.pop(0)
        if isinstance(self.live_worker, Exception):
            raise self.live_worker
        return self.live_worker


class FakeRelay:
    """A relay whose events come from the test."""

    def __init__(self) -> None:
        self.queue = FakeQueue()
        self.given_up: list[str] = []
        self.inbox: Inbox

    @contextlib.contextmanager
    def open_inbox(self, request_id: str) -> Iterator[Inbox]:
        self.inbox = Inbox(request_id, 100, 1_000, lambda: None)
        yield self.inbox
        self.inbox.close()

    def abort_soon(self, request_id: str) -> None:
        self.given_up.append(request_id)


class FakeClient:
    """The ASGI server's side: keeps what is sent, leaves when told to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.got_something = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)
        self.got_something.set()

    @property
    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def errors(self) -> list[str]:
        """The codes of the error events."""
        datas = [line.removeprefix("data: ") for line in self.body.split("\n") if '"error"' in line]
        return [json.loads(data)["error"]["code"] for data in datas]


@pytest.fixture
def relay() -> FakeRelay:
    return FakeRelay()


@pytest.fixture
async def client() -> FakeClient:
    return FakeClient()


def exchange(
    relay: FakeRelay,
    client: FakeClient,
    *,
    stream: bool = True,
    messages: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> "asyncio.Task[None]":
    """An exchange under way."""
    request = GenerationRequest("id", "m", "base", SamplingParams(), messages or [])
    heading = Heading(request.request_id, request.created, request.model)
    writer = ChunkWriter(heading, include_usage=False) if stream else BodyWriter(heading, request.n)
    call = GenerationCall(request, writer, client="", admit_until=0)
    response = GenerationResponse(relay, ApiSettings(**settings), call)  # type: ignore[arg-type]
    return asyncio.create_task(response({"type": "http"}, client.receive, client.send))


async def begun(relay: FakeRelay, client: FakeClient, **settings: Any) -> "asyncio.Task[None]":
    """A stream whose first token is out."""
    task = exchange(relay, client, **settings)
    await asyncio.sleep(0)
    relay.inbox.put(StreamEvent(0, text="a"))
    await client.got_something.wait()
    return task


class Message(dict[str, Any]):
    """A message of a chat to which a weak reference can point."""


@pytest.mark.parametrize("stream", [False, True])
async def test_an_open_response_keeps_no_prompt_once_the_request_is_in_the_queue(
    relay: FakeRelay, client: FakeClient, stream: bool
) -> None:
    message = Message(role="user", content="hi")
    reference = weakref.ref(message)
    task = exchange(relay, client, stream=stream, messages=[message])
    del message
    await asyncio.sleep(0)
    assert relay.inbox is not None
    assert reference() is None
    relay.inbox.put(StreamEvent(0, text="a"))
    relay.inbox.put(END)
    await task


async def test_a_request_that_ended_is_not_given_up(relay: FakeRelay, client: FakeClient) -> None:
    task = await begun(relay, client)
    relay.inbox.put(END)
    await task
    assert not relay.given_up
    assert client.body.endswith("data: [DONE]\n\n")
    assert [message.get("more_body", False) for message in client.sent[1:]][-1] is False


@pytest.mark.parametrize(
    ("error", "given_up"), [(QueueFull(), []), (ServerDraining(), []), (QueueUnavailable(), ["id"])]
)
async def test_a_request_that_may_stand_in_the_queue_all_the_same_is_given_up(
    relay: FakeRelay, client: FakeClient, error: LorelayError, given_up: list[str]
) -> None:
    relay.queue.enqueue_error = error
    with pytest.raises(type(error)):
        await exchange(relay, client)
    assert relay.given_up == given_up
    assert not client.sent


async def test_a_client_that_leaves_ends_the_exchange(relay: FakeRelay, client: FakeClient) -> None:
    task = await begun(relay, client)
    client.left.set()
    await task
    assert relay.given_up == ["id"]
    assert not client.errors


async def test_a_server_that_stops_tells_an_open_stream(relay: FakeRelay, client: FakeClient) -> None:
    task = await begun(relay, client)
    task.cancel()
    await task
    assert (client.errors, relay.given_up) == (["server_draining"], ["id"])
    assert client.body.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_stops_has_a_status_for_who_got_nothing_yet(
    relay: FakeRelay, client: FakeClient, stream: bool
) -> None:
    task = exchange(relay, client, stream=stream)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(ServerDraining):
        await task
    assert relay.given_up == ["id"]


async def test_a_client_that_does_not_read_does_not_hold_up_a_server_that_stops(
    relay: FakeRelay, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "LAST_WORDS_S", 0.01)
    task = await begun(relay, client)
    client.reads.clear()
    relay.inbox.put(StreamEvent(1, text="b"))
    await asyncio.sleep(0)
    task.cancel()
    await task
    assert relay.given_up == ["id"]


async def test_a_stream_that_outlives_its_log_ends(relay: FakeRelay, client: FakeClient) -> None:
    relay.queue.exchange_limit_s = 0.05
    await (await begun(relay, client))
    assert (client.errors, relay.given_up) == (["generation_timeout"], ["id"])


async def test_an_answer_that_outlives_its_log_has_a_status(relay: FakeRelay, client: FakeClient) -> None:
    relay.queue.exchange_limit_s = 0.01
    with pytest.raises(GenerationTimeout):
        await exchange(relay, client, stream=False)


async def test_an_unforeseen_exception_in_a_stream_is_an_error_event_and_logged(
    relay: FakeRelay, client: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    task = await begun(relay, client)
    relay.inbox.fail(ZeroDivisionError("a secret"))
    await task
    assert (client.errors, relay.given_up) == (["internal_error"], ["id"])
    assert "a secret" not in client.body
    assert any(record.exc_info for record in caplog.records)


async def test_an_unforeseen_exception_before_the_start_goes_to_the_handlers(
    relay: FakeRelay, client: FakeClient
) -> None:
    task = exchange(relay, client)
    await asyncio.sleep(0)
    relay.inbox.fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await task
    assert relay.given_up == ["id"]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
async def test_ends_that_have_no_place_in_http_are_errors(
    relay: FakeRelay, client: FakeClient, reason: FinishReason
) -> None:
    task = exchange(relay, client)
    await asyncio.sleep(0)
    relay.inbox.put(StreamEvent(0, finish_reason=reason, usage=Usage(1, 0)))
    with pytest.raises(GenerationFailed):
        await task
    assert not relay.given_up


async def test_text_and_an_error_that_come_together_are_both_told(
    relay: FakeRelay, client: FakeClient
) -> None:
    task = exchange(relay, client)
    await asyncio.sleep(0)
    relay.inbox.put(StreamEvent(0, text="a"))
    relay.inbox.put(StreamEvent(1, error=GenerationFailed().to_info()))
    await task
    assert '"content":"a"' in client.body
    assert client.errors == ["generation_failed"]


async def test_a_stream_that_pauses_gets_comments(
    relay: FakeRelay, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "KEEP_ALIVE_S", 0.01)
    task = await begun(relay, client)
    client.got_something.clear()
    await client.got_something.wait()
    relay.inbox.put(END)
    await task
    assert ": paused\n" in client.body
    assert ": paused\n\n" not in client.body


@pytest.mark.parametrize(
    ("live_worker", "cls"), [(True, QueueTimeout), (False, NoWorker), (QueueUnavailable(), QueueTimeout)]
)
async def test_the_queue_time_limit_is_checked_until_redis_answers(
    relay: FakeRelay,
    client: FakeClient,
    monkeypatch: pytest.MonkeyPatch,
    live_worker: bool | Exception,
    cls: type[QueueTimeout],
) -> None:
    monkeypatch.setattr(event_source, "RETRY_S", 0.01)
    relay.queue.queue_states = [QueueUnavailable(), QueueUnavailable(), "queued"]
    relay.queue.live_worker = live_worker
    with pytest.raises(QueueTimeout) as caught:
        await exchange(relay, client, queue_time_limit_s=0.01)
    assert type(caught.value) is cls
    assert not relay.queue.queue_states
    assert not relay.given_up


async def test_a_request_whose_model_no_live_worker_serves_waits_for_one_and_then_ends(
    relay: FakeRelay, client: FakeClient
) -> None:
    relay.queue.queue_states = ["queued"]
    relay.queue.live_worker = False
    with pytest.raises(NoWorker, match=r"none came within 0\.02 s"):
        await exchange(relay, client, no_worker_wait_s=0.02)
    assert not relay.queue.queue_states


async def test_a_worker_that_leaves_for_a_moment_does_not_end_requests(
    relay: FakeRelay, client: FakeClient
) -> None:
    relay.queue.workers_seen = [True, False, True, False, False]
    relay.queue.queue_states = ["queued"]
    with pytest.raises(NoWorker):
        await exchange(relay, client, no_worker_wait_s=0.02)
    assert not relay.queue.workers_seen


async def test_a_request_that_a_worker_claims_at_the_last_moment_goes_on(
    relay: FakeRelay, client: FakeClient
) -> None:
    relay.queue.queue_states = ["running"]
    relay.queue.live_worker = False
    task = exchange(relay, client, no_worker_wait_s=0.02)
    while relay.queue.queue_states:
        await asyncio.sleep(0)
    relay.inbox.put(StreamEvent(0, text="a"))
    relay.inbox.put(END)
    await task
    assert not client.errors


async def test_many_waiting_requests_ask_redis_for_live_workers_once() -> None:
    asked: list[str] = []

    async def ask(request: GenerationRequest) -> bool:
        asked.append(request.model)
        if request.model == "unknown":
            raise QueueUnavailable
        return request.model == "served"

    workers = LiveWorkers(ask, max_age_s=1_000)
    for model, answer in {"served": True, "unserved": False}.items():
        request = GenerationRequest("id", model, model, SamplingParams())
        assert await asyncio.gather(workers.serve(request), workers.serve(request)) == [answer] * 2
    for _ in range(2):
        with pytest.raises(QueueUnavailable):
            await workers.serve(GenerationRequest("id", "unknown", "unknown", SamplingParams()))
    assert asked == ["served", "unserved", "unknown"]


async def test_models_without_an_answer_of_redis_do_not_hold_up_others() -> None:
    hangs, asked = asyncio.Event(), []

    async def ask(request: GenerationRequest) -> bool:
        asked.append(request.model)
        if request.model == "hung":
            await hangs.wait()
        return True

    workers = LiveWorkers(ask, max_age_s=1_000)
    hung, other = (GenerationRequest("id", model, model, SamplingParams()) for model in ("hung", "other"))
    waiting = [asyncio.create_task(workers.serve(hung)) for _ in range(2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        assert await workers.serve(other)
    hangs.set()
    assert await asyncio.gather(*waiting) == [True, True]
    assert asked == ["hung", "other"]


@pytest.mark.parametrize("hangs_in", ["has_live_worker", "abort_queued"])
async def test_events_are_sent_while_redis_does_not_answer_a_check(
    relay: FakeRelay, client: FakeClient, monkeypatch: pytest.MonkeyPatch, hangs_in: str
) -> None:
    hangs = asyncio.Event()

    async def hang(_: object) -> None:
        hangs.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(relay.queue, hangs_in, hang)
    relay.queue.live_worker = False
    task = exchange(relay, client, no_worker_wait_s=0.02)
    await hangs.wait()
    relay.inbox.put(StreamEvent(0, text="a"))
    relay.inbox.put(END)
    async with asyncio.timeout(5):
        await task
    assert '"content":"a"' in client.body
    assert not client.errors


async def test_a_request_that_was_gone_for_a_moment_only_goes_on(
    relay: FakeRelay, client: FakeClient
) -> None:
    relay.queue.queue_states = ["gone"]
    task = exchange(relay, client, queue_time_limit_s=0.01)
    await asyncio.sleep(0)
    while relay.queue.queue_states:
        await asyncio.sleep(0)
    relay.inbox.put(StreamEvent(0, text="a"))
    relay.inbox.put(END)
    await task
    assert not client.errors


async def test_the_first_event_ends_the_queue_time_limit(relay: FakeRelay, client: FakeClient) -> None:
    task = await begun(relay, client, queue_time_limit_s=0.01)
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    relay.inbox.put(END)
    await task

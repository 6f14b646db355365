"""A real API on a real queue, and a worker that does what the test says."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import httpx
import redis
import uvicorn

from api.main import create_app
from api.relay.relay import Relay
from shared.messages import ErrorInfo, FinishReason, StreamEvent, Usage
from shared.model_cards import ModelCard
from shared.queue import registry
from shared.queue.names import queue_name
from shared.queue.records import Append, Claim
from shared.queue.worker_streams import WorkerStreams
from shared.settings import ApiSettings, RedisSettings
from tests.streams import claim as claim_from
from tests.waiting import wait_until

DEADLINE_S = 10.0
POLL_S = 0.01

BASE = ModelCard(
    name="base", base="base", source="/models/base", version="a" * 64, created=1, max_model_len=99
)
ADAPTER = ModelCard(
    name="org/pirate",
    base="base",
    source="/adapters/pirate",
    version="b" * 64,
    created=2,
    max_model_len=99,
    adapter_name="org/pirate",
)
QUEUES = [queue_name(card.base, card.adapter_name) for card in (BASE, ADAPTER)]
HELLO = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


async def eventually(condition: Callable[[], Any], what: str) -> Any:
    """`wait_until` that lets the event loop go on."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        await asyncio.sleep(POLL_S)
    return value


def decode_stream(body: str) -> list[str]:
    """The `data:` of each event; everything else in the body must be a comment."""
    lines = body.splitlines(keepends=True)
    blocks = "".join(line for line in lines if not line.startswith(":")).split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def error_in(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which must be nothing but OpenAI's envelope."""
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert error["message"]
    return dict(error)


class ApiServer:
    """The application under uvicorn, in a thread of this process."""

    def __init__(self, redis_url: str, **settings: Any) -> None:
        waits = {"queue_time_limit_s": 30, "no_worker_wait_s": 30, "generation_limit_s": 30}
        values = {"max_silence_s": 0.1, **waits, **settings}
        self.app = create_app(ApiSettings(**values), RedisSettings(redis_url=redis_url))
        config = uvicorn.Config(
            self.app,
            host="127.0.0.1",
            port=0,
            log_config=None,
            timeout_graceful_shutdown=1,
            http=self.app.state.guard.protocol,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="api")

    @property
    def url(self) -> str:
        """URL of the API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """The port it got."""
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    @property
    def relay(self) -> Relay:
        """The relay; it belongs to the server's thread."""
        relay = self.app.state.relay
        assert isinstance(relay, Relay)
        return relay

    @property
    def num_tasks(self) -> int:
        """Tasks of its event loop that are not done."""
        return len(asyncio.all_tasks(self._server.servers[0].get_loop()))

    def start(self) -> None:
        """Returns when it accepts connections."""
        self._thread.start()
        wait_until(lambda: self._server.started, what="uvicorn")

    def stop(self) -> None:
        """Stops it in the way in which SIGTERM does."""
        self._server.should_exit = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "uvicorn does not end"


@contextlib.contextmanager
def running_api(redis_url: str, **settings: Any) -> Iterator[ApiServer]:
    """An API for the time of the context."""
    server = ApiServer(redis_url, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def asking(api: ApiServer, **fields: Any) -> AsyncIterator["asyncio.Task[httpx.Response]"]:
    """A chat completion under way."""
    async with httpx.AsyncClient(base_url=api.url) as client:
        yield asyncio.create_task(client.post(CHAT, json={**HELLO, **fields}, timeout=30))


class ScriptedWorker:
    """The worker's end of the queue, driven by hand. Registers a base model and an adapter."""

    def __init__(
        self,
        connection: redis.Redis,
        cards: Sequence[ModelCard] = (BASE, ADAPTER),
        name: str = "scripted",
    ) -> None:
        self.connection = connection
        self._queues = [queue_name(card.base, card.adapter_name) for card in cards]
        self.streams = WorkerStreams(
            connection,
            base=cards[0].base,
            worker_name=name,
            lease_s=60,
            stream_ttl_s=60,
            result_ttl_s=60,
            failure_ttl_s=60,
        )
        self.streams.serve(dict.fromkeys(self._queues, ""))
        self._event_nos: dict[str, int] = {}
        registry.register(connection, cards)

    def report(self) -> None:
        """Tells that this worker lives and serves the base, as `rq worker` does."""
        self.connection.sadd(f"rq:workers:{queue_name(BASE.base, None)}", "rq:worker:scripted")
        self.streams.renew([])

    def try_claim(self) -> Claim | None:
        """The next request, if any waits."""
        claims = claim_from(self.streams)
        return claims[0] if claims else None

    def claim(self) -> Claim:
        """The next request, soon."""
        claimed = wait_until(self.try_claim, what="a request")
        assert isinstance(claimed, Claim)
        return claimed

    def emit(self, claim: Claim, *texts: str, **fields: Any) -> None:
        """One event for each text, each in a message of its own."""
        for text in texts:
            event_no = self._event_nos.get(claim.held.request_id, 0)
            self._event_nos[claim.held.request_id] = event_no + 1
            event = StreamEvent(event_no, token_ids=(event_no,), text=text, **fields)
            self.streams.append([claim.held], [Append(claim.held, event)])

    def finish(self, claim: Claim, text: str = "", reason: FinishReason = FinishReason.STOP) -> None:
        """The terminal event."""
        self.emit(claim, text, finish_reason=reason, usage=Usage(prompt_tokens=5, completion_tokens=7))

    def fail(self, claim: Claim, code: str, message: str, param: str | None = None) -> None:
        """The terminal event of a request that can't be served."""
        self.emit(claim, "", error=ErrorInfo(code=code, message=message, param=param))

    def is_aborted(self, claim: Claim) -> bool:
        """True if the API gave this running request up."""
        return claim.held.request_id in self.streams.append([claim.held], []).aborted

    def answering(self, *texts: str) -> contextlib.AbstractContextManager[list[Claim]]:
        """Answers every request with these texts and a last event; see `answering_with`."""
        last = {"finish_reason": FinishReason.STOP, "usage": Usage(prompt_tokens=5, completion_tokens=7)}
        return self.answering_with(*({"text": text} for text in texts), {"text": "", **last})

    @contextlib.contextmanager
    def answering_with(self, *events: dict[str, Any]) -> Iterator[list[Claim]]:
        """Answers every request with these events, in a thread, for the time of the context; its claims."""
        stop = threading.Event()
        claims: list[Claim] = []

        def work() -> None:
            while not stop.is_set():
                if (claim := self.try_claim()) is None:
                    stop.wait(POLL_S)
                    continue
                claims.append(claim)
                for event in events:
                    self.emit(claim, event["text"], **{k: v for k, v in event.items() if k != "text"})

        thread = threading.Thread(target=work, name="scripted worker")
        thread.start()
        try:
            yield claims
        finally:
            stop.set()
            thread.join()

"""Clients that record every chunk with its time."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import redis

from shared.messages import StreamEvent, decode_event
from shared.queue import keys

CHAT = "/v1/chat/completions"
READ_LIMIT_S = 90
LOG_WAIT_S = 6
MODELS = ("tiny", "a", "b")


@dataclass(frozen=True)
class Ask:
    """One request as a client sends it."""

    model: str
    prompt: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: str | None = None
    stream: bool = True

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": 0.95,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": self.stream,
        }
        return body | ({"stop": self.stop} if self.stop else {})


def workload(num_requests: int = 32, max_tokens: int = 40, tag: str = "") -> list[Ask]:
    """Requests of different prompts and lengths of prompt: base and adapters, greedy and sampled.

    Every fourth one has a stop string whose beginning often occurs, so that text is held back.
    """
    return [
        Ask(
            model=MODELS[i % len(MODELS)],
            prompt=f"{tag}{i}: " + "tell me more " * (i % 5),
            max_tokens=max_tokens,
            temperature=0.9 * (i % 2),
            seed=i,
            stop="the end" if i % 4 == 1 else None,
        )
        for i in range(num_requests)
    ]


@dataclass(eq=False)
class Answer:
    """The answer as one client saw it."""

    ask: Ask
    sent_at: float = field(default_factory=time.monotonic)
    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    request_id: str = ""
    chunks: list[tuple[float, str]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    num_done: int = 0
    failure: str = ""
    """The error with which the connection broke, or empty."""
    ended_at: float = 0.0
    log: list[StreamEvent] | None = None
    """The token log at the end; None if Redis no longer has it."""

    @property
    def text(self) -> str:
        """All text, in the order in which it came."""
        return "".join(text for _, text in self.chunks)

    @property
    def num_ends(self) -> int:
        """The number of times that the client was told of the end; must be 1."""
        return len(self.finish_reasons) + len(self.errors)

    @property
    def is_complete(self) -> bool:
        """True if the answer ended without an error, as far as the client can see."""
        return self.status == 200 and not self.errors and not self.failure and self.num_ends == 1

    @property
    def error_code(self) -> str | None:
        """The code of the error that the client got, or None."""
        return self.errors[0]["code"] if self.errors else None

    def longest_pause_s(self, since: float = 0.0) -> float:
        """The longest time without a chunk, between `since` (by default the sending) and the end."""
        times = [max(since, self.sent_at)]
        times += [at for at, _ in self.chunks if at > times[0]] + [max(self.ended_at, times[0])]
        return max(later - earlier for earlier, later in itertools.pairwise(times))


class Run:
    """Requests that are on their way."""

    def __init__(
        self, answers: list[Answer], futures: list["Future[None]"], pool: ThreadPoolExecutor
    ) -> None:
        self.answers = answers
        self._futures = futures
        self._pool = pool

    @property
    def request_ids(self) -> list[str]:
        """Ids of the requests whose clients got their headers."""
        return [answer.request_id for answer in self.answers if answer.request_id]

    @property
    def num_started(self) -> int:
        """Number of requests whose clients have seen text."""
        return sum(bool(answer.chunks) for answer in self.answers)

    @property
    def num_ended(self) -> int:
        """Number of requests that are over."""
        return sum(bool(answer.ended_at) for answer in self.answers)

    def longest_pause_s(self, since: float = 0.0) -> float:
        """The longest time without a chunk at any client, from `since` on."""
        return max(answer.longest_pause_s(since) for answer in self.answers)

    def wait(self, timeout_s: float = READ_LIMIT_S) -> list[Answer]:
        """All answers, when all are over.

        Raises:
            TimeoutError: a request is not over in time.
        """
        deadline = time.monotonic() + timeout_s
        for future in self._futures:
            future.result(max(0.0, deadline - time.monotonic()))
        self._pool.shutdown()
        return self.answers


class Load:
    """Clients that send one request after the other, each as soon as its last one is over."""

    def __init__(
        self,
        recorder: "Recorder",
        api_url: str,
        asks: Iterable[Ask],
        num_clients: int,
        on_end: Callable[[Answer], None],
    ) -> None:
        self._recorder = recorder
        self._api_url = api_url
        self._asks = itertools.cycle(asks)
        self._on_end = on_end
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(num_clients, thread_name_prefix="client")
        self.answers: list[Answer] = []
        """Answers that are over, in the order in which they ended."""
        self.open_answers: list[Answer] = []
        """Answers that are under way."""
        self._futures = [self._pool.submit(self._work) for _ in range(num_clients)]

    def stop(self, timeout_s: float = READ_LIMIT_S) -> list[Answer]:
        """All answers, when the last requests are over.

        Raises:
            TimeoutError: a request is not over in time.
        """
        self._stopped.set()
        deadline = time.monotonic() + timeout_s
        for future in self._futures:
            future.result(max(0.0, deadline - time.monotonic()))
        self._pool.shutdown()
        return self.answers

    def _work(self) -> None:
        while not self._stopped.is_set():
            with self._lock:
                answer = Answer(next(self._asks))
                self.open_answers.append(answer)
            self._recorder.record(self._api_url, answer)
            self._on_end(answer)
            with self._lock:
                self.open_answers.remove(answer)
                self.answers.append(answer)


class Recorder:
    """Sends requests to APIs and records their answers. A `with` statement closes it at the end."""

    def __init__(self, redis_url: str, *, api_key: str = "none") -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.Client(timeout=READ_LIMIT_S, trust_env=False, limits=limits, headers=headers)
        self._redis = redis.Redis.from_url(redis_url)

    def start(self, api_url: str, asks: Sequence[Ask]) -> Run:
        """Sends requests at once, each from a thread of its own."""
        return self.start_answers(api_url, [Answer(ask) for ask in asks])

    def start_answers(self, api_url: str, answers: list[Answer]) -> Run:
        """Sends the requests of these answers at once, each from a thread of its own."""
        pool = ThreadPoolExecutor(len(answers), thread_name_prefix="client")
        return Run(answers, [pool.submit(self.record, api_url, answer) for answer in answers], pool)

    def keep_busy(
        self,
        api_url: str,
        asks: Iterable[Ask],
        num_clients: int,
        on_end: Callable[[Answer], None] = lambda answer: None,
    ) -> Load:
        """Sends these requests again and again, `num_clients` at a time; `on_end` gets each ended answer."""
        return Load(self, api_url, asks, num_clients, on_end)

    def record(self, api_url: str, answer: Answer) -> None:
        """Runs one exchange, from sending to end."""
        answer.sent_at = time.monotonic()
        self.exchange(api_url, answer)
        answer.ended_at = time.monotonic()
        answer.log = self.read_log(answer.request_id)

    def exchange(self, api_url: str, answer: Answer) -> None:
        """Sends one request and records its answer."""
        try:
            with self._client.stream("POST", f"{api_url}{CHAT}", json=answer.ask.body) as response:
                answer.status, answer.headers = response.status_code, response.headers
                answer.request_id = response.headers.get("x-request-id", "")
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    for line in response.iter_lines():
                        _read_line(answer, line)
                else:
                    _read_body(answer, json.loads(response.read()))
        except httpx.HTTPError as error:
            answer.failure = repr(error)

    def read_log(self, request_id: str) -> list[StreamEvent] | None:
        """Reads a request's log; retries while the server is away, since the log lives on for a while."""
        deadline = time.monotonic() + LOG_WAIT_S
        while True:
            try:
                entries = self._redis.lrange(keys.log(request_id), 0, -1)
                return [decode_event(entry) for entry in entries] or None
            except msgspec.DecodeError:
                return None
            except redis.RedisError:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.05)

    def close(self) -> None:
        """Closes its connections; call it when nothing is on its way."""
        self._client.close()
        self._redis.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_line(answer: Answer, line: str) -> None:
    """One line of a stream of server-sent events."""
    if not line.startswith("data: "):
        return
    data = line.removeprefix("data: ")
    if data == "[DONE]":
        answer.num_done += 1
        return
    note_chunk(answer, json.loads(data))


def note_chunk(answer: Answer, chunk: dict[str, Any]) -> None:
    """Records an event that is JSON: a chunk or an error."""
    if "error" in chunk:
        answer.errors.append(chunk["error"])
        return
    for choice in chunk["choices"]:
        if text := choice["delta"].get("content"):
            answer.chunks.append((time.monotonic(), text))
        if choice["finish_reason"]:
            answer.finish_reasons.append(choice["finish_reason"])


def _read_body(answer: Answer, body: dict[str, Any]) -> None:
    """Records a whole answer, or an error with a status of its own."""
    if "error" in body:
        answer.errors.append(body["error"])
        return
    for choice in body["choices"]:
        answer.chunks.append((time.monotonic(), choice["message"]["content"]))
        answer.finish_reasons.append(choice["finish_reason"])

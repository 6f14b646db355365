"""The worker's control path on a real server: I/O thread, engine loop and heartbeat, with a fake model."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
import redis
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from shared.errors import InvalidRequest
from shared.messages import FinishReason, GenerationRequest, SamplingParams, StreamEvent, decode_event
from shared.queue import keys
from shared.queue.records import Append, Claim, Held
from shared.queue.worker_streams import NUM_EVENTS_TO_CLEAR, WorkerStreams
from shared.settings import WorkerSettings
from tests.fakes import FakeModel, build_engine, letters
from tests.redis_server import RedisServer
from tests.streams import BASE, BlockingApi, claim, last, make_consumer, make_request, token, worker_streams
from tests.waiting import wait_until
from worker.engine import capacity
from worker.engine.sequence import Batch, OutOfDeviceMemory, Sampled, Sequence
from worker.serving.consumer import MAX_NUM_UNSENT_STEPS, Consumer, HeldRequests
from worker.serving.engine_loop import EngineLoop
from worker.serving.heartbeat import Heartbeat
from worker.serving.prompt_encoder import LONG_PROMPT_CHARS, Encode


def enqueue_long(api: BlockingApi, tenant: str) -> str:
    content = "x" * (LONG_PROMPT_CHARS + 1)
    return api.enqueue(make_request("a", tenant=tenant, messages=[{"role": "user", "content": content}]))


def held_ids(held: HeldRequests) -> set[str]:
    return {entry.request_id for entry in held.snapshot()}


@pytest.mark.parametrize("tenant", ["bob", "alice", ""])
def test_long_prompts_that_are_not_encoded_leave_places_for_short_ones(
    connection: redis.Redis, api: BlockingApi, tenant: str
) -> None:
    long_ones = [enqueue_long(api, "alice") for _ in range(10)]
    held = HeldRequests()
    consumer = make_consumer(worker_streams(connection), held, encode=not_at_all)
    consumer.turn()
    assert held_ids(held) == set(long_ones[:2]), "a quarter of eight places"
    short = [api.enqueue(make_request("a", tenant=tenant)) for _ in range(3)]
    consumer.turn()
    assert held_ids(held) == {*long_ones[:2], *short}


def test_a_worker_that_may_claim_no_long_prompt_and_found_nothing_looks_again_after_a_pause(
    connection: redis.Redis, api: BlockingApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_ones = [enqueue_long(api, "alice") for _ in range(5)]
    held, now_s, looks = HeldRequests(), [0.0], []
    consumer = make_consumer(
        worker_streams(connection), held, encode=not_at_all, poll_s=0.001, clock=lambda: now_s[0]
    )
    look = WorkerStreams.look

    def counted(*args: Any, **options: Any) -> Any:
        looks.append(now_s[0])
        return look(*args, **options)

    monkeypatch.setattr(WorkerStreams, "look", counted)
    for now_s[0] in (0.0, 1.0, 1.0, 1.19):
        consumer.turn()
    assert looks == [0.0, 1.0]
    short = api.enqueue(make_request("a"))
    for now_s[0] in (1.19, 1.21):
        consumer.turn()
    assert looks == [0.0, 1.0, 1.21]
    assert held_ids(held) == {*long_ones[:2], short}
    consumer.turn()
    assert len(looks) == 4
    encoder = threading.Thread(target=consumer.threads["long prompts"], daemon=True)
    encoder.start()
    wait_until(lambda: consumer.turn() or long_ones[2] in held_ids(held), what="a claim in the pause")
    consumer.stop()
    encoder.join(10)
    assert not encoder.is_alive()


def test_the_next_long_prompt_is_claimed_when_one_is_encoded(
    connection: redis.Redis, api: BlockingApi
) -> None:
    long_ones = [enqueue_long(api, "alice") for _ in range(4)]
    held = HeldRequests()

    def encode(request: GenerationRequest) -> list[list[int]]:
        if request.request_id == long_ones[1]:
            consumer.stop()
        raise InvalidRequest("no")

    consumer = make_consumer(worker_streams(connection), held, encode=encode)
    consumer.turn()
    consumer.threads["long prompts"]()
    held.remove(long_ones[:2])
    again = make_consumer(worker_streams(connection, "w2"), held, encode=not_at_all)
    again.turn()
    assert held_ids(held) == set(long_ones[2:])


def not_at_all(request: GenerationRequest) -> list[list[int]]:
    """Stands for the encoder of a consumer whose claims go to no engine."""
    raise InvalidRequest("not at all")


class SlowRunner(FakeModel):
    """Waits for a permit before each step, so that a test decides how far a generation gets."""

    def __init__(self, next_token: Callable[[Sequence], int | None] | None = None) -> None:
        super().__init__(next_token, max_model_len=512)
        self.permits = threading.Semaphore(0)

    def run(self, batch: Batch) -> list[Sampled]:
        self.permits.acquire()
        return super().run(batch)


class ThreadedWorker:
    """The parts of a LoraWorker, in threads of this process."""

    def __init__(
        self,
        url: str,
        runner: FakeModel,
        *,
        max_num_sequences: int = 8,
        drain_s: float = 30,
        encode: Encode | None = None,
    ) -> None:
        self.name = f"w-{uuid4().hex}"
        self.held = HeldRequests()
        engine = build_engine(runner, max_batch_size=max_num_sequences, max_prefill_tokens=64)
        self.connection = redis.Redis.from_url(url, socket_timeout=5)
        self.consumer = make_consumer(
            worker_streams(self.connection, self.name),
            self.held,
            capacity=lambda: engine.max_num_sequences,
            poll_s=0.02,
            encode=encode or engine.encode,
        )
        self.loop = EngineLoop(engine, self.consumer, self.held, drain_s=drain_s)
        self._threads = [
            threading.Thread(target=run, daemon=True)
            for run in (self.loop.run, *self.consumer.threads.values())
        ]

    def start(self) -> "ThreadedWorker":
        for thread in self._threads:
            thread.start()
        return self

    def join_loop(self) -> None:
        self._threads[0].join(10)
        assert not self._threads[0].is_alive()

    def join_consumer(self) -> None:
        for thread in self._threads[1:]:
            thread.join(10)
            assert not thread.is_alive()

    def close(self) -> None:
        self.loop.drain()
        self.loop.drain()
        self.consumer.stop()
        self.join_consumer()
        self.join_loop()
        self.connection.close()


@pytest.fixture
def api(redis_server: RedisServer, connection: redis.Redis) -> BlockingApi:
    return BlockingApi(redis_server.url)


@pytest.fixture
def start_worker(redis_server: RedisServer) -> Iterator[Callable[..., ThreadedWorker]]:
    workers: list[tuple[ThreadedWorker, FakeModel]] = []

    def start(runner: FakeModel | None = None, **options: object) -> ThreadedWorker:
        runner = runner or FakeModel(max_model_len=512)
        worker = ThreadedWorker(redis_server.url, runner, **options).start()
        workers.append((worker, runner))
        return worker

    yield start
    for worker, runner in workers:
        if isinstance(runner, SlowRunner):
            runner.permits.release(10_000)
        worker.close()


def log_of(connection: redis.Redis, request_id: str) -> list[StreamEvent]:
    return [decode_event(entry) for entry in connection.lrange(keys.log(request_id), 0, -1)]


def finished_log(connection: redis.Redis, request_id: str) -> list[StreamEvent]:
    def ended() -> list[StreamEvent]:
        events = log_of(connection, request_id)
        return events if events and events[-1].is_terminal else []

    return wait_until(ended, what=f"the end of {request_id}")


def request_of(num_tokens: int, adapter_name: str | None = None) -> object:
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
    messages = [{"role": "user", "content": "hello"}]
    return make_request(adapter_name, sampling=sampling, messages=messages)


def expected_text(num_tokens: int, adapter_name: str | None = None) -> str:
    prompt = [ord(character) for character in "hello"]
    seq = Sequence("r", 0, adapter_name, SamplingParams(), prompt, len(prompt), num_tokens)
    for _ in range(num_tokens):
        seq.token_ids.append(letters(seq))
    return "".join(map(chr, seq.output_token_ids))


def text_of(events: list[StreamEvent]) -> str:
    assert [event.event_no for event in events] == list(range(len(events)))
    return "".join(event.text for event in events)


def test_every_request_is_answered_once_by_one_of_two_workers(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    adapters = [None, "a", "b"]
    ids = {api.enqueue(request_of(20, adapters[i % 3])): adapters[i % 3] for i in range(24)}
    workers = [start_worker(), start_worker()]
    for request_id, adapter_name in ids.items():
        assert text_of(finished_log(connection, request_id)) == expected_text(20, adapter_name)
    wait_until(lambda: not any(worker.held for worker in workers))
    assert sum(worker.consumer.num_claimed for worker in workers) == 24
    assert connection.zcard(keys.leases(BASE)) == 0


def test_a_worker_claims_no_more_than_its_engine_has_room_for(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    ids = [api.enqueue(request_of(3)) for _ in range(5)]
    runner = SlowRunner()
    worker = start_worker(runner, max_num_sequences=2)
    wait_until(lambda: len(worker.held) == 2)
    runner.permits.release(1)
    wait_until(lambda: connection.llen(keys.log(ids[1])) == 1)
    assert connection.llen(f"rq:queue:{BASE}") == 3
    runner.permits.release(1000)
    for request_id in ids:
        finished_log(connection, request_id)


def test_a_request_aborted_while_it_runs_leaves_the_batch(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    runner = SlowRunner()
    start_worker(runner)
    gone, kept = (api.enqueue(request_of(200)) for _ in range(2))

    def both_run() -> bool:
        runner.permits.release(1)
        return bool(log_of(connection, gone) and log_of(connection, kept))

    def is_aborted() -> bool:
        runner.permits.release(1)
        return log_of(connection, gone)[-1].finish_reason is FinishReason.ABORT

    wait_until(both_run)
    api.abort(gone)
    wait_until(is_aborted)
    runner.permits.release(10_000)
    assert text_of(finished_log(connection, kept)) == expected_text(200)
    assert len(log_of(connection, gone)) < 200


def test_a_draining_worker_finishes_what_runs_and_claims_nothing_new(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    runner = SlowRunner()
    worker = start_worker(runner)
    running = api.enqueue(request_of(10))
    wait_until(lambda: len(worker.held) == 1)
    worker.loop.drain()
    late = api.enqueue(request_of(3))
    runner.permits.release(1000)
    worker.join_loop()
    assert text_of(finished_log(connection, running)) == expected_text(10)
    assert log_of(connection, late) == []
    assert worker.consumer.hand_back() == 0


def test_what_a_hurried_drain_leaves_goes_on_at_another_worker_without_a_gap(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    runner = SlowRunner()
    worker = start_worker(runner)
    request_id = api.enqueue(request_of(30, "a"))
    runner.permits.release(10)
    wait_until(lambda: len(log_of(connection, request_id)) >= 5)
    worker.loop.drain()
    worker.loop.drain()
    runner.permits.release(1)
    worker.join_loop()
    worker.close()
    assert worker.consumer.hand_back() == 1
    start_worker()
    assert text_of(finished_log(connection, request_id)) == expected_text(30, "a")


def test_a_request_of_many_sequences_is_one_job_that_goes_on_at_another_worker(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    runner = SlowRunner()
    worker = start_worker(runner)
    request = make_request(
        messages=[],
        prompts=("hello", tuple(b"good bye, all")),
        n=2,
        sampling=SamplingParams(temperature=0, max_tokens=30),
    )
    request_id = api.enqueue(request)
    runner.permits.release(10)
    wait_until(lambda: len(log_of(connection, request_id)) >= 20)
    worker.loop.drain()
    worker.loop.drain()
    runner.permits.release(1)
    worker.join_loop()
    worker.close()
    assert worker.consumer.hand_back() == 1
    start_worker()
    events = finished_log(connection, request_id)
    assert [event.event_no for event in events] == list(range(4 * 30))
    for index in (0, 1):
        own = [event for event in events if event.index == index]
        assert "".join(event.text for event in own) == expected_text(30)
    assert sum(event.is_terminal for event in events) == 1
    assert events[-1].usage.completion_tokens == 4 * 30
    assert Job.fetch(request_id, connection, JSONSerializer).meta["completion_tokens"] == 4 * 30


def test_events_wait_while_the_connection_is_down_and_arrive_once(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    runner = SlowRunner()
    start_worker(runner)
    request_id = api.enqueue(request_of(50))
    for _ in range(5):
        runner.permits.release(10)
        wait_until(lambda: log_of(connection, request_id))
        connection.client_kill_filter(_type="normal", skipme=True)
    runner.permits.release(1000)
    assert text_of(finished_log(connection, request_id)) == expected_text(50)


def test_a_worker_outlives_a_redis_that_is_out_of_memory(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    runner = SlowRunner()
    worker = start_worker(runner)
    request_id = api.enqueue(request_of(50))
    runner.permits.release(5)
    wait_until(lambda: log_of(connection, request_id))
    connection.config_set("maxmemory", 1)
    runner.permits.release(5)
    wait_until(lambda: worker.consumer._unsent, what="an append that was refused")
    connection.config_set("maxmemory", 0)
    runner.permits.release(1000)
    assert text_of(finished_log(connection, request_id)) == expected_text(50)


def test_a_request_that_moved_on_is_dropped_and_its_events_are_not_written(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    runner = SlowRunner()
    worker = start_worker(runner)
    request_id = api.enqueue(request_of(100))
    runner.permits.release(2)
    wait_until(lambda: len(log_of(connection, request_id)) == 2)
    worker.consumer.drain()
    worker_streams(connection, worker.name).hand_back(worker.held.snapshot())
    thief = worker_streams(connection, "thief")
    (stolen,) = claim(thief)
    runner.permits.release(2)
    wait_until(lambda: not worker.held)
    assert len(log_of(connection, request_id)) == 2
    thief.append([stolen.held], [last(stolen, 2)])


def test_the_engine_pauses_while_too_many_steps_are_unsent(redis_server: RedisServer) -> None:
    worker = ThreadedWorker(redis_server.url, FakeModel())
    consumer = worker.consumer
    for _ in range(MAX_NUM_UNSENT_STEPS):
        consumer.outbox.put_nowait([])
    putting = threading.Thread(target=worker.loop._put, args=([],), daemon=True)
    putting.start()
    putting.join(0.2)
    assert putting.is_alive()
    consumer.outbox.get_nowait()
    putting.join(10)
    assert not putting.is_alive()
    worker.connection.close()


def make_heartbeat(
    streams: WorkerStreams, consumer: Consumer, now_s: list[float], **served: str
) -> Heartbeat:
    """A heartbeat whose clock shows `now_s[0]`."""
    return Heartbeat(
        streams,
        HeldRequests(),
        consumer,
        WorkerSettings.load(model="m", lease_s=4, heartbeat_s=1, reap_s=0.5),
        served=lambda: served,
        on_beat=lambda: None,
        watch_engine=lambda: None,
        clock=lambda: now_s[0],
    )


def test_a_heartbeat_tells_what_its_worker_serves_until_it_drains(connection: redis.Redis) -> None:
    streams = worker_streams(connection, "w1")
    consumer = make_consumer(streams, HeldRequests(), encode=not_at_all, capacity=lambda: 8, poll_s=0.02)
    now_s = [0.0]
    heartbeat = make_heartbeat(streams, consumer, now_s, tiny="m1")
    heartbeat.turn()
    served = keys.served("w1")
    assert connection.hgetall(served) == {b"tiny": b"m1", b"": b""}
    connection.delete(served)
    now_s[0] = 1.0
    heartbeat.turn()
    assert connection.hget(served, "tiny") == b"m1"
    connection.hset(served, mapping={"tiny": "garbage", "other": "garbage"})
    now_s[0] = 6.0
    heartbeat.turn()
    assert connection.hgetall(served) == {b"tiny": b"m1", b"": b""}
    consumer.drain()
    now_s[0] = 7.0
    heartbeat.turn()
    assert connection.hgetall(served) == {b"": b""}


def test_a_heartbeat_ends_requests_for_weights_that_nobody_has_after_a_beat_of_its_own(
    connection: redis.Redis, api: BlockingApi
) -> None:
    streams = worker_streams(connection, "w1")
    consumer = make_consumer(streams, HeldRequests(), encode=not_at_all, capacity=lambda: 8, poll_s=0.02)
    now_s = [0.0]
    heartbeat = make_heartbeat(streams, consumer, now_s, tiny="m2")
    request_id = api.enqueue(make_request(base_version="m1"))
    for now_s[0] in (0.0, 0.5):
        heartbeat.turn()
    assert connection.llen(keys.log(request_id)) == 0
    now_s[0] = 1.0
    heartbeat.turn()
    assert decode_event(connection.lindex(keys.log(request_id), -1)).error.code == "adapter_version_gone"


def test_a_heartbeat_keeps_leases_and_reaps_only_after_a_lease_of_its_own(
    connection: redis.Redis, api: BlockingApi
) -> None:
    orphan = api.enqueue(make_request())
    (dead,) = claim(worker_streams(connection, "dead", lease_s=0.001))
    mine = api.enqueue(make_request())
    (claimed,) = claim(worker_streams(connection, "alive"))
    held = HeldRequests()
    held.add(claimed)
    now_s, beats = [0.0], []
    streams = worker_streams(connection, "alive")
    heartbeat = Heartbeat(
        streams,
        held,
        make_consumer(streams, held, encode=not_at_all, capacity=lambda: 8, poll_s=0.02),
        WorkerSettings.load(model="m", lease_s=4, heartbeat_s=1, reap_s=0.5),
        served=lambda: {BASE: ""},
        on_beat=lambda: beats.append(now_s[0]),
        watch_engine=lambda: None,
        clock=lambda: now_s[0],
    )
    queue_key = f"rq:queue:{BASE}"
    wait_until(lambda: connection.zscore(keys.leases(BASE), orphan) < time.time() * 1000)
    for now_s[0] in (0.0, 0.5, 1.0, 3.9):
        heartbeat.turn()
    assert beats == [0.0, 1.0, 3.9]
    assert connection.llen(queue_key) == 0
    now_s[0] = 4.0
    heartbeat.turn()
    assert connection.lrange(queue_key, 0, -1) == [orphan.encode()]
    assert connection.zscore(keys.leases(BASE), mine) is not None
    assert connection.zscore(keys.workers(BASE), "alive") > time.time() * 1000
    assert worker_streams(connection, "dead").append([dead.held], [token(dead, 0)]).lost == [orphan]


def test_a_request_refused_by_the_engine_ends_with_its_error(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    request_id = api.enqueue(make_request("not-loaded"))
    worker = start_worker()
    (event,) = finished_log(connection, request_id)
    assert event.error.code == "adapter_error"
    wait_until(lambda: not worker.held)


class CrampedRunner(FakeModel):
    """Has memory for two sequences, until it failed so many times."""

    num_failures_left = 1_000

    def run(self, batch: Batch) -> list[Sampled]:
        if len(batch) > 2 and self.num_failures_left:
            self.num_failures_left -= 1
            raise OutOfDeviceMemory(f"{len(batch)} sequences")
        return super().run(batch)


def test_requests_that_do_not_fit_into_memory_together_run_one_after_another(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    ids = [api.enqueue(request_of(20)) for _ in range(6)]
    worker = start_worker(CrampedRunner(max_model_len=512))
    for request_id in ids:
        assert text_of(finished_log(connection, request_id)) == expected_text(20)
    assert worker.consumer.num_claimed > 6


def test_a_worker_holds_as_many_as_before_some_time_after_it_was_out_of_memory(
    connection: redis.Redis,
    api: BlockingApi,
    start_worker: Callable[..., ThreadedWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capacity, "NUM_STEPS_TO_GROW", 5)
    runner = CrampedRunner(max_model_len=512)
    runner.num_failures_left = 2
    ids = [api.enqueue(request_of(200)) for _ in range(4)]
    start_worker(runner, max_num_sequences=4)
    for request_id in ids:
        assert text_of(finished_log(connection, request_id)) == expected_text(200)
    assert runner.num_failures_left == 0
    assert max(map(len, runner.batches)) == 4


def test_a_request_shed_while_the_connection_breaks_goes_back_to_its_queue_all_the_same(
    connection: redis.Redis,
    api: BlockingApi,
    start_worker: Callable[..., ThreadedWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hand_back, errors = WorkerStreams.hand_back, [redis.ConnectionError("broke once")]

    def breaks_once(self: WorkerStreams, held: list[Held]) -> int:
        if errors:
            raise errors.pop()
        return hand_back(self, held)

    monkeypatch.setattr(WorkerStreams, "hand_back", breaks_once)
    ids = [api.enqueue(request_of(20)) for _ in range(3)]
    start_worker(CrampedRunner(max_model_len=512))
    for request_id in ids:
        assert text_of(finished_log(connection, request_id)) == expected_text(20)
    assert not errors


def test_the_steps_of_a_request_near_crashes_run_alone_until_it_is_cleared(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    runner = SlowRunner()
    worker = start_worker(runner)
    before = api.enqueue(request_of(100, "b"))
    runner.permits.release(5)
    wait_until(lambda: len(log_of(connection, before)) == 5)
    suspend(connection)
    suspect = api.enqueue(request_of(400))
    connection.hset(Job.key_for(suspect), "suspect", 2)
    after = api.enqueue(request_of(60, "a"))
    resume(connection)
    wait_until(lambda: len(worker.held) == 2, what="the suspect")
    runner.permits.release(10_000)
    for request_id, num_tokens, adapter_name in ((before, 100, "b"), (suspect, 400, None), (after, 60, "a")):
        log = finished_log(connection, request_id)
        assert text_of(log) == expected_text(num_tokens, adapter_name)
    batches = [{request_id for request_id, _ in batch} for batch in runner.batches]
    first = batches.index({suspect})
    assert batches[first : first + NUM_EVENTS_TO_CLEAR + 1] == [{suspect}] * (NUM_EVENTS_TO_CLEAR + 1)
    assert {before, suspect} in batches
    assert connection.hmget(Job.key_for(suspect), "suspect") == [None]


class StuckEncode:
    """Encodes prompts of more than a page only once it may."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.num_begun = 0

    def __call__(self, request: GenerationRequest) -> list[list[int]]:
        if len(request.messages[0]["content"]) > LONG_PROMPT_CHARS:
            self.num_begun += 1
            assert self.may_go_on.wait(10)
        return [[ord("x")]]


def long_request(num_tokens: int = 3) -> object:
    messages = [{"role": "user", "content": "x" * (LONG_PROMPT_CHARS + 1)}]
    return make_request(sampling=SamplingParams(temperature=0, max_tokens=num_tokens), messages=messages)


def test_a_prompt_that_takes_long_to_encode_holds_up_no_other_request(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    encode = StuckEncode()
    start_worker(encode=encode)
    long = api.enqueue(long_request())
    wait_until(lambda: encode.num_begun)
    assert len(finished_log(connection, api.enqueue(request_of(5)))) == 5
    assert log_of(connection, long) == []
    encode.may_go_on.set()
    assert len(finished_log(connection, long)) == 3


def test_an_operator_can_stop_a_request_whose_prompt_is_being_encoded(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    encode = StuckEncode()
    worker = start_worker(encode=encode)
    request_id = api.enqueue(long_request())
    wait_until(lambda: encode.num_begun)
    worker.consumer.stop_request(request_id)
    wait_until(worker.consumer.commands.empty)
    encode.may_go_on.set()
    (event,) = finished_log(connection, request_id)
    assert event.error is not None
    assert event.error.code == "generation_stopped"


def test_a_request_given_up_while_its_prompt_was_encoded_ends(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    encode, runner = StuckEncode(), SlowRunner()
    start_worker(runner, encode=encode)
    request_id = api.enqueue(long_request(num_tokens=500))
    wait_until(lambda: encode.num_begun)
    assert api.abort(request_id) == "running"
    encode.may_go_on.set()

    def ended_after_a_step() -> list[StreamEvent]:
        runner.permits.release(1)
        events = log_of(connection, request_id)
        return events if events and events[-1].is_terminal else []

    events = wait_until(ended_after_a_step, what="the abort, which is told again and again")
    assert events[-1].finish_reason == FinishReason.ABORT


def test_a_request_that_moved_away_while_its_prompt_was_encoded_does_not_run_here(
    connection: redis.Redis, api: BlockingApi, start_worker: Callable[..., ThreadedWorker]
) -> None:
    encode, runner = StuckEncode(), FakeModel()
    worker = start_worker(runner, encode=encode)
    api.enqueue(long_request())
    wait_until(lambda: encode.num_begun)
    worker.consumer.drain()
    worker_streams(connection).hand_back(worker.held.snapshot())
    wait_until(lambda: not worker.held, what="the news that it is lost")
    encode.may_go_on.set()
    worker.consumer.stop()
    worker.join_consumer()
    wait_until(worker.consumer.commands.empty)
    worker.loop.drain()
    worker.join_loop()
    assert runner.batches == []


@contextmanager
def lost_replies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Claims reach the server meanwhile, and their replies don't come back."""
    claim = WorkerStreams.claim

    def loses_the_reply(*args: object) -> None:
        claim(*args)
        raise redis.ConnectionError("broke")

    with monkeypatch.context() as patch:
        patch.setattr(WorkerStreams, "claim", loses_the_reply)
        yield


def test_what_a_claim_took_before_its_reply_was_lost_comes_with_the_next_one(
    connection: redis.Redis, api: BlockingApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [api.enqueue(make_request()) for _ in range(2)]
    held = HeldRequests()
    consumer = make_consumer(
        worker_streams(connection), held, encode=not_at_all, capacity=lambda: 2, poll_s=0.01
    )
    with lost_replies(monkeypatch), pytest.raises(redis.ConnectionError):
        consumer.turn()
    assert not held
    consumer.turn()
    assert [entry.request_id for entry in held.snapshot()] == ids


def test_a_running_worker_asks_for_more_only_while_something_waits(
    connection: redis.Redis, api: BlockingApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldRequests()
    consumer = make_consumer(
        worker_streams(connection), held, encode=not_at_all, capacity=lambda: 3, poll_s=0.01
    )
    num_held: list[int] = []
    look_once = WorkerStreams.look

    def counted(*args: Any, **options: Any) -> Any:
        num_held.append(len(held))
        return look_once(*args, **options)

    monkeypatch.setattr(WorkerStreams, "look", counted)
    api.enqueue(make_request())
    for _ in range(3):
        consumer.turn()
    api.enqueue(make_request())
    for _ in range(3):
        consumer.turn()
    assert num_held == [0, 1]
    assert len(held) == 2


def test_a_claim_whose_reply_was_lost_is_repeated_though_nothing_waits_any_more(
    connection: redis.Redis, api: BlockingApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldRequests()
    consumer = make_consumer(
        worker_streams(connection), held, encode=not_at_all, capacity=lambda: 2, poll_s=0.01
    )
    api.enqueue(make_request())
    consumer.turn()
    second = api.enqueue(make_request())
    with lost_replies(monkeypatch), pytest.raises(redis.ConnectionError):
        consumer.turn()
    consumer.turn()
    assert [entry.request_id for entry in held.snapshot()][1:] == [second]


def test_what_is_handed_back_while_all_else_ends_is_claimed_in_the_same_turn(
    connection: redis.Redis, api: BlockingApi
) -> None:
    held = HeldRequests()
    consumer = make_consumer(
        worker_streams(connection), held, encode=not_at_all, capacity=lambda: 2, poll_s=0.01
    )
    ids = [api.enqueue(make_request()) for _ in range(2)]
    consumer.turn()
    first, second = held.snapshot()
    consumer.shed(second)
    consumer.outbox.put([last(Claim(first, make_request(), ()), 0)])
    consumer.turn()
    assert [entry.request_id for entry in held.snapshot()] == ids[1:]
    assert not consumer.is_idle


def test_a_repeated_terminal_append_does_not_count_as_a_lost_request(
    connection: redis.Redis, api: BlockingApi
) -> None:
    api.enqueue(make_request())
    held = HeldRequests()
    streams = worker_streams(connection)
    consumer = make_consumer(streams, held, encode=not_at_all, capacity=lambda: 1, poll_s=0.01)
    consumer.turn()
    (claimed,) = held.snapshot()
    end: list[Append] = [last(Claim(claimed, make_request(), ()), 0)]
    streams.append([claimed], end)
    consumer.outbox.put(end)
    consumer.turn()
    assert consumer.commands.empty()
    assert not held

"""The worker's I/O thread: claims requests while the engine has free capacity, and writes events to Redis.

Two queues connect this thread with the engine's thread, which does no network I/O.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import redis

from shared.logs import fields
from shared.queue.connections import is_transient
from shared.queue.names import queue_name
from shared.queue.order import Running
from shared.queue.outages import Outages
from shared.queue.places import tenant_key
from shared.queue.records import Append, Claim, Held, News
from shared.queue.worker_streams import NUM_EVENTS_TO_CLEAR, WorkerStreams
from worker.serving.claimer import Claimer
from worker.serving.commands import Commands, Inbox
from worker.serving.patience import RETRY_WAIT_S, call_until
from worker.serving.prompt_encoder import Encode, Encoding, PromptEncoder

logger = logging.getLogger(__name__)

MAX_NUM_UNSENT_STEPS = 32
IDLE_WAIT_S = 1.0
LONG_SHARE = 0.25
"""Part of a worker's places for long prompts that are not encoded yet; they take seconds each."""
LONG_ONLY_WAIT_S = 0.2
"""Pause after a claim that found nothing while no long prompt may be claimed: maybe only long ones wait."""
IO = "io"


class _Share(NamedTuple):
    """A held request's share: its number of sequences, and the queue and the tenant that they count for."""

    queue: str
    tenant: str
    num_sequences: int


class HeldRequests:
    """The requests that this worker has claimed and that have not ended. Used by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shares: dict[Held, _Share] = {}
        self._suspect: Held | None = None
        self._suspect_until_event_no = 0
        self._isolated: Held | None = None

    def __len__(self) -> int:
        return len(self._shares)

    def __contains__(self, held: object) -> bool:
        return held in self._shares

    @property
    def has_suspect(self) -> bool:
        """True if a held request is a suspect: it may have crashed a worker, so it must run alone."""
        return self._suspect in self._shares

    def add(self, claim: Claim) -> None:
        """Adds a claimed request; replaces an earlier claim of the same request."""
        self.remove([claim.held.request_id])
        with self._lock:
            self._shares[claim.held] = _share_of(claim)
            if claim.alone:
                self._suspect = claim.held
                self._suspect_until_event_no = len(claim.events) + NUM_EVENTS_TO_CLEAR

    def isolate(self, held: Held) -> None:
        """Records that the engine isolated this request.

        The engine pauses until Redis has recorded this, too.
        """
        self._isolated = held

    @property
    def isolated(self) -> Held | None:
        """The request that the engine isolated; None if the request was cleared or is not held any more."""
        return self._isolated if self._isolated == self._suspect and self._isolated in self._shares else None

    def is_cleared_by(self, appends: Iterable[Append]) -> bool:
        """Clears the suspect, and returns true, if it has survived the events in these `appends`."""
        is_cleared = any(
            append.held == self._suspect and append.event.event_no >= self._suspect_until_event_no
            for append in appends
        )
        if is_cleared:
            self._suspect = None
        return is_cleared

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forgets requests by id; ids that are not held are ignored."""
        gone = set(request_ids)
        with self._lock:
            self._shares = {
                held: share for held, share in self._shares.items() if held.request_id not in gone
            }

    def snapshot(self) -> list[Held]:
        """Returns all held requests, oldest claim first."""
        with self._lock:
            return list(self._shares)

    @property
    def num_sequences(self) -> int:
        """The total number of sequences of the held requests."""
        with self._lock:
            return sum(share.num_sequences for share in self._shares.values())

    def running(self, capacity: int) -> Running:
        """Returns the numbers of held sequences, and the part of `capacity` that is still free."""
        with self._lock:
            shares = list(self._shares.values())
        per_queue: Counter[str] = Counter()
        per_tenant: Counter[tuple[str, str]] = Counter()
        for name, tenant, num_sequences in shares:
            per_queue[name] += num_sequences
            per_tenant[name, tenant] += num_sequences
        return Running(capacity - per_queue.total(), per_queue, per_tenant)


def _share_of(claim: Claim) -> _Share:
    request = claim.request
    queue = queue_name(request.base, request.adapter_name)
    return _Share(queue, tenant_key(request.tenant), request.num_sequences)


class _Pause(NamedTuple):
    """A pause until `end_s` (monotonic) in which a worker with `num_long` long prompts does not look.

    A look that passes over long requests takes Redis some milliseconds. Without the pause, each turn would
    repeat this look.
    """

    num_long: int
    end_s: float


class Consumer:
    """Passes requests from Redis to the engine, and events from the engine back to Redis."""

    def __init__(
        self,
        streams: WorkerStreams,
        claimer: Claimer,
        held: HeldRequests,
        *,
        encode: Encode,
        capacity: Callable[[], int],
        poll_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`capacity` returns the number of sequences that the engine can run at once now."""
        self._streams = streams
        self._claimer = claimer
        self._held = held
        self._capacity = capacity
        self._poll_s = poll_s
        self._clock = clock
        self._pause = _Pause(0, 0.0)
        self.outages = Outages(logger)
        self._unsent: list[Append] = []
        self._known_isolated: Held | None = None
        self._draining = threading.Event()
        self._stopped = threading.Event()
        self._to_shed: queue.SimpleQueue[Held] = queue.SimpleQueue()
        self.commands: Inbox = queue.SimpleQueue()
        self.outbox: queue.Queue[list[Append]] = queue.Queue(MAX_NUM_UNSENT_STEPS)
        self._encoder = PromptEncoder(encode, self.commands, held)
        self.num_claimed = 0
        self.is_idle = False
        """True if no request was held at the end of the last turn."""

    @property
    def threads(self) -> dict[str, Callable[[], None]]:
        """The threads of the consumer: name → the function to run in the thread."""
        encoder = self._encoder
        return {IO: self.run, "short prompts": encoder.run_short, "long prompts": encoder.run_long}

    def longest_encode(self) -> Encoding | None:
        """Returns the request that has been encoded longest at present, or None. Callable from any thread."""
        return self._encoder.longest()

    def wake_engine(self) -> None:
        """Wakes the engine loop if it waits for commands; called after an adapter was read."""
        self.commands.put(Commands())

    def drain(self) -> None:
        """Stops claiming; held requests continue."""
        self._draining.set()

    @property
    def is_draining(self) -> bool:
        """True once `drain` was called."""
        return self._draining.is_set()

    def stop(self) -> None:
        """Tells all `threads` to end after their current work."""
        self._draining.set()
        self._stopped.set()
        self._encoder.stop()

    def run(self) -> None:
        """Repeats `turn` until `stop`. While Redis is down, retries, and keeps events that were not sent."""
        while not self._stopped.is_set():
            try:
                self.turn()
            except redis.RedisError as error:
                if not is_transient(error):
                    raise
                self.outages.begin(IO, error)
                self._stopped.wait(RETRY_WAIT_S)
            else:
                self.outages.end(IO)

    def turn(self) -> None:
        """Writes new events, passes aborts and lost claims to the engine, and claims waiting requests."""
        self._collect(self._poll_s if self._held else 0)
        may_claim = True
        if self._held or self._unsent:
            may_claim = self._send()
        may_claim |= self._shed()
        if may_claim or self._claimer.awaits_reply:
            self._claim()
        self.is_idle = not self._held
        may_wait = self.is_idle and not self._claimer.lost_race and not self._stopped.is_set()
        if may_wait and self._streams.wait_for_doorbell(IDLE_WAIT_S):
            self._pause = _Pause(0, 0.0)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Tells the engine to end requests that clients aborted, or whose clients disconnected."""
        if request_ids:
            self.commands.put(Commands(abort=request_ids))

    def stop_request(self, request_id: str) -> None:
        """Tells the engine to end a request because an operator stopped it."""
        self.commands.put(Commands(stop=[request_id]))

    def shed(self, held: Held) -> None:
        """Hands a request back after a step ran out of memory."""
        self._to_shed.put(held)

    def hand_back(self, give_up_at: float = 0) -> int:
        """Hands all held requests back to their queues after `run` has ended; returns their number.

        Retries until `give_up_at` (`time.monotonic()`). When the leases of the remaining requests expire,
        other workers take these over.

        Raises:
            redis.RedisError: the server refused with an error that is not transient.
        """
        held = self._held.snapshot()
        try:
            return call_until(give_up_at, lambda: self._streams.hand_back(held))
        except redis.RedisError as error:
            if not is_transient(error):
                raise
            logger.warning(
                "%d requests were not handed back: %s", len(held), error, extra=fields("hand_back_failed")
            )
            return 0

    def _collect(self, timeout_s: float) -> None:
        """Collects the events of finished steps; waits up to `timeout_s` for the first step."""
        try:
            self._unsent += self.outbox.get(timeout=timeout_s) if timeout_s else self.outbox.get_nowait()
            while True:
                self._unsent += self.outbox.get_nowait()
        except queue.Empty:
            return

    def _send(self) -> bool:
        """Writes the collected events, and handles the reply; returns true if requests wait in a queue."""
        appends = self._unsent
        isolated = self._held.isolated
        news = self._streams.append(self._held.snapshot(), appends, isolated.request_id if isolated else "")
        if isolated != self._known_isolated:
            self._known_isolated = isolated
            self.commands.put(Commands(run_isolated=isolated is not None))
        self._unsent = []
        if self._held.is_cleared_by(appends):
            self.commands.put(Commands(end_isolation=True))
        ended = {append.held.request_id for append in appends if append.event.is_terminal}
        self._held.remove(ended)
        self._pass_on(news, ended)
        if not news.num_waiting:
            self._claimer.nothing_waits()
        return news.num_waiting > 0

    def _pass_on(self, news: News, ended: set[str]) -> None:
        """Tells the engine which requests to abort and to drop.

        `ended`: ids of requests that this append ended. If the append had to be repeated, `news` reports
        these requests as lost, but the engine need not drop them.
        """
        lost = [request_id for request_id in news.lost if request_id not in ended]
        for request_id in lost:
            logger.warning("request %s moved to another worker", request_id, extra=fields("lost"))
        self._held.remove(lost)
        self.abort(news.aborted)
        if lost:
            self.commands.put(Commands(drop=lost))

    def _shed(self) -> bool:
        """Hands back the requests that did not fit into memory; returns true if there were any."""
        has_shed = False
        while not self._to_shed.empty():
            held = self._to_shed.get()
            try:
                self._streams.hand_back([held])
            except redis.RedisError:
                self._to_shed.put(held)
                raise
            self._held.remove([held.request_id])
            logger.warning("request %s handed back: out of memory", held.request_id, extra=fields("shed"))
            has_shed = True
        return has_shed

    def _claim(self) -> None:
        capacity = self._capacity()
        num_long = self._encoder.num_long
        num_long_free = max(1, int(capacity * LONG_SHARE)) - num_long
        running = self._held.running(capacity)._replace(num_long_free=num_long_free)
        if running.num_free <= 0 or self._draining.is_set() or self._held.has_suspect:
            return
        is_paused = num_long >= self._pause.num_long and self._clock() < self._pause.end_s
        if is_paused and not self._claimer.awaits_reply:
            return
        claims = self._claimer.claim(running)
        if num_long_free <= 0 and not claims and not self._claimer.lost_race:
            self._pause = _Pause(num_long, self._clock() + LONG_ONLY_WAIT_S)
        for claim in claims:
            self._held.add(claim)
        self.num_claimed += len(claims)
        self._encoder.take(claims)

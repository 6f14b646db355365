"""The engine loop: carries out the consumer's commands, runs the engine's steps, and returns the events."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from shared.logs import fields
from shared.messages import Timings
from shared.queue.records import Append, Held
from worker.engine.ports import Engine
from worker.engine.records import Output
from worker.engine.sequence import OutOfDeviceMemory
from worker.serving.commands import Arrival, Commands
from worker.serving.consumer import Consumer, HeldRequests

logger = logging.getLogger(__name__)

WAKE_UP_S = 0.1


class _Owned(NamedTuple):
    """The claim of a request that the engine has, and the durations (s) of its stages before the engine."""

    held: Held
    queue_s: float
    encode_s: float


class EngineLoop:
    """Runs the engine in the main thread, until it is drained or told to stop."""

    def __init__(
        self,
        engine: Engine,
        consumer: Consumer,
        held: HeldRequests,
        *,
        drain_s: float,
        step_delay_s: float = 0,
        worker_name: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._consumer = consumer
        self._held = held
        self._drain_s = drain_s
        self._step_delay_s = step_delay_s
        self._worker_name = worker_name
        self._clock = clock
        self._drain_until: float | None = None
        self._hurried = threading.Event()
        self._stopped_early: set[Held] = set()
        self._owned: dict[str, _Owned] = {}
        """The requests that the engine has, by request id."""
        self._step_started_s: float | None = None
        engine.call_when_ready(consumer.wake_engine)

    def step_age_s(self) -> float:
        """Returns the duration of the current step so far, 0 between steps. Safe to call from any thread."""
        started_s = self._step_started_s
        return 0.0 if started_s is None else self._clock() - started_s

    @property
    def is_draining(self) -> bool:
        """True once `drain` was called."""
        return self._drain_until is not None

    def drain(self) -> None:
        """Stops claiming; running requests have `drain_s` to finish. A second call ends the loop at once."""
        if self.is_draining:
            self._hurried.set()
            return
        self._drain_until = self._clock() + self._drain_s
        self._consumer.drain()

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Runs until `should_stop()`, or, after `drain`, until no request is left or `drain_s` has passed."""
        while not (self._is_drained() or should_stop()):
            appends = self._apply_commands()
            appends += self._to_appends(self._engine.settle_adapters())
            appends += self._to_appends(self._engine.expire_requests())
            if self._engine.has_work:
                appends += self._step()
            if appends:
                self._put(appends)
            if self._step_delay_s:
                self._hurried.wait(self._step_delay_s)

    def _step(self) -> list[Append]:
        self._step_started_s = self._clock()
        try:
            outputs = self._engine.step()
            return self._to_appends(outputs)
        except OutOfDeviceMemory as error:
            logger.warning("a step ran out of memory: %s", error, extra=fields("out_of_memory"))
            request_id, outputs = self._engine.shed()
            if request_id is not None:
                self._consumer.shed(self._owned.pop(request_id).held)
            return self._to_appends(outputs)
        finally:
            self._step_started_s = None

    def _is_drained(self) -> bool:
        if self._drain_until is None:
            return False
        return self._hurried.is_set() or not self._held or self._clock() > self._drain_until

    def _apply_commands(self) -> list[Append]:
        """Carries out the waiting commands. If the engine has nothing to run, waits briefly for a command."""
        appends: list[Append] = []
        is_idle = not self._engine.has_work or self._engine.is_stalled
        commands = self._next_commands(WAKE_UP_S if is_idle else None)
        while commands is not None:
            for request_id in commands.drop:
                self._engine.drop_request(request_id)
                self._owned.pop(request_id, None)
            for request_id in commands.abort:
                appends += self._to_appends(self._engine.abort_request(request_id))
            for request_id in commands.stop:
                appends += self._stop(request_id)
            if commands.run_isolated:
                self._engine.run_isolated()
            if commands.end_isolation:
                self._engine.end_isolation()
            for arrival in commands.add:
                appends += self._add(arrival)
            commands = self._next_commands(None)
        return appends

    def _add(self, arrival: Arrival) -> list[Append]:
        """Gives a request to the engine, unless its claim was lost while the prompts were encoded."""
        claim, prompts, encode_s = arrival
        if claim.held not in self._held:
            return []
        self._owned[claim.held.request_id] = _Owned(claim.held, claim.waited_s, encode_s)
        appends = self._to_appends(
            self._engine.add_request(claim.request, prompts, claim.events, alone=claim.alone)
        )
        if claim.alone and not appends:
            self._held.isolate(claim.held)
        if claim.held in self._stopped_early:
            self._stopped_early.remove(claim.held)
            appends += self._to_appends(self._engine.stop_request(claim.held.request_id))
        return appends

    def _stop(self, request_id: str) -> list[Append]:
        """Stops a request. If its prompts are still being encoded, stops the request when they arrive."""
        if not self._engine.holds(request_id):
            held = self._held.snapshot()
            self._stopped_early &= set(held)
            self._stopped_early |= {entry for entry in held if entry.request_id == request_id}
        return self._to_appends(self._engine.stop_request(request_id))

    def _to_appends(self, outputs: list[Output]) -> list[Append]:
        """Returns the outputs with the claims of their requests; a terminal event deletes the claim here."""
        return [
            self._end(output)
            if output.event.is_terminal
            else Append(self._owned[output.request_id].held, output.event)
            for output in outputs
        ]

    def _end(self, output: Output) -> Append:
        """Returns the terminal event of a request, with the request's times."""
        owned, meta = self._owned.pop(output.request_id), dict(output.meta or {})
        timings = Timings(
            queue_s=round(owned.queue_s, 4),
            encode_s=round(owned.encode_s, 4),
            load_s=meta.get("load_s"),
            prefill_s=meta.get("prefill_s"),
            decode_s=meta.get("decode_s"),
            worker=self._worker_name,
        )
        meta |= {"queue_s": timings.queue_s, "encode_s": timings.encode_s}
        return Append(owned.held, msgspec.structs.replace(output.event, timings=timings), meta)

    def _next_commands(self, wait_s: float | None) -> Commands | None:
        try:
            return self._consumer.commands.get(block=wait_s is not None, timeout=wait_s)
        except queue.Empty:
            return None

    def _put(self, appends: list[Append]) -> None:
        """Passes events to the consumer. If too many steps are unsent, blocks, which pauses the engine."""
        while not (self._hurried.is_set() or self._is_drained()):
            with contextlib.suppress(queue.Full):
                self._consumer.outbox.put(appends, timeout=WAKE_UP_S)
                return

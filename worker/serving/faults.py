"""Fault injection for crash tests, configured by `LORELAY_FAULTS`; by default nothing is injected.

The variable contains words, separated by spaces:

* `kill=POINT:N`: the worker kills itself (SIGKILL) when it reaches a fault-injection point for the Nth time.
  The points are claimed, appending, appended, ending and ended.
* `fail=POINT:N`: an exception is raised at this point, in the I/O thread.
* `poison=WORD`: the worker kills itself in the first step of a request whose prompt contains WORD.
* `raise=WORD`: an exception is raised in the first step of a request whose prompt contains WORD.
* `stuck=WORD`: the encoding of a request whose prompt contains WORD never ends.
* `oom=N`: each step of more than N sequences runs out of device memory.
* `hang=N`: the Nth step never ends.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from shared.messages import GenerationRequest
from shared.queue.records import Append, Claim, Held, News
from shared.queue.worker_streams import WorkerStreams
from worker.engine.ports import Model
from worker.engine.sequence import Batch, OutOfDeviceMemory, Sampled
from worker.serving.prompt_encoder import Encode


class Faults:
    """The faults to inject into a worker. The methods of this class are the fault-injection points."""

    def __init__(self, text: str = "") -> None:
        """Parses the words of `LORELAY_FAULTS`.

        Raises:
            ValueError: a word names no fault.
        """
        self._deaths: dict[tuple[str, int], Callable[[], None]] = {}
        self._poison = ""
        self._raising = ""
        self._stuck = ""
        self._max_batch_size: int | None = None
        self._hang_step: int | None = None
        self._num_passes: Counter[str] = Counter()
        self._poisoned: set[str] = set()
        self._raised_by: set[str] = set()
        for word in text.split():
            self._read(*word.partition("=")[::2])

    def _read(self, name: str, value: str) -> None:
        if name in ("kill", "fail"):
            point, _, number = value.partition(":")
            self._deaths[point, int(number or 1)] = _die if name == "kill" else _fail
        elif name == "poison":
            self._poison = value
        elif name == "raise":
            self._raising = value
        elif name == "stuck":
            self._stuck = value
        elif name == "oom":
            self._max_batch_size = int(value)
        elif name == "hang":
            self._hang_step = int(value)
        else:
            raise ValueError(f"{name!r} is no fault")

    def reach(self, point: str) -> None:
        """Counts an arrival at a named fault-injection point; injects the fault that is due there, if any."""
        self._num_passes[point] += 1
        if death := self._deaths.get((point, self._num_passes[point])):
            death()

    def claimed(self, claims: Iterable[Claim]) -> None:
        """Fault-injection point: requests have been claimed in Redis, but the reply is not processed yet."""
        for claim in claims:
            if _has(claim.request, self._poison):
                self._poisoned.add(claim.held.request_id)
            if _has(claim.request, self._raising):
                self._raised_by.add(claim.held.request_id)
        self.reach("claimed")

    def appending(self, appends: Iterable[Append]) -> None:
        """Fault-injection point: the append has not been sent to Redis yet."""
        self.reach("ending" if any(append.event.is_terminal for append in appends) else "appending")

    def appended(self, appends: Iterable[Append]) -> None:
        """Fault-injection point: the append has been written to Redis, but the reply is not processed yet."""
        self.reach("ended" if any(append.event.is_terminal for append in appends) else "appended")

    def encoding(self, request: GenerationRequest) -> None:
        """Fault-injection point: the prompts of a request are about to be encoded."""
        if _has(request, self._stuck):
            threading.Event().wait()

    def before_step(self, request_ids: Sequence[str]) -> None:
        """Fault-injection point: a step is about to run; `request_ids` has one entry for each sequence.

        Raises:
            OutOfDeviceMemory: `LORELAY_FAULTS` asks for it.
            RuntimeError: `LORELAY_FAULTS` asks for it.
        """
        self.reach("step")
        if not self._poisoned.isdisjoint(request_ids):
            _die()
        if not self._raised_by.isdisjoint(request_ids):
            _fail()
        if self._max_batch_size is not None and len(request_ids) > self._max_batch_size:
            raise OutOfDeviceMemory(f"{len(request_ids)} sequences")
        if self._num_passes["step"] == self._hang_step:
            threading.Event().wait()


class FaultyModel:
    """Wraps a model and injects faults into its steps; all other calls go to the wrapped model unchanged."""

    def __init__(self, model: Model, faults: Faults) -> None:
        self._model = model
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, batch: Batch) -> Sequence[Sampled]:
        """Injects a fault if one is due, then runs one step."""
        self._faults.before_step([item.seq.request_id for item in batch])
        return self._model.run(batch)


class FaultyStreams:
    """Wraps `WorkerStreams` and injects faults around claim and append; the wrapped object does the work."""

    def __init__(self, streams: WorkerStreams, faults: Faults) -> None:
        self._streams = streams
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams, name)

    def claim(self, *args: Any) -> list[Claim]:
        """Claims requests, then injects a fault if one is due."""
        claims = self._streams.claim(*args)
        if claims:
            self._faults.claimed(claims)
        return claims

    def append(self, held: Sequence[Held], appends: Sequence[Append], isolated: str) -> News:
        """Appends events; injects a fault before or after the append if one is due."""
        self._faults.appending(appends)
        news = self._streams.append(held, appends, isolated)
        self._faults.appended(appends)
        return news


def faulty_model(model: Model, faults: Faults) -> Model:
    """Returns the model, wrapped so that these faults are injected."""
    return cast(Model, FaultyModel(model, faults))


def faulty_encode(encode: Encode, faults: Faults) -> Encode:
    """Returns the function that encodes requests, wrapped so that these faults are injected."""

    def wrapped(request: GenerationRequest) -> list[list[int]]:
        faults.encoding(request)
        return encode(request)

    return wrapped


def faulty_streams(streams: WorkerStreams, faults: Faults) -> WorkerStreams:
    """Returns the streams, wrapped so that these faults are injected."""
    return cast(WorkerStreams, FaultyStreams(streams, faults))


def _has(request: GenerationRequest, word: str) -> bool:
    """True if `word` is not empty and the prompt of the request contains it."""
    return bool(word) and word in str((request.messages, request.prompts))


def _fail() -> None:
    raise RuntimeError("a fault on purpose")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

"""The worker's end of the queue and the token log, and what it shares with the API's (`shared.api_streams`).

It only calls the scripts in `shared/scripts/`. Each script is atomic and can be repeated safely: redis-py
repeats a call whose reply it lost.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import Any, NamedTuple

import msgspec
import redis
from rq.defaults import RQ_KEY_PREFIX

from shared import keys
from shared.errors import (
    GenerationFailed,
    GenerationStopped,
    LorelayError,
    from_info,
)
from shared.messages import (
    SCHEMA_VERSION,
    FinishReason,
    GenerationRequest,
    StreamEvent,
    decode_event,
    decode_request,
)
from shared.queues import slug

_pack = msgspec.msgpack.encode
"""For the scripts' `cmsgpack`, which reads strings but no binary type."""


@cache
def script_source(name: str) -> str:
    """The text of `shared/scripts/<name>.lua` behind the prelude, on RQ's key prefix."""
    folder = resources.files("shared") / "scripts"
    prelude = (folder / "prelude.lua").read_text().replace("@RQ@", RQ_KEY_PREFIX)
    return prelude + (folder / f"{name}.lua").read_text()


class Held(NamedTuple):
    """A request that a worker believes it owns, under the execution of its claim."""

    request_id: str
    execution_id: str


class Claim(NamedTuple):
    """A request handed to a worker: what to run, and what its log holds already."""

    held: Held
    request: GenerationRequest
    events: tuple[StreamEvent, ...]
    alone: bool = False
    """It was near crashes: its steps must run without company until it is cleared."""


class Slots(NamedTuple):
    """Where the adapters that run find room on a worker."""

    num: int
    resident: Sequence[str]
    """Queues whose adapters have a slot now, in use or not, least recently used first."""
    max_wait_s: float
    """How long the head of a queue waits at most before its adapter may push another out."""


UNLIMITED_SLOTS = Slots(1 << 30, (), 1.0)


class Append(NamedTuple):
    """One event for one request's log."""

    held: Held
    event: StreamEvent
    meta: Mapping[str, Any] | None = None
    """With the terminal event: what `job.meta` shows (usage, timings, adapter; never text)."""


class News(NamedTuple):
    """What the scripts tell a worker about the requests it named."""

    aborted: list[str]
    lost: list[str]
    in_time: bool = True
    """Of `renew`: whether the worker's own lease had held until then."""
    num_waiting: int = 0
    """Of `append`: how many of the base's queues wait; with 0 there is nothing to claim."""


class Reaped(NamedTuple):
    """Requests whose worker was lost: back on their queues, or dead-lettered."""

    requeued: list[str]
    dead: list[str]


NUM_EVENTS_TO_CLEAR = 16
"""A request that ran on for so many events since its claim is cleared of the crashes it was near."""
NUM_QUEUES_PER_SWEEP = 100
MAX_NUM_REAPED = 1000
"""Requests that one call of `reap` takes from their workers."""


class WorkerStreams:
    """One worker's end: claim, append, renew, hand back, reap."""

    def __init__(
        self,
        connection: redis.Redis,
        *,
        base: str,
        worker_name: str,
        lease_s: float,
        stream_ttl_s: float,
        result_ttl_s: int,
        failure_ttl_s: int,
    ) -> None:
        self._connection = connection
        self._base = slug(base)
        self._worker_name = worker_name
        self._lease_ms = int(lease_s * 1000)
        self._stream_ttl_ms = int(stream_ttl_s * 1000)
        self._result_ttl_s = result_ttl_s
        self._failure_ttl_s = failure_ttl_s
        self._closed: list[str] = []
        """Queues that get no more requests until their slots are free."""
        self._claim = connection.register_script(script_source("claim"))
        self._append = connection.register_script(script_source("append"))
        self._renew = connection.register_script(script_source("renew"))
        self._hand_back = connection.register_script(script_source("hand_back"))
        self._reap = connection.register_script(script_source("reap"))
        self._sweep = connection.register_script(script_source("sweep"))

    def claim(
        self,
        execution_ids: Sequence[str],
        running: Mapping[str, int],
        queues: Sequence[str],
        slots: Slots = UNLIMITED_SLOTS,
    ) -> list[Claim]:
        """Claims at most one request per execution id; the same ids again bring the same requests.

        `running` counts this worker's requests per queue; `queues` are those it serves.
        """
        claimed, closed = self._claim(
            args=[
                self._base,
                self._worker_name,
                len(execution_ids),
                self._lease_ms,
                self._stream_ttl_ms,
                SCHEMA_VERSION,
                json.dumps(running),
                _pack_queues(tuple(queues)),
                self._pack_slots(slots),
                *execution_ids,
            ]
        )
        self._closed = _decode_all(closed)
        return [
            Claim(
                Held(request_id.decode(), execution_id.decode()),
                decode_request(request),
                tuple(decode_event(entry) for entry in log),
                bool(alone),
            )
            for request_id, execution_id, request, log, alone in claimed
        ]

    def append(self, held: Iterable[Held], appends: Iterable[Append], isolated: str = "") -> News:
        """Writes events to the logs and publishes them; a terminal event ends its job in the same step.

        `isolated`: the request whose steps run alone from now on, so that a crash is charged to it.
        """
        packed = [
            (
                *append.held,
                append.event.event_no,
                append.event.encode().decode(),
                self._outcome(append) if append.event.is_terminal else None,
            )
            for append in appends
        ]
        reply = self._append(
            args=[
                self._base,
                self._lease_ms,
                self._stream_ttl_ms,
                _pack_held(held),
                _pack(packed),
                NUM_EVENTS_TO_CLEAR,
                isolated,
            ]
        )
        aborted, lost, num_waiting = reply
        if num_waiting == 0:
            # As a claim would find now, which need not be made.
            self._closed = []
        return News(_decode_all(aborted), _decode_all(lost), num_waiting=num_waiting)

    def renew(self, held: Iterable[Held], *, judge_readers: bool = False) -> News:
        """Extends this worker's own entry and the leases of all it holds.

        `judge_readers`: a request whose API let its lease run out counts as aborted, unless it is detached;
        none does if this worker's own lease had run out.
        """
        reply = self._renew(
            args=[
                self._base,
                self._worker_name,
                self._lease_ms,
                _pack_held(held),
                int(judge_readers),
            ]
        )
        aborted, lost, in_time = reply
        return News(_decode_all(aborted), _decode_all(lost), in_time=bool(in_time))

    def hand_back(self, held: Sequence[Held]) -> int:
        """Returns requests (`held`: oldest first) to the front of their queues; how many were still owned."""
        return int(self._hand_back(args=[_pack_held(reversed(held))]))

    def reap(self, max_crashes_alone: int = 3) -> Reaped:
        """Puts requests with an expired lease back on their queues; nothing if its own lease has run out.

        One that had no company when it lost its worker, so many times, ends as failed instead.
        """
        reason = GenerationFailed(f"The request crashed its worker {max_crashes_alone} times.")
        event = StreamEvent(event_no=-1, finish_reason=FinishReason.ERROR, error=reason.to_info())
        requeued, dead = self._reap(
            args=[
                self._base,
                MAX_NUM_REAPED,
                max_crashes_alone,
                self._failure_ttl_s,
                event.encode().decode().replace("%", "%%").replace('"event_no":-1', '"event_no":%d'),
                _exception_text(reason),
                self._worker_name,
            ]
        )
        return Reaped(_decode_all(requeued), _decode_all(dead))

    def sweep(self, queues: Iterable[str]) -> int:
        """Notices what was put on these queues, or taken from them, by others; how many of them wait."""
        names = list(queues)
        # In parts, so that nobody waits long for the server meanwhile: it takes 10 us a queue.
        starts = range(0, len(names), NUM_QUEUES_PER_SWEEP)
        parts = [names[start : start + NUM_QUEUES_PER_SWEEP] for start in starts]
        return sum(int(self._sweep(args=[self._base, *part])) for part in parts)

    def wait_for_doorbell(self, timeout_s: float) -> bool:
        """Blocks until a request is enqueued for the base, at most `timeout_s`; whether one was."""
        return self._connection.blpop([keys.doorbell(self._base)], timeout=timeout_s) is not None

    def _pack_slots(self, slots: Slots) -> str:
        return json.dumps(
            {
                "num": slots.num,
                "resident": list(slots.resident),
                "closed": self._closed,
                "max_wait_ms": int(slots.max_wait_s * 1000),
            }
        )

    def _outcome(self, append: Append) -> tuple[str, str, str, str, int]:
        """What `append.lua` ends the job with; result and exception encoded as in `rq.results.Result`."""
        event, meta = append.event, json.dumps(dict(append.meta or {}))
        if event.error is not None:
            error = from_info(event.error)
            status = "stopped" if isinstance(error, GenerationStopped) else "failed"
            return status, meta, "", _exception_text(error), self._failure_ttl_s
        status = "canceled" if event.finish_reason == "abort" else "finished"
        return status, meta, base64.b64encode(meta.encode()).decode(), "", self._result_ttl_s


def _exception_text(error: LorelayError) -> str:
    """An error as RQ's results store exceptions."""
    return base64.b64encode(zlib.compress(f"{error.code}: {error.message}".encode())).decode()


@lru_cache(maxsize=1)
def _pack_queues(queues: tuple[str, ...]) -> str:
    """Thousands of names, the same at each claim of a worker."""
    return json.dumps(queues)


def _pack_held(held: Iterable[Held]) -> bytes:
    return _pack([item for pair in held for item in pair])


def _decode_all(items: Iterable[bytes]) -> list[str]:
    return [item.decode() for item in items]

"""The worker's end of the queue and the token log, beside that of the API (`api_streams`).

It only calls the scripts in `shared/queue/lua/`. Each script is atomic and can be repeated safely: redis-py
repeats a call whose reply it lost.
"""

import base64
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import redis

from shared.errors import (
    AdapterVersionGone,
    GenerationFailed,
    GenerationStopped,
    from_info,
)
from shared.messages import SCHEMA_VERSION, FinishReason, StreamEvent
from shared.queue import keys
from shared.queue.claims import UnreadableRecord, read_claim
from shared.queue.connections import is_wrong_type
from shared.queue.names import slug
from shared.queue.order import Pick, Waiting
from shared.queue.places import read_place
from shared.queue.records import Append, Claim, Held, News, Reaped
from shared.queue.scripts import event_format, exception_text, log_unreadable, mend, script_source

_pack = msgspec.msgpack.encode
"""Packs arguments for the scripts' `cmsgpack`, which reads strings but no binary type."""


NUM_EVENTS_TO_CLEAR = 16
"""Events since its claim after which a suspect is cleared."""
NUM_QUEUES_PER_SWEEP = 100
MAX_NUM_REAPED = 1000
"""Most requests that one call of `reap` takes from their workers."""
MAX_NUM_JUDGED = 1000
"""Waiting requests after which one call of `end_unserved` looks at no further queue."""
SERVED_TTL_MS = 600_000
"""Life of the record of what a worker serves, after its last heartbeat."""


class WorkerStreams:
    """The scripts that one worker calls: look, claim, append, renew, hand back, reap, sweep."""

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
        self._look = connection.register_script(script_source("look"))
        self._claim = connection.register_script(script_source("claim"))
        self._append = connection.register_script(script_source("append"))
        self._renew = connection.register_script(script_source("renew"))
        self._hand_back = connection.register_script(script_source("hand_back"))
        self._reap = connection.register_script(script_source("reap"))
        self._sweep = connection.register_script(script_source("sweep"))
        self._end_unserved = connection.register_script(script_source("end_unserved"))

    def serve(self, served: Mapping[str, str]) -> None:
        """Tells Redis which queues this worker serves, and the version of the weights that it has for each.

        Claims depend on it, and so does the end of requests that no live worker can serve. An empty version
        stands for any.
        """
        key = keys.served(self._worker_name)
        with self._connection.pipeline() as pipeline:
            pipeline.delete(key)
            pipeline.hset(key, mapping=_served_fields(served))
            pipeline.pexpire(key, SERVED_TTL_MS)
            pipeline.execute()

    def serves(self, served: Mapping[str, str]) -> bool:
        """True if Redis has exactly these queues and versions for this worker."""
        known = self._connection.hgetall(keys.served(self._worker_name))
        return known == {name.encode(): value.encode() for name, value in _served_fields(served).items()}

    def look(
        self, near: Sequence[str], others: Sequence[str], *, num_queues: int, num_requests: int
    ) -> tuple[list[Waiting], float]:
        """The lines that this worker may choose from, and the time (ms) by the clock of Redis.

        They are of the first `num_queues` waiting queues of `near`, which need no free slot, and of as many
        of `others` whose heads wait longest; without `others` of all queues that this worker serves. Each
        line has up to `num_requests` requests.
        """
        lines: list[Waiting] = []
        rank, now_ms = 0, 0.0
        # Each call is bounded in time. The next one goes on after queues without anything for this worker.
        while rank >= 0:
            found, rank, now_ms, unreadable = self._look(
                args=[
                    self._base,
                    self._worker_name,
                    SCHEMA_VERSION,
                    num_requests,
                    num_queues,
                    f"{random.getrandbits(32):08x}",
                    rank,
                    _pack(near),
                    _pack(others),
                ]
            )
            log_unreadable(unreadable)
            lines += [read_waiting(entry) for entry in found]
        return lines, float(now_ms)

    def claim(self, execution_ids: Sequence[str], picks: Sequence[Pick]) -> list[Claim]:
        """Claims a request for each pick; fewer if others took them, or if one is a suspect.

        The same ids again return the same requests. Requests whose records can't be read end here.
        """
        claimed, unreadable = self._claim(
            args=[
                self._base,
                self._worker_name,
                self._lease_ms,
                self._stream_ttl_ms,
                SCHEMA_VERSION,
                _pack([item for pick in picks for item in pick]),
                *execution_ids,
            ]
        )
        log_unreadable(unreadable)
        claims: list[Claim] = []
        refused: list[Append] = []
        for request_id, execution_id, request, log, alone, queue, version in claimed:
            held = Held(request_id.decode(), execution_id.decode())
            try:
                claims.append(read_claim(held, queue, version, request, log, alone=bool(alone)))
            except UnreadableRecord as error:
                log_unreadable([(request_id, error.reason.encode())])
                refused.append(_refusal(held, error, len(log)))
        if refused:
            self.append([append.held for append in refused], refused)
        return claims

    def append(self, held: Iterable[Held], appends: Iterable[Append], isolated: str = "") -> News:
        """Writes events to the logs and publishes them; a terminal event ends its job in the same step.

        `isolated` is the request whose steps run alone from now on, so that a crash counts against it only.
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
        aborted, lost, num_waiting, unreadable = reply
        log_unreadable(unreadable)
        return News(_decode_all(aborted), _decode_all(lost), num_waiting=num_waiting)

    def renew(self, held: Iterable[Held], *, judge_readers: bool = False) -> News:
        """Renews the leases of this worker and of all requests that it holds.

        `judge_readers`: requests whose API let its lease run out are reported as aborted, unless they are
        detached, or this worker's own lease had run out.
        """
        reply = self._renew(
            args=[
                self._base,
                self._worker_name,
                self._lease_ms,
                _pack_held(held),
                int(judge_readers),
                SERVED_TTL_MS,
            ]
        )
        aborted, lost, in_time, unreadable, is_known = reply
        log_unreadable(unreadable)
        return News(_decode_all(aborted), _decode_all(lost), in_time=bool(in_time), is_known=bool(is_known))

    def hand_back(self, held: Sequence[Held]) -> int:
        """Puts requests (oldest first) back in front of their queues; returns how many it still owned."""
        num_handed_back, unreadable = self._hand_back(args=[self._base, _pack_held(reversed(held))])
        log_unreadable(unreadable)
        return int(num_handed_back)

    def reap(self, max_crashes_alone: int = 3) -> Reaped:
        """Puts requests with an expired lease back on their queues, unless this worker's own has run out.

        A request that has crashed its worker alone `max_crashes_alone` times ends as failed instead.
        """
        reason = GenerationFailed(f"The request crashed its worker {max_crashes_alone} times.")
        requeued, dead, unreadable = self._reap(
            args=[
                self._base,
                MAX_NUM_REAPED,
                max_crashes_alone,
                self._failure_ttl_s,
                event_format(reason),
                exception_text(reason),
                self._worker_name,
            ]
        )
        log_unreadable(unreadable)
        return Reaped(_decode_all(requeued), _decode_all(dead))

    def end_unserved(self, min_pause_s: float) -> list[str]:
        """Ends the requests that wait for weights which no live worker has; returns their ids.

        Nothing happens if a worker of the base did so less than `min_pause_s` ago, or if this worker's own
        lease has run out.
        """
        reason = AdapterVersionGone()
        ended: list[str] = []
        rank = -1
        # One call for everything would block the server, at about 1 us per request.
        while True:
            rank, ids, unreadable = self._end_unserved(
                args=[
                    self._base,
                    self._worker_name,
                    rank,
                    MAX_NUM_JUDGED,
                    int(min_pause_s * 1000),
                    event_format(reason),
                    exception_text(reason),
                    self._failure_ttl_s,
                ]
            )
            log_unreadable(unreadable)
            ended += _decode_all(ids)
            if rank < 0:
                return ended

    def sweep(self, queues: Iterable[str]) -> int:
        """Notices changes of these queues by RQ's tools; returns how many of the queues wait."""
        names = list(queues)
        # One call for everything would block the server, at about 10 us per queue.
        starts = range(0, len(names), NUM_QUEUES_PER_SWEEP)
        parts = [names[start : start + NUM_QUEUES_PER_SWEEP] for start in starts]
        num_waiting = 0
        for part in parts:
            count, unreadable = self._sweep(args=[self._base, *part])
            log_unreadable(unreadable)
            num_waiting += int(count)
        return num_waiting

    def wait_for_doorbell(self, timeout_s: float) -> bool:
        """Blocks until a request is enqueued for the base, at most `timeout_s`; returns true if one was."""
        try:
            return self._connection.blpop([keys.doorbell(self._base)], timeout=timeout_s) is not None
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            mend(self._connection, {keys.doorbell(self._base): "list"})
            return True

    def _outcome(self, append: Append) -> tuple[str, str, str, str, int]:
        """The end of a job for `append.lua`; result and exception are encoded as in `rq.results.Result`."""
        event, meta = append.event, json.dumps(dict(append.meta or {}))
        if event.error is not None:
            error = from_info(event.error)
            status = "stopped" if isinstance(error, GenerationStopped) else "failed"
            return status, meta, "", exception_text(error), self._failure_ttl_s
        status = "canceled" if event.finish_reason == "abort" else "finished"
        return status, meta, base64.b64encode(meta.encode()).decode(), "", self._result_ttl_s


def _served_fields(served: Mapping[str, str]) -> dict[Any, Any]:
    # A field with an empty name keeps the hash in existence, and so known, if nothing is served.
    return {**served, "": ""}


def read_waiting(entry: Sequence[bytes]) -> Waiting:
    """Reads a line from the reply of `look.lua`: queue, deadline, places."""
    queue, deadline_ms, *places = (part.decode() for part in entry)
    return Waiting(
        queue, [read_place(place) for place in places], float(deadline_ms) if deadline_ms else None
    )


def _refusal(held: Held, error: UnreadableRecord, event_no: int) -> Append:
    event = StreamEvent(event_no=event_no, finish_reason=FinishReason.ERROR, error=error.to_info())
    return Append(held, event, {"error": error.code, "unreadable": error.reason})


def _pack_held(held: Iterable[Held]) -> bytes:
    return _pack([item for pair in held for item in pair])


def _decode_all(items: Iterable[bytes]) -> list[str]:
    return [item.decode() for item in items]

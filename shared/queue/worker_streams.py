"""The worker's calls to Redis for the queues and the token logs. `api_streams` has the API's calls.

Each script in `shared/queue/lua/` is atomic, and a repeated call does no harm. redis-py repeats a call whose
reply was lost.
"""

import base64
import json
import random
import time
from collections.abc import Iterable, Sequence

import redis

from shared.errors import GenerationStopped, InvalidRequest, ServerBusy, from_info
from shared.messages import SCHEMA_VERSION, FinishReason, StreamEvent
from shared.queue import keys
from shared.queue.claims import UnreadableRecord, read_claim
from shared.queue.connections import is_wrong_type
from shared.queue.order import NO_LIMIT, Pick, Waiting
from shared.queue.places import read_place
from shared.queue.records import Append, Claim, Held, News
from shared.queue.scripts import exception_text, log_unreadable, mend
from shared.queue.upkeep_streams import UpkeepStreams, decode_all, pack, pack_held

NUM_EVENTS_TO_CLEAR = 16
"""Number of events that a suspect (see `Claim.alone`) must produce after its claim to be cleared."""


class WorkerStreams(UpkeepStreams):
    """Calls the scripts of a worker: look, claim, append, hand_back, and its heartbeat's scripts."""

    is_look_cut = False
    """True if the last look found nothing, but removed many places without a request; look again."""

    def look(
        self,
        near: Sequence[str],
        others: Sequence[str],
        *,
        num_queues: int,
        num_requests: int,
        num_long: int = NO_LIMIT,
    ) -> tuple[list[Waiting], float]:
        """Returns the lines from which this worker may choose, and the time (ms) by the clock of Redis.

        `near`: queues whose adapters need no free slot. Of the queues in `near`, the first `num_queues` with
        waiting requests are read. `others`: the worker's other queues; empty stands for all queues that the
        worker serves. Of the queues in `others`, `num_queues` are read: half are the queues whose first
        requests have waited longest, and half are drawn at random. Each returned line has up to
        `num_requests` requests. If `num_long` is 0, long requests are left out.
        """
        lines: list[Waiting] = []
        rank, now_ms = 0, 0.0
        # Each call takes bounded time. If a call found too few queues with requests for this worker, the next
        # call continues where it ended.
        while rank >= 0:
            found, rank, now_ms, unreadable = self._scripts["look"](
                args=[
                    self._base,
                    self._worker_name,
                    SCHEMA_VERSION,
                    num_requests,
                    num_queues,
                    f"{random.getrandbits(32):08x}",
                    rank,
                    pack(near),
                    pack(others),
                    num_long,
                ]
            )
            log_unreadable(unreadable)
            lines += [read_waiting(entry) for entry in found]
        self.is_look_cut = rank == -2 and not lines
        return lines, float(now_ms)

    def claim(self, claim_ids: Sequence[str], picks: Sequence[Pick], num_long: int = NO_LIMIT) -> list[Claim]:
        """Claims the first request that is left in each picked line; stops after a suspect.

        At most `num_long` long requests are claimed. In place of further long requests, shorter requests
        behind these are claimed. A repeated call with the same claim ids returns the same requests. Requests
        with unreadable records end as failed.
        """
        claimed, unreadable = self._scripts["claim"](
            args=[
                self._base,
                self._worker_name,
                self._lease_ms,
                self._stream_ttl_ms,
                SCHEMA_VERSION,
                pack([item for pick in picks for item in pick]),
                num_long,
                *claim_ids,
            ]
        )
        log_unreadable(unreadable)
        claims: list[Claim] = []
        refused: list[Append] = []
        for request_id, claim_id, request, log, alone, queue, version, waited_ms in claimed:
            held = Held(request_id.decode(), claim_id.decode())
            try:
                read = read_claim(held, queue, version, request, log, alone=bool(alone))
                claims.append(read._replace(waited_s=waited_ms / 1000, claimed_at_s=time.monotonic()))
            except UnreadableRecord as error:
                log_unreadable([(request_id, error.reason.encode())])
                refused.append(_refusal(held, error, len(log)))
        if refused:
            self.append([append.held for append in refused], refused)
        return claims

    def append(self, held: Iterable[Held], appends: Iterable[Append], isolated: str = "") -> News:
        """Writes events to the logs and publishes them. A terminal event also ends the request's job.

        `isolated`: id of the request whose steps run alone from now on, or empty. Redis then counts a crash
        against this request only.
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
        reply = self._scripts["append"](
            args=[
                self._base,
                self._lease_ms,
                self._stream_ttl_ms,
                pack_held(held),
                pack(packed),
                NUM_EVENTS_TO_CLEAR,
                isolated,
            ]
        )
        aborted, lost, num_waiting, unreadable = reply
        log_unreadable(unreadable)
        return News(decode_all(aborted), decode_all(lost), num_waiting=num_waiting)

    def hand_back(self, held: Sequence[Held]) -> int:
        """Puts requests (given oldest first) back at the front of their queues; returns their number."""
        num_handed_back, unreadable = self._scripts["hand_back"](args=[self._base, pack_held(reversed(held))])
        log_unreadable(unreadable)
        return int(num_handed_back)

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
        """Returns a job's end in the form that `append.lua` expects; RQ's format encodes result and error."""
        event, meta = append.event, json.dumps(dict(append.meta or {}))
        if event.error is not None:
            error = from_info(event.error)
            if isinstance(error, InvalidRequest | ServerBusy):
                return "refused", meta, "", "", self._result_ttl_s
            status = "stopped" if isinstance(error, GenerationStopped) else "failed"
            return status, meta, "", exception_text(error), self._failure_ttl_s
        status = "canceled" if event.finish_reason == "abort" else "finished"
        return status, meta, base64.b64encode(meta.encode()).decode(), "", self._result_ttl_s


def read_waiting(entry: Sequence[bytes]) -> Waiting:
    """Reads a line from the reply of `look.lua`: queue, deadline, places."""
    queue, deadline_ms, *places = (part.decode() for part in entry)
    return Waiting(
        queue, [read_place(place) for place in places], float(deadline_ms) if deadline_ms else None
    )


def _refusal(held: Held, error: UnreadableRecord, event_no: int) -> Append:
    event = StreamEvent(event_no=event_no, finish_reason=FinishReason.ERROR, error=error.to_info())
    return Append(held, event, {"error": error.code, "unreadable": error.reason})

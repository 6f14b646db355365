"""The calls to Redis of a worker's heartbeat. `worker_streams` has the calls of the worker's I/O thread.

Each script is atomic, and a repeated call does no harm. redis-py repeats a call whose reply was lost.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import redis

from shared.errors import AdapterVersionGone, GenerationFailed
from shared.queue import keys
from shared.queue.names import slug
from shared.queue.records import Held, News, Reaped
from shared.queue.scripts import event_format, exception_text, log_unreadable, script_source

pack = msgspec.msgpack.encode
"""Encodes arguments of scripts as MessagePack. Pass text as `str`: Redis's decoder knows no binary type."""

SCRIPTS = ("look", "claim", "append", "hand_back", "renew", "reap", "sweep", "end_unserved")
NUM_QUEUES_PER_SWEEP = 100
MAX_NUM_REAPED = 1000
"""Maximum number of requests that one call of `reap` takes from dead workers."""
MAX_NUM_CHECKED = 1000
"""Number of waiting requests after which one call of `end_unserved` checks no further queue."""
SERVED_TTL_MS = 600_000
"""Time to live of a worker's `served` hash after its last heartbeat."""


class UpkeepStreams:
    """Calls the scripts of a worker's heartbeat: renew, reap, end_unserved, sweep."""

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
        self._scripts = {name: connection.register_script(script_source(name)) for name in SCRIPTS}

    def serve(self, served: Mapping[str, str]) -> None:
        """Writes to Redis which queues this worker serves, and which weights version it has for each.

        The worker can claim only requests for these versions, and requests for a version that no live worker
        serves are ended. The empty version matches any version.
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

    def renew(self, held: Iterable[Held], *, abort_unread: bool = False) -> News:
        """Renews the leases of this worker and of all requests that it holds.

        With `abort_unread`, a request that is not detached also counts as aborted if the lease of its API
        process has expired. If this worker's own lease had expired, too, `abort_unread` has no effect.
        """
        reply = self._scripts["renew"](
            args=[
                self._base,
                self._worker_name,
                self._lease_ms,
                pack_held(held),
                int(abort_unread),
                SERVED_TTL_MS,
            ]
        )
        aborted, lost, had_lease, unreadable, has_served = reply
        log_unreadable(unreadable)
        return News(
            decode_all(aborted), decode_all(lost), had_lease=bool(had_lease), has_served=bool(has_served)
        )

    def reap(self, max_crashes_alone: int = 3) -> Reaped:
        """Puts requests whose leases have expired back on their queues, unless this worker's lease has, too.

        A request that has crashed workers `max_crashes_alone` times while it ran alone ends as failed
        instead.
        """
        reason = GenerationFailed(f"The request crashed its worker {max_crashes_alone} times.")
        requeued, dead, unreadable = self._scripts["reap"](
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
        return Reaped(decode_all(requeued), decode_all(dead))

    def end_unserved(self, min_pause_s: float) -> list[str]:
        """Ends requests that wait for weights which no live worker has; returns their ids.

        Does nothing if a worker of the base has called this script in the last `min_pause_s`, or if this
        worker's own lease has expired.
        """
        reason = AdapterVersionGone()
        ended: list[str] = []
        rank = -1
        # One call for all requests would block Redis too long, at about 1 us per request.
        while True:
            rank, ids, unreadable = self._scripts["end_unserved"](
                args=[
                    self._base,
                    self._worker_name,
                    rank,
                    MAX_NUM_CHECKED,
                    int(min_pause_s * 1000),
                    event_format(reason),
                    exception_text(reason),
                    self._failure_ttl_s,
                ]
            )
            log_unreadable(unreadable)
            ended += decode_all(ids)
            if rank < 0:
                return ended

    def sweep(self, queues: Iterable[str]) -> int:
        """Repairs queues that RQ's tools changed; returns how many of `queues` have waiting requests."""
        names = list(queues)
        # One call for all queues would block Redis too long, at about 10 us per queue.
        starts = range(0, len(names), NUM_QUEUES_PER_SWEEP)
        parts = [names[start : start + NUM_QUEUES_PER_SWEEP] for start in starts]
        num_waiting = 0
        for part in parts:
            count, unreadable = self._scripts["sweep"](args=[self._base, *part])
            log_unreadable(unreadable)
            num_waiting += int(count)
        return num_waiting


def _served_fields(served: Mapping[str, str]) -> dict[Any, Any]:
    # Redis deletes an empty hash. With the empty field, the hash exists even if nothing is served.
    return {**served, "": ""}


def pack_held(held: Iterable[Held]) -> bytes:
    """Packs held requests for the scripts: request id, claim id, request id, ..."""
    return pack([item for pair in held for item in pair])


def decode_all(items: Iterable[bytes]) -> list[str]:
    """Decodes each item of a reply."""
    return [item.decode() for item in items]

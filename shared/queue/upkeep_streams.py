"""The scripts of a worker's heartbeat: leases, reaping, sweeps. Requests are moved by `worker_streams`.

Each script is atomic and can be repeated safely: redis-py repeats a call whose reply it lost.
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
"""Packs arguments for the scripts' `cmsgpack`, which reads strings but no binary type."""

SCRIPTS = ("look", "claim", "append", "hand_back", "renew", "reap", "sweep", "end_unserved")
NUM_QUEUES_PER_SWEEP = 100
MAX_NUM_REAPED = 1000
"""Most requests that one call of `reap` takes from their workers."""
MAX_NUM_CHECKED = 1000
"""Waiting requests after which one call of `end_unserved` looks at no further queue."""
SERVED_TTL_MS = 600_000
"""Life of the record of what a worker serves, after its last heartbeat."""


class UpkeepStreams:
    """The scripts of a worker's heartbeat: serve, renew, reap, sweep, end what nobody serves."""

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

    def renew(self, held: Iterable[Held], *, abort_unread: bool = False) -> News:
        """Renews the leases of this worker and of all requests that it holds.

        `abort_unread`: requests whose API let its lease run out are reported as aborted, unless they are
        detached, or this worker's own lease had run out.
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
        """Puts requests with an expired lease back on their queues, unless this worker's own has run out.

        A request that has crashed its worker alone `max_crashes_alone` times ends as failed instead.
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
        """Ends the requests that wait for weights which no live worker has; returns their ids.

        Nothing happens if a worker of the base did so less than `min_pause_s` ago, or if this worker's own
        lease has run out.
        """
        reason = AdapterVersionGone()
        ended: list[str] = []
        rank = -1
        # One call for everything would block the server, at about 1 us per request.
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
        """Notices changes of these queues by RQ's tools; returns how many of the queues wait."""
        names = list(queues)
        # One call for everything would block the server, at about 10 us per queue.
        starts = range(0, len(names), NUM_QUEUES_PER_SWEEP)
        parts = [names[start : start + NUM_QUEUES_PER_SWEEP] for start in starts]
        num_waiting = 0
        for part in parts:
            count, unreadable = self._scripts["sweep"](args=[self._base, *part])
            log_unreadable(unreadable)
            num_waiting += int(count)
        return num_waiting


def _served_fields(served: Mapping[str, str]) -> dict[Any, Any]:
    # A field with an empty name keeps the hash in existence, and so known, if nothing is served.
    return {**served, "": ""}


def pack_held(held: Iterable[Held]) -> bytes:
    """Packs held requests for the scripts: request id, claim id, request id, ..."""
    return pack([item for pair in held for item in pair])


def decode_all(items: Iterable[bytes]) -> list[str]:
    """The text of each item of a reply."""
    return [item.decode() for item in items]

"""Lorelay's Redis keys. Each docstring gives type, content, the scripts that write and read it, and its TTL.

Keys that RQ defines (job hashes, queues, registries, workers) are not listed here; the scripts in
`shared/queue/lua/` build their names from RQ's prefix. `<id>` is a request id, `<base>` a base model's slug.
`lua/prelude.lua` repeats the names; a test compares both files.
"""

PREFIX = "lorelay"

FORWARD_FIELD = "forward"
"""The field for a worker's `ForwardState`, which the worker adds to RQ's hash of this worker."""

MODELS = f"{PREFIX}:models"
"""hash, model name → ModelCard. Written by workers when they start, read by every API. It never expires."""


LOADING = f"{PREFIX}:loading"
"""hash, model name → worker that loads it. Written and removed by workers that start; read by an API that is
asked for a model that is not in the registry. It expires an hour after the last worker began to load."""


def waiting(base: str) -> str:
    """sorted set of the queues with waiting requests, queue → enqueue time (ms) of its first request.

    If only batch requests wait in a queue, 2^50 is added to its score: it then sorts behind all queues with
    interactive requests. Written by enqueue, claim, abort, reap, hand_back, sweep; read by look.
    """
    return f"{PREFIX}:waiting:{base}"


def order(queue: str) -> str:
    """sorted set, all scores 0: the place (sort key) of each request that waits in a queue, see `places.py`.

    Written by every script that changes the queue: enqueue, abort, claim, reap, hand_back. `look` and `sweep`
    compare the set with RQ's list and repair it. The set is deleted with the last waiting request of the
    queue, and expires a day after its last new place.
    """
    return f"{PREFIX}:order:{queue}"


def doorbell(base: str) -> str:
    """list on which idle workers block (BLPOP). Written by enqueue, reap, hand_back; at most 64 entries."""
    return f"{PREFIX}:doorbell:{base}"


def leases(base: str) -> str:
    """sorted set, running request → lease expiry (ms). Written by claim, renew, append; read by reap."""
    return f"{PREFIX}:leases:{base}"


def workers(base: str) -> str:
    """sorted set, worker name → lease expiry (ms). Written by renew; read by API and `lorelay status`."""
    return f"{PREFIX}:workers:{base}"


def served(worker_name: str) -> str:
    """hash, queue → weights version that a worker has for it; plus one field with an empty name.

    Written by the worker's heartbeat; read by look and claim, and by end_unserved, which finds the requests
    whose weights no live worker serves. Expires 10 min after the last renewal.
    """
    return f"{PREFIX}:served:{worker_name}"


def judged(base: str) -> str:
    """string, time (ms) at which a worker last ran end_unserved for this base. Expires after `reap_s`."""
    return f"{PREFIX}:judged:{base}"


def unreadable(key: str) -> str:
    """The new name of a key that had a wrong type and was renamed by a script. Expires after a day."""
    return f"{PREFIX}:unreadable:{key}"


def owner(request_id: str) -> str:
    """hash of a running request: execution (the claim id), worker, base, queue, aborted, watched_from, alone.

    Written by claim; deleted when the request ends, is handed back or is reaped.
    """
    return f"{PREFIX}:owner:{request_id}"


def reader(request_id: str) -> str:
    """string, channel of the API that reads the request's events. Written by enqueue, read by append."""
    return f"{PREFIX}:reader:{request_id}"


def log(request_id: str) -> str:
    """list of encoded StreamEvents; the index is `event_no`. Written by append, read by the API and claim."""
    return f"{PREFIX}:log:{request_id}"


def reaped(worker_name: str) -> str:
    """hash: number of requests reaped from a worker (num), 1 if one of them ran alone (lone).

    Written by reap. Expires after a minute; deleted when that worker renews its lease.
    """
    return f"{PREFIX}:reaped:{worker_name}"


def drained(base: str, ten_seconds: int) -> str:
    """string, number of requests that ended in a slice of 10 s; enqueue derives `Retry-After` from it.

    Written by append. Expires after 60 s.
    """
    return f"{PREFIX}:drained:{base}:{ten_seconds}"


def depth(base: str) -> str:
    """string, number of waiting requests of a base.

    enqueue counts the requests, then adds those that it enqueues; requests that leave the queues after the
    count are not subtracted. Expires 1 s after the count.
    """
    return f"{PREFIX}:depth:{base}"


def events_channel(api_id: str) -> str:
    """Pub/sub channel of one API process; a string key with the same name is the lease of that process.

    append publishes to the channel: lines of `<id> <encoded StreamEvent>`. The API renews the key. If the key
    has expired, renew aborts the requests whose events this API reads, unless they are detached.
    """
    return f"{PREFIX}:events:{api_id}"

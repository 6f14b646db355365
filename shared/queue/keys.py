"""Lorelay's Redis keys. Each docstring gives a key's type and content, its writers and readers, and its TTL.

The writers and readers are mostly scripts in `shared/queue/lua/`. `lua/prelude.lua` repeats the names of the
keys; a test compares both files. Keys that RQ defines (job hashes, queues, registries, workers) are not
listed here: the scripts build the names of these keys from RQ's prefix.

In the docstrings, `<id>` is a request id. `base` is a base model's slug (`names.slug`).
"""

PREFIX = "lorelay"

FORWARD_FIELD = "forward"
"""The name of a field in RQ's hash of a worker; in this field, the worker stores its `ForwardState`."""

FACTS_FIELD = "facts"
"""The field for `WorkerFacts`, which the worker adds to RQ's hash of it."""

MODELS = f"{PREFIX}:models"
"""hash, model name → `ModelCard`. Written by workers when they start, read by every API. Never expires."""

LOADING = f"{PREFIX}:loading"
"""hash, model name → name of a worker that is loading this model.

The worker adds the entry when it starts to load, and removes the entry when it has registered the model. Read
by an API that gets a request for a model that is not in `MODELS`. Expires an hour after a worker last began
to load.
"""


OVERDUE_CHECK = f"{PREFIX}:overdue-check"
"""string, set by the API process that last ended overdue requests; until it expires, no other one does."""


def waiting(base: str) -> str:
    """A sorted set: queue with waiting requests → time (ms) at which its first request was enqueued.

    If only batch requests wait in a queue, 2^50 is added to the time, so that the queue sorts behind all
    queues with interactive requests. Writers: enqueue, claim, abort, reap, hand_back, sweep. Reader: look.
    """
    return f"{PREFIX}:waiting:{base}"


def order(queue: str) -> str:
    """A sorted set: the places (sort keys, see `places.py`) of a queue's waiting requests; all scores are 0.

    Writers: the scripts that change the queue, which are enqueue, abort, claim, reap and hand_back. The
        scripts look and sweep compare the set with RQ's list of the queue, and repair the set. The set is
        deleted when no request waits in the queue, and expires a day after a place was last added.
    """
    return f"{PREFIX}:order:{queue}"


def doorbell(base: str) -> str:
    """A list of up to 64 entries; idle workers wait for an entry (BLPOP).

    Writers: enqueue, reap, hand_back.
    """
    return f"{PREFIX}:doorbell:{base}"


def leases(base: str) -> str:
    """A sorted set: running request → expiry of its lease (ms).

    Writers: claim, renew, append. Reader: reap.
    """
    return f"{PREFIX}:leases:{base}"


def workers(base: str) -> str:
    """A sorted set: name of a worker → expiry of its lease (ms).

    Writer: renew. Readers: renew, reap, end_unserved, the API and `lorelay status`.
    """
    return f"{PREFIX}:workers:{base}"


def served(worker_name: str) -> str:
    """A hash: queue that a worker serves → weights version that this worker has for the queue.

    A field with an empty name keeps the hash in Redis while the worker serves no queue. Writer: the worker's
    heartbeat. Readers: look, claim, the API, and end_unserved, which ends requests whose weights no live
    worker serves. The hash expires 10 min after the last renewal.
    """
    return f"{PREFIX}:served:{worker_name}"


def judged(base: str) -> str:
    """A string: time (ms) at which a worker last ran end_unserved for this base; expires after `reap_s`."""
    return f"{PREFIX}:judged:{base}"


def unreadable(key: str) -> str:
    """A key that had a wrong type, and that a script renamed to this name; expires after a day."""
    return f"{PREFIX}:unreadable:{key}"


def owner(request_id: str) -> str:
    """A hash about a running request, deleted when the request ends, is handed back or is reaped.

    `execution`: claim id.
    `worker`, `base`, `queue`: the worker that claimed the request, and the base and queue of the request.
    `aborted`: 1 if the worker must end the request.
    `alone`: 1 once the request is isolated, so that a crash counts against this request only. `watched_from`:
    number of events in the log at the claim; set only if the request ran during earlier crashes.

    Writers: claim, append, and abort (the field `aborted`). Once append has written `NUM_EVENTS_TO_CLEAR`
        events more than `watched_from`, it deletes `alone` and `watched_from`, and forgets the earlier
        crashes.
    """
    return f"{PREFIX}:owner:{request_id}"


def reader(request_id: str) -> str:
    """A string: the `events_channel` of the API process that reads the request's events.

    Writers: enqueue, and an API process whose client resumes the stream. Readers: append and renew.
    """
    return f"{PREFIX}:reader:{request_id}"


def log(request_id: str) -> str:
    """A list of encoded `StreamEvent`s; the index of an event is its `event_no`.

    Writers: append, and each script that ends a request itself. Readers: claim and the API.
    """
    return f"{PREFIX}:log:{request_id}"


def reaped(worker_name: str) -> str:
    """A hash about a worker whose requests were reaped.

    `num`: number of requests that were reaped from the worker. `lone`: 1 if one of these requests was
    isolated. Writer and reader: reap. The hash expires after a minute. If the worker turns out to be alive,
    renew deletes the hash.
    """
    return f"{PREFIX}:reaped:{worker_name}"


def drained(base: str, ten_seconds: int) -> str:
    """A string: number of a base's requests that ended in one slice of 10 s.

    `ten_seconds`: number of the slice, which is Unix time divided by 10 s. Writers: all scripts that end
    requests. Reader: enqueue, which computes `Retry-After` from the number. The string expires after 60 s.
    """
    return f"{PREFIX}:drained:{base}:{ten_seconds}"


def backlog(base: str) -> str:
    """A hash: bytes and number of a base's waiting requests, for all tenants and for each tenant.

    `total`, `total:num`: bytes and number of all waiting requests. `<tenant key>`, `<tenant key>:num`: bytes
    and number of the requests of one tenant. `again_ms`: time (ms) before which enqueue does not count again.

    Writer and reader: enqueue, which counts the requests once, and then adds each request that it enqueues.
    Requests that leave the queues are not subtracted, but when a limit is reached, enqueue counts again. The
    hash expires a minute after the count.
    """
    return f"{PREFIX}:backlog:{base}"


def events_channel(api_id: str) -> str:
    """Pub/sub channel of one API process; a string key with the same name is the lease of that process.

    The script append publishes lines of `<id> <encoded StreamEvent>` to the channel. The API process renews
    the lease. If the lease has expired, the script renew aborts all requests whose events this process reads,
    except detached ones.
    """
    return f"{PREFIX}:events:{api_id}"

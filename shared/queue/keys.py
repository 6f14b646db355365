"""Every Redis key, named once: its type, who writes it, who reads it, how long it lives.

RQ's own keys (job hashes, queues, registries, workers) are RQ's and are not listed here; the scripts in
`shared/queue/lua/` take their names from RQ's prefix. `<id>` is a request id, `<base>` a base model's slug.
The names stand a second time in `lua/prelude.lua`, and a test holds both together.
"""

PREFIX = "lorelay"

FORWARD_FIELD = "forward"
"""Field that a worker adds to its hash of RQ's: its `ForwardState`."""

MODELS = f"{PREFIX}:models"
"""hash, model name → ModelCard. Written by starting workers, read by every API. Outlives the workers."""


def waiting(base: str) -> str:
    """sorted set, queue → enqueue time (ms) of its head; 2^50 more while nothing but batch waits in it.

    Kept by enqueue, claim, abort, reap, hand_back, sweep; read by look.
    """
    return f"{PREFIX}:waiting:{base}"


def order(queue: str) -> str:
    """sorted set, all scores 0: the place of each request that waits in a queue, see `places`.

    Kept by whoever changes the queue: enqueue, abort, claim, reap, hand_back. `look` and `sweep` compare it
    with RQ's list and mend it. It ends with the queue's last waiting request.
    """
    return f"{PREFIX}:order:{queue}"


def doorbell(base: str) -> str:
    """list that idle workers block on. Pushed by enqueue, reap, hand_back; holds at most 64 rings."""
    return f"{PREFIX}:doorbell:{base}"


def leases(base: str) -> str:
    """sorted set, request id → lease expiry (ms). Kept by claim, renew, append; read by reap."""
    return f"{PREFIX}:leases:{base}"


def workers(base: str) -> str:
    """sorted set, worker name → lease expiry (ms). Kept by renew; read by the API and `lorelay status`."""
    return f"{PREFIX}:workers:{base}"


def served(worker_name: str) -> str:
    """hash, queue → version of the weights that a worker has for it; one field more, with an empty name.

    Written by the worker's heartbeat; read by look and claim, and by end_unserved to tell what no live worker
    serves. 10 min after the last renewal.
    """
    return f"{PREFIX}:served:{worker_name}"


def judged(base: str) -> str:
    """string, when (ms) a worker last looked for requests that no live worker can serve. Below a second."""
    return f"{PREFIX}:judged:{base}"


def unreadable(key: str) -> str:
    """A key that had a type it should not have, as it was. Renamed by the script that met it. A day."""
    return f"{PREFIX}:unreadable:{key}"


def owner(request_id: str) -> str:
    """hash: execution, worker, base, queue, aborted, watched_from, alone. From claim to end or reap."""
    return f"{PREFIX}:owner:{request_id}"


def reader(request_id: str) -> str:
    """string, the channel of the API that reads now. Written by enqueue, read by append. Stream TTL."""
    return f"{PREFIX}:reader:{request_id}"


def log(request_id: str) -> str:
    """list of encoded StreamEvents, index = event_no. Written by append, read by the API. Stream TTL."""
    return f"{PREFIX}:log:{request_id}"


def reaped(worker_name: str) -> str:
    """hash: requests reaped from a worker (num), whether one ran alone (lone). Written by reap.

    A minute, or until that worker renews.
    """
    return f"{PREFIX}:reaped:{worker_name}"


def drained(base: str, ten_seconds: int) -> str:
    """string, requests that ended in one slice of 10 s. Kept by append; enqueue measures by it. 60 s."""
    return f"{PREFIX}:drained:{base}:{ten_seconds}"


def depth(base: str) -> str:
    """string, number of waiting requests of a base, as of the last second. Kept by enqueue. 1 s."""
    return f"{PREFIX}:depth:{base}"


def events_channel(api_id: str) -> str:
    """pub/sub channel of one API process, and its lease: a string key of the same name.

    The channel is published by append: lines of `<id> <encoded StreamEvent>`. The API renews the key;
    renew reads it: requests whose reader has none are aborted, unless detached.
    """
    return f"{PREFIX}:events:{api_id}"

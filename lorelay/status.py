"""`lorelay status`: reads workers, models and queues from Redis without changing anything there.

In contrast, `rq info` removes the records of workers and jobs that it considers dead.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import msgspec
import redis
from rq.defaults import RQ_KEY_PREFIX

from shared.model_cards import ModelCard, WorkerFacts
from shared.queue import keys, registry
from shared.queue.connections import is_wrong_type
from shared.queue.fleet import read_facts
from shared.queue.names import queue_name, slug

STARTED = "started"
"""RQ's state of a worker that listens to commands and does not serve yet."""


class WorkerState(StrEnum):
    """The state of a worker, by its lease, its record in RQ and the queues that it serves."""

    LOADING = "loading"
    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    """The worker is alive and serves no queue any more."""
    SUSPENDED = "suspended"
    """`rq suspend` stopped all claims."""
    LEFT = "left"
    """The worker has ended by itself; RQ keeps its record for a minute."""
    LOST = "lost"
    """The worker stopped renewing its lease, or closed its connection while it loaded, without a goodbye."""


class WorkerStatus(msgspec.Struct, frozen=True):
    """A worker that is registered in RQ or has a lease."""

    name: str
    base: str | None
    """Name of the base model; None if the worker does not serve yet, or if its base is not registered."""
    host: str
    pid: int | None
    state: WorkerState
    num_running: int
    alive: bool
    """True if the worker's lease has not expired. A worker that still loads its model has no lease."""
    forward: str
    """State of the forward pass: `eager`, `compiled`, or `compiling` (still eager); empty while loading."""
    facts: WorkerFacts | None
    """The worker's limits and the places of its adapters; None while it loads, and from earlier releases."""
    queues: list[str]
    """The queues that the worker claims from; while it loads, those that it will claim from."""


class ModelStatus(msgspec.Struct, frozen=True):
    """A base model or an adapter."""

    name: str
    base: str
    source: str
    version: str
    max_model_len: int
    """Context length in tokens that all live workers of the model accept."""
    num_workers: int
    """Number of live workers that serve the model in its registered version."""


class QueueStatus(msgspec.Struct, frozen=True):
    """An RQ queue; `model` is None if the queue belongs to no registered model."""

    name: str
    model: str | None
    num_workers: int
    """Number of live workers that claim from the queue, whatever their weights version."""
    depth: int
    num_running: int
    oldest_wait_s: float | None


class Status(msgspec.Struct, frozen=True):
    """Everything that `lorelay status` shows."""

    workers: list[WorkerStatus]
    bases: list[ModelStatus]
    adapters: list[ModelStatus]
    queues: list[QueueStatus]


def read_status(connection: redis.Redis) -> Status:
    """Reads the status of one Redis database; writes nothing."""
    cards = _readable(lambda: registry.list_cards(connection), [])
    leases = {base: _leases(connection, base) for base in sorted({card.base for card in cards})}
    live = [name for alive in leases.values() for name, is_alive in alive.items() if is_alive]
    served = [_served(connection, name) or {} for name in live]
    models = [
        ModelStatus(
            card.name, card.base, card.source, card.version, card.max_model_len, _num_serving(card, served)
        )
        for card in cards
    ]
    is_base = {card.name: card.adapter_name is None for card in cards}
    return Status(
        workers=_workers(connection, leases),
        bases=[model for model in models if is_base[model.name]],
        adapters=[model for model in models if not is_base[model.name]],
        queues=_queues(connection, cards, served),
    )


def live_workers(connection: redis.Redis, base: str) -> dict[tuple[str, int], WorkerStatus]:
    """Returns the live workers of a base model, by (host, process id)."""
    alive = (name for name, is_alive in _leases(connection, base).items() if is_alive)
    workers = (_worker(connection, name, base, True) for name in alive)
    return {(worker.host, worker.pid): worker for worker in workers if worker.pid is not None}


def _leases(connection: redis.Redis, base: str) -> dict[str, bool]:
    """Returns a base's workers by name: True if the lease has not expired, by the Redis server's clock."""
    now_ms = _now_ms(connection)
    key = keys.workers(slug(base))
    entries = _readable(lambda: connection.zrange(key, 0, -1, withscores=True), [])
    return {_text(name): expiry_ms > now_ms for name, expiry_ms in entries}


def _workers(connection: redis.Redis, leases: dict[str, dict[str, bool]]) -> list[WorkerStatus]:
    found = [
        _worker(connection, name, base, is_alive)
        for base, alive in leases.items()
        for name, is_alive in sorted(alive.items())
    ]
    known = {worker.name for worker in found}
    registered = _members(connection, "worker")
    found += [_worker(connection, name, None, False) for name in sorted(registered - known)]
    return [worker for worker in found if worker.alive or worker.host]


def _worker(connection: redis.Redis, name: str, base: str | None, is_alive: bool) -> WorkerStatus:
    key = f"{RQ_KEY_PREFIX}:worker:{name}"
    names = ("hostname", "pid", "state", keys.FORWARD_FIELD, "queues", "death", keys.FACTS_FIELD)
    values = _readable(lambda: connection.hmget(key, *names), [None] * len(names))
    host, pid, rq_state, forward, registered, death, _ = (_text(value) for value in values)
    facts = read_facts(values[-1])
    served = _served(connection, name) if is_alive else None
    queues = list(served) if served is not None else [queue for queue in registered.split(",") if queue]
    if is_alive:
        state = _state_alive(rq_state, served)
    elif death:
        state = WorkerState.LEFT
    else:
        state = WorkerState.LOST if base or _is_gone(connection, name, rq_state) else WorkerState.LOADING
    num_running = _readable(lambda: connection.scard(f"{key}:executions"), 0)
    process_id = int(pid) if pid.isdecimal() else None
    return WorkerStatus(name, base, host, process_id, state, num_running, is_alive, forward, facts, queues)


def _state_alive(rq_state: str, served: dict[str, str] | None) -> WorkerState:
    """Returns the state of a worker with a lease.

    `served`: the worker's queues; None if Redis lost this record.
    """
    if served == {}:
        return WorkerState.DRAINING
    known = {str(state): state for state in (WorkerState.BUSY, WorkerState.SUSPENDED)}
    return known.get(rq_state, WorkerState.IDLE)


def _is_gone(connection: redis.Redis, worker_name: str, rq_state: str) -> bool:
    """True if a loading worker does not listen to commands any more, because its process has ended.

    The result is False if the Redis user lacks the permission `+pubsub|numsub`.
    """
    if rq_state != STARTED:
        return False
    channel = f"{RQ_KEY_PREFIX}:pubsub:{worker_name}"
    try:
        ((_, num_listeners),) = connection.pubsub_numsub(channel)
    except redis.exceptions.NoPermissionError:
        return False
    return int(num_listeners) == 0


def _served(connection: redis.Redis, worker_name: str) -> dict[str, str] | None:
    """Returns the queues that a worker serves, with its weights versions; None if Redis lost them."""
    fields = _readable(lambda: connection.hgetall(keys.served(worker_name)), {})
    if not fields:
        return None
    return {_text(queue): _text(version) for queue, version in fields.items() if queue}


def _num_serving(card: ModelCard, served: Sequence[dict[str, str]]) -> int:
    """Returns the number of workers that serve a model in its version.

    An empty version matches any version.
    """
    queue = queue_name(card.base, card.adapter_name)
    versions = [queues[queue] for queues in served if queue in queues]
    return sum(
        not (version and card.weights_version) or version == card.weights_version for version in versions
    )


def _queues(
    connection: redis.Redis, cards: Sequence[ModelCard], served: Sequence[dict[str, str]]
) -> list[QueueStatus]:
    owners = {queue_name(card.base, card.adapter_name): card.name for card in cards}
    others = sorted(_members(connection, "queue") - set(owners))
    num_workers = Counter(name for queues in served for name in queues)
    return [_queue(connection, name, owners.get(name), num_workers[name]) for name in [*owners, *others]]


def _queue(connection: redis.Redis, name: str, model: str | None, num_workers: int) -> QueueStatus:
    key = f"{RQ_KEY_PREFIX}:queue:{name}"
    head = _readable(lambda: connection.lindex(key, 0), None)
    job = f"{RQ_KEY_PREFIX}:job:{_text(head)}"
    enqueued_ms = _text(_readable(lambda: connection.hget(job, "enqueued_ms"), None)) if head else ""
    is_known = enqueued_ms.replace(".", "", 1).isdecimal()
    oldest_wait_s = (_now_ms(connection) - float(enqueued_ms)) / 1000 if is_known else None
    num_running = _readable(lambda: connection.zcard(f"{RQ_KEY_PREFIX}:wip:{name}"), 0)
    depth = _readable(lambda: connection.llen(key), 0)
    return QueueStatus(name, model, num_workers, depth, num_running, oldest_wait_s)


def _members(connection: redis.Redis, kind: str) -> set[str]:
    """Returns the names in RQ's set of workers or queues."""
    prefix = f"{RQ_KEY_PREFIX}:{kind}:"
    members = _readable(lambda: connection.smembers(f"{RQ_KEY_PREFIX}:{kind}s"), set())
    return {_text(key).removeprefix(prefix) for key in members}


def _readable(read: Callable[[], Any], default: Any) -> Any:
    """Calls `read`, but returns the default if a key has a wrong type, so that other data is still shown."""
    try:
        return read()
    except redis.ResponseError as error:
        if not is_wrong_type(error):
            raise
        return default


def _text(value: bytes | str | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _now_ms(connection: redis.Redis) -> float:
    seconds, microseconds = connection.time()
    return float(seconds * 1000 + microseconds / 1000)

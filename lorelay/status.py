"""`lorelay status`: reads workers, models and queues from Redis without changing anything there.

`rq info`, in contrast, removes the records of workers and jobs that it considers dead.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import redis
from rq.defaults import RQ_KEY_PREFIX

from shared.messages import ModelCard
from shared.queue import keys, registry
from shared.queue.connections import is_wrong_type
from shared.queue.names import queue_name, slug


class WorkerStatus(msgspec.Struct, frozen=True):
    """A worker that is registered in RQ or has a lease."""

    name: str
    base: str | None
    """Name of the base model; None if the worker does not serve yet, or if its base is not registered."""
    host: str
    pid: int | None
    state: str
    """State as RQ names it: starting, idle, busy, suspended; empty if RQ has no record of the worker."""
    num_running: int
    alive: bool
    """True if the worker's lease has not expired. A worker that still loads its model has no lease."""
    forward: str
    """State of the forward pass: `eager`, `compiled`, or `compiling` (still eager); empty while loading."""


class ModelStatus(msgspec.Struct, frozen=True):
    """A base model or an adapter."""

    name: str
    base: str
    source: str
    version: str
    num_workers: int
    """Number of live workers of the base."""


class QueueStatus(msgspec.Struct, frozen=True):
    """An RQ queue; `model` is None if the queue belongs to no registered model."""

    name: str
    model: str | None
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
    num_workers = {base: sum(alive.values()) for base, alive in leases.items()}
    models = [
        ModelStatus(card.name, card.base, card.source, card.version, num_workers[card.base]) for card in cards
    ]
    is_base = {card.name: card.adapter_name is None for card in cards}
    return Status(
        workers=_workers(connection, leases),
        bases=[model for model in models if is_base[model.name]],
        adapters=[model for model in models if not is_base[model.name]],
        queues=_queues(connection, cards),
    )


def live_workers(connection: redis.Redis, base: str) -> dict[tuple[str, int], WorkerStatus]:
    """Returns the live workers of a base model, by (host, process id)."""
    alive = (name for name, is_alive in _leases(connection, base).items() if is_alive)
    workers = (_worker(connection, name, base, True) for name in alive)
    return {(worker.host, worker.pid): worker for worker in workers if worker.pid is not None}


def to_text(status: Status) -> str:
    """Renders the status as tables for a terminal."""
    sections = [
        _table(
            "WORKER,HOST,PID,BASE,STATE,RUNNING,ALIVE,FORWARD",
            (
                (
                    worker.name,
                    worker.host,
                    worker.pid or "-",
                    worker.base or "-",
                    worker.state or "-",
                    worker.num_running,
                    "yes" if worker.alive else "no",
                    worker.forward or "-",
                )
                for worker in status.workers
            ),
        ),
        _table(
            "BASE,WORKERS,SOURCE", ((model.name, model.num_workers, model.source) for model in status.bases)
        ),
        _table("ADAPTER,BASE,SOURCE", ((model.name, model.base, model.source) for model in status.adapters)),
        _table(
            "QUEUE,MODEL,WAITING,RUNNING,OLDEST WAIT",
            (
                (
                    queue.name,
                    queue.model or "-",
                    queue.depth,
                    queue.num_running,
                    _seconds(queue.oldest_wait_s),
                )
                for queue in status.queues
            ),
        ),
    ]
    return "\n\n".join(sections)


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
    names = ("hostname", "pid", "state", keys.FORWARD_FIELD)
    values = _readable(lambda: connection.hmget(key, *names), [None] * len(names))
    host, pid, state, forward = (_text(value) for value in values)
    num_running = _readable(lambda: connection.scard(f"{key}:executions"), 0)
    process_id = int(pid) if pid.isdecimal() else None
    return WorkerStatus(name, base, host, process_id, state, num_running, is_alive, forward)


def _queues(connection: redis.Redis, cards: Sequence[ModelCard]) -> list[QueueStatus]:
    owners = {queue_name(card.base, card.adapter_name): card.name for card in cards}
    others = sorted(_members(connection, "queue") - set(owners))
    return [_queue(connection, name, owners.get(name)) for name in [*owners, *others]]


def _queue(connection: redis.Redis, name: str, model: str | None) -> QueueStatus:
    key = f"{RQ_KEY_PREFIX}:queue:{name}"
    head = _readable(lambda: connection.lindex(key, 0), None)
    job = f"{RQ_KEY_PREFIX}:job:{_text(head)}"
    enqueued_ms = _text(_readable(lambda: connection.hget(job, "enqueued_ms"), None)) if head else ""
    is_known = enqueued_ms.replace(".", "", 1).isdecimal()
    oldest_wait_s = (_now_ms(connection) - float(enqueued_ms)) / 1000 if is_known else None
    num_running = _readable(lambda: connection.zcard(f"{RQ_KEY_PREFIX}:wip:{name}"), 0)
    depth = _readable(lambda: connection.llen(key), 0)
    return QueueStatus(name, model, depth, num_running, oldest_wait_s)


def _members(connection: redis.Redis, kind: str) -> set[str]:
    """Returns the names in RQ's set of workers or queues."""
    prefix = f"{RQ_KEY_PREFIX}:{kind}:"
    members = _readable(lambda: connection.smembers(f"{RQ_KEY_PREFIX}:{kind}s"), set())
    return {_text(key).removeprefix(prefix) for key in members}


def _readable(read: Callable[[], Any], default: Any) -> Any:
    """Calls `read`; returns the default if the key has a wrong type, so that other data is still shown."""
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


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _table(head: str, rows: Iterable[Iterable[object]]) -> str:
    titles = head.split(",")
    lines = [titles, *([str(cell) for cell in row] for row in rows)]
    if len(lines) == 1:
        lines.append(["none", *([""] * (len(titles) - 1))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join(_padded(line, widths) for line in lines)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

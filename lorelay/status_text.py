"""Renders the result of `lorelay status` as tables for a terminal."""

from collections.abc import Iterable, Sequence

from lorelay.status import ModelStatus, QueueStatus, Status, WorkerStatus
from shared.model_cards import WorkerFacts

MAX_NUM_QUEUES_SHOWN = 3
NONE = "NONE"
"""The number of workers of a model that no live worker serves."""


def to_text(status: Status) -> str:
    """Returns the status as tables; models that no live worker serves are named above them."""
    unserved = [model.name for model in [*status.bases, *status.adapters] if not model.num_workers]
    sections = [f"! No live worker serves: {', '.join(unserved)}"] if unserved else []
    sections += [f"! {difference}" for difference in _differences(status.workers)]
    sections += [
        _table("WORKER,HOST,PID,BASE,STATE,RUNNING,ALIVE,FORWARD,QUEUES", map(_worker_row, status.workers)),
        _table(
            "BASE,WORKERS,LENGTH,SOURCE",
            ((model.name, _num_workers(model), model.max_model_len, model.source) for model in status.bases),
        ),
        _table(
            "ADAPTER,BASE,WORKERS,SOURCE",
            ((model.name, model.base, _num_workers(model), model.source) for model in status.adapters),
        ),
        _table(
            "WORKER,LENGTH,DTYPE,ADAPTERS,RESIDENT,SLOTS,SLOT MIB,CACHED,CACHE MIB,DISK,LOADS",
            (_facts_row(worker.name, worker.facts) for worker in status.workers if worker.facts),
        ),
        _table("QUEUE,MODEL,WORKERS,WAITING,RUNNING,OLDEST WAIT", map(_queue_row, status.queues)),
    ]
    return "\n\n".join(sections)


def _worker_row(worker: WorkerStatus) -> tuple[object, ...]:
    return (
        worker.name,
        worker.host or "-",
        worker.pid or "-",
        worker.base or "-",
        worker.state,
        worker.num_running,
        "yes" if worker.alive else "no",
        worker.forward or "-",
        _few(worker.queues),
    )


def _facts_row(name: str, facts: WorkerFacts) -> tuple[object, ...]:
    return (
        name,
        facts.max_model_len,
        facts.dtype or "-",
        facts.num_adapters,
        facts.num_resident,
        facts.num_slots,
        f"{facts.num_resident_bytes / 2**20:.1f}",
        facts.num_cached,
        f"{facts.num_cached_bytes / 2**20:.1f}",
        facts.num_on_disk,
        facts.num_reads,
    )


def _differences(workers: Sequence[WorkerStatus]) -> list[str]:
    """Returns a sentence for each base whose live workers differ in context length or number type."""
    kinds: dict[str, set[tuple[int, str]]] = {}
    for worker in workers:
        if worker.alive and worker.base and worker.facts:
            kinds.setdefault(worker.base, set()).add((worker.facts.max_model_len, worker.facts.dtype))
    return [
        f"The live workers of {base} differ: "
        + ", ".join(f"{length} tokens in {dtype or 'an unknown type'}" for length, dtype in sorted(found))
        for base, found in kinds.items()
        if len(found) > 1
    ]


def _queue_row(queue: QueueStatus) -> tuple[object, ...]:
    return (
        queue.name,
        queue.model or "-",
        queue.num_workers or NONE,
        queue.depth,
        queue.num_running,
        "-" if queue.oldest_wait_s is None else f"{queue.oldest_wait_s:.1f} s",
    )


def _num_workers(model: ModelStatus) -> object:
    return model.num_workers or NONE


def _few(names: Sequence[str]) -> str:
    """Returns the first names, and the number of all further names."""
    rest = len(names) - MAX_NUM_QUEUES_SHOWN
    shown = ", ".join(names[:MAX_NUM_QUEUES_SHOWN]) or "-"
    return f"{shown}, {rest} more" if rest > 0 else shown


def _table(head: str, rows: Iterable[Iterable[object]]) -> str:
    titles = head.split(",")
    lines = [titles, *([str(cell) for cell in row] for row in rows)]
    if len(lines) == 1:
        lines.append(["none", *([""] * (len(titles) - 1))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join(_padded(line, widths) for line in lines)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

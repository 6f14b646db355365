"""Renders what `lorelay status` read as tables for a terminal."""

from collections.abc import Iterable, Sequence

from lorelay.status import ModelStatus, QueueStatus, Status, WorkerStatus

MAX_NUM_QUEUES_SHOWN = 3
NONE = "NONE"
"""The number of workers of a model that no live worker serves."""


def to_text(status: Status) -> str:
    """Returns the status as tables; models that no live worker serves are named above them."""
    unserved = [model.name for model in [*status.bases, *status.adapters] if not model.num_workers]
    sections = [f"! No live worker serves: {', '.join(unserved)}"] if unserved else []
    sections += [
        _table("WORKER,HOST,PID,BASE,STATE,RUNNING,ALIVE,FORWARD,QUEUES", map(_worker_row, status.workers)),
        _table(
            "BASE,WORKERS,SOURCE",
            ((model.name, _num_workers(model), model.source) for model in status.bases),
        ),
        _table(
            "ADAPTER,BASE,WORKERS,SOURCE",
            ((model.name, model.base, _num_workers(model), model.source) for model in status.adapters),
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
    """Returns the first names, and the number of the others."""
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

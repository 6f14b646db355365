"""The workers, which run the model: `rq worker -w worker.LoraWorker`."""

from typing import Any

__all__ = ["LoraWorker"]


def __getattr__(name: str) -> Any:
    """Imports `LoraWorker` at its first use, so that an import of the engine does not load RQ and Redis."""
    if name != "LoraWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from worker.lora_worker import LoraWorker

    return LoraWorker

"""The GPU side: `rq worker -w worker.LoraWorker`."""

from typing import Any

__all__ = ["LoraWorker"]


def __getattr__(name: str) -> Any:
    """Imports `LoraWorker` on demand, so that importing the engine loads neither RQ nor Redis."""
    if name != "LoraWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from worker.lora_worker import LoraWorker

    return LoraWorker

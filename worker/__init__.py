"""The GPU side: `rq worker -w worker.LoraWorker`."""

from worker.lora_worker import LoraWorker

__all__ = ["LoraWorker"]

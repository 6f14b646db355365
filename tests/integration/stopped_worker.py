"""Worker classes that get a SIGTERM at the worst moment; for `rq worker -w`."""

import os
import signal
from typing import Any

from shared.settings import WorkerSettings
from worker import LoraWorker


class _Dying:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class StoppedWhileLoading(LoraWorker):
    """Gets SIGTERM inside a `__del__`, where Python ignores the exception that its handler raises."""

    def load_model(self, settings: WorkerSettings) -> Any:
        _Dying()
        return super().load_model(settings)


class StoppedWhileRegistering(LoraWorker):
    """Gets SIGTERM after RQ has registered it and before it listens to commands."""

    def subscribe(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class HeldWhileLoading(LoraWorker):
    """Says that it loads, and is killed there."""

    def load_model(self, settings: WorkerSettings) -> Any:
        self.log.info("Worker %s: loading", self.name)
        signal.pause()

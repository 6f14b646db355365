"""A worker that stops itself after loading its model, before it registers; for `rq worker -w`."""

import os
import signal
import sys
from typing import Any

from shared.settings import WorkerSettings
from worker import LoraWorker

LOADED = "model loaded"


class GatedWorker(LoraWorker):
    """Stops itself (SIGSTOP) after loading; SIGCONT lets it go on."""

    def load_model(self, settings: WorkerSettings) -> Any:
        model_runner = super().load_model(settings)
        sys.stderr.write(f"{LOADED}\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGSTOP)
        return model_runner

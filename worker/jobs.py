"""The function that RQ's job data names. It never runs: LoraWorker claims jobs without calling it."""


def generate() -> None:
    """Stops a stock worker that picked the job up.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("start this queue with -w worker.LoraWorker")

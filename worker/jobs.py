"""The function that RQ's jobs name. It never runs in a LoraWorker, which claims jobs without calling it."""


def generate() -> None:
    """Fails the job in a plain RQ worker that picked it up, with the command that starts the right one.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("start this queue with -w worker.LoraWorker")

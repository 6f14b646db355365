"""The function that Lorelay's jobs name. LoraWorkers never call it; in a plain RQ worker it raises."""


def generate() -> None:
    """Fails the job if a plain RQ worker took it; the message names the right worker class.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("start this queue with -w worker.LoraWorker")

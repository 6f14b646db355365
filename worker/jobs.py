"""The function that Lorelay's jobs name. LoraWorkers never call it; in a plain RQ worker it raises."""


def generate() -> None:
    """Fails the job if a plain RQ worker took it; the message names the right worker class.

    The API process whose client waits then puts the request back on its queue (`take_back.lua`).

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("start this queue with -w worker.LoraWorker")

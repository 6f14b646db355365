"""The function that Lorelay's jobs name. LoraWorkers never call this function; in a stock worker it fails."""


def generate() -> None:
    """Fails the job if a stock RQ worker took it; the message names the right worker class.

    The API process of the waiting client then puts the request back on its queue (`take_back.lua`).

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("start this queue with -w worker.LoraWorker")

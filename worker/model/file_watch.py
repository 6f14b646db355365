"""Notices that a model's files change on disk while a worker serves the model."""

import logging
import threading
from pathlib import Path

from shared.logs import fields
from worker.model.versions import Stamps, weight_stamps

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0


class FileWatch:
    """Logs a warning when weight files change; has a separate thread, because a disk may hang."""

    def __init__(self, folder: Path, stamps: Stamps, interval_s: float = INTERVAL_S) -> None:
        """`folder`: has the files to watch. `stamps`: the stamps of these files when they were loaded."""
        self._folder = folder
        self._stamps = stamps
        self._interval_s = interval_s
        self._is_closed = threading.Event()

    def start(self) -> None:
        """Starts a thread that checks at intervals until `close`."""
        threading.Thread(target=self._run, name="file watch", daemon=True).start()

    def check(self) -> bool:
        """Returns True, and logs a warning, if the files have changed since the last check."""
        try:
            now = weight_stamps(self._folder)
        except OSError as error:
            logger.warning("%s can't be read: %s", self._folder, error, extra=fields("watch_files"))
            return False
        if now == self._stamps:
            return False
        names = sorted({name for name, *_ in set(now) ^ set(self._stamps)})
        self._stamps = now
        logger.warning(
            "%s: %s changed on disk. This worker goes on with the weights that it has loaded; a restart "
            "loads the changed ones as another version",
            self._folder,
            ", ".join(names),
            extra=fields("watch_files"),
        )
        return True

    def close(self) -> None:
        """Ends the thread after its current check."""
        self._is_closed.set()

    def _run(self) -> None:
        while not self._is_closed.wait(self._interval_s):
            self.check()

"""SHA-256 of large files, computed once and kept in the cache folder."""

import hashlib
import logging
import os
from pathlib import Path

from shared.logs import fields
from worker.model.kernels.build_cache import cache_folder

logger = logging.getLogger(__name__)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's content.

    A file of the same place, size, inode and time of change is not read again.

    Raises:
        OSError: it can't be read.
    """
    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    try:
        kept = cache_folder() / "digests" / hashlib.sha256(identity.encode()).hexdigest()
        return _read(kept) or _keep(kept, _compute(path))
    except OSError as error:
        logger.info("digests are not kept: %s", error, extra=fields("load_model"))
        return _compute(path)


def _compute(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(kept: Path) -> str | None:
    """A digest that was kept; None if there is none, or a disk has cut it off."""
    text = kept.read_text() if kept.exists() else ""
    return text if len(text) == hashlib.sha256().digest_size * 2 else None


def _keep(kept: Path, digest: str) -> str:
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    unfinished.write_text(digest)
    unfinished.replace(kept)
    return digest

"""SHA-256 digests of large files, kept in the cache folder so that each file is read only once."""

import hashlib
import logging
import os
from pathlib import Path

from shared.logs import fields
from worker.model.kernels.build_cache import cache_folder

logger = logging.getLogger(__name__)


def file_digest(path: Path) -> str:
    """Returns the SHA-256 (hex) of a file's content.

    The digest is computed again if the file's path, size, inode or times have changed.

    Raises:
        OSError: the file can't be read.
    """
    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    try:
        stored = cache_folder() / "digests" / hashlib.sha256(identity.encode()).hexdigest()
        return _read(stored) or _store(stored, _compute(path))
    except OSError as error:
        logger.info("digests can't be stored: %s", error, extra=fields("load_model"))
        return _compute(path)


def _compute(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(stored: Path) -> str | None:
    """Returns the digest in a file of the cache, or None if this file is missing or truncated."""
    text = stored.read_text("utf-8") if stored.exists() else ""
    return text if len(text) == hashlib.sha256().digest_size * 2 else None


def _store(stored: Path, digest: str) -> str:
    stored.parent.mkdir(parents=True, exist_ok=True)
    unfinished = stored.with_suffix(f".{os.getpid()}")
    unfinished.write_text(digest, "utf-8")
    unfinished.replace(stored)
    return digest

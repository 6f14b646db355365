"""The cache folder, which keeps kernels, compiled graphs and digests of files for later starts."""

import contextlib
import logging
import os
import shutil
import struct
import time
from pathlib import Path

from shared.logs import fields

logger = logging.getLogger(__name__)

SCRATCH_PREFIX = "compiling-"
"""Prefix of the names of a compiler's scratch folders; a killed compiler leaves them behind."""
MAX_UNUSED_S = 30 * 24 * 3600
"""Seconds without use after which a graph or a build of the kernels is removed."""


def cache_folder() -> Path:
    """Returns the cache folder: `$XDG_CACHE_HOME/lorelay`, or `~/.cache/lorelay`.

    Raises:
        OSError: this user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorelay"
    except RuntimeError:
        raise OSError("this user has no home folder: set XDG_CACHE_HOME") from None


def mark_used(path: Path) -> None:
    """Marks an entry of the cache folder as used now, so that `drop_unused` keeps it."""
    with contextlib.suppress(OSError):  # the entry may belong to another user
        os.utime(path)


def drop_unused(folder: Path) -> None:
    """Removes the scratch folders of killed compilers, and entries that were not used for `MAX_UNUSED_S`.

    No compiler may run meanwhile, because this function would remove the scratch folder of the compiler.
    """
    oldest_s = time.time() - MAX_UNUSED_S
    left = list(folder.glob(f"{SCRATCH_PREFIX}*"))
    others = [path for kind in ("building-", "graph-", "kernels-") for path in folder.glob(f"{kind}*")]
    for path in left + [path for path in others if path.stat().st_mtime < oldest_s]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def drop_truncated(folder: Path) -> None:
    """Removes libraries that a power loss has truncated: loading such a library would kill the process."""
    for library in (*folder.glob("kernels-*.so"), *folder.glob("graph-*/**/*.so")):
        try:
            if not _is_truncated(library):
                continue
            built = folder / library.relative_to(folder).parts[0]
            shutil.rmtree(built) if built.is_dir() else built.unlink()
        except FileNotFoundError:  # another worker removed it first
            continue
        except OSError as error:
            logger.warning("can't check %s: %s", library, error, extra=fields("compile"))
            continue
        logger.warning("%s was truncated, and is removed", library, extra=fields("compile"))


def _is_truncated(library: Path) -> bool:
    """True if a 64-bit little-endian ELF file (man 5 elf) lacks its section table, the last part of the file.

    After a power loss, the file may have its full size, but zeros in place of the section table. Such a file
    counts as truncated, too. Files of other formats count as complete, because loading them only raises an
    error.
    """
    with library.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or not header.startswith(b"\x7fELF\2\1"):
            return False
        offset, entry_size, num_entries = struct.unpack("<40xQ10xHH2x", header)
        file.seek(offset)
        table = file.read(entry_size * num_entries)
    return len(table) < entry_size * num_entries or (bool(table) and not any(table))

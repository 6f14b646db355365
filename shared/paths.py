"""Paths as users write them."""

from pathlib import Path


def expand_home(path: str | Path) -> Path:
    """Returns a path with a leading `~` replaced by the home folder.

    Raises:
        ValueError: the home folder is not known. A container's user often has neither a name nor `HOME`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"the home folder in {str(path)!r} is not known: set HOME, or give a path without ~"
        ) from None

"""Paths and Hugging Face ids as users write them."""

import re
from pathlib import Path

_ID_WITH_REVISION = re.compile(r"(?P<id>\w[\w.-]*(?:/[\w.-]+)?)@(?P<revision>.*)")


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


def split_revision(name: str) -> tuple[str, str | None]:
    """Splits `owner/name@revision` into the Hugging Face id and the revision; None without an @.

    A name of any other form, such as a path, is returned whole. Callers must first look for a folder with the
    whole name.

    Raises:
        ValueError: nothing follows the @.
    """
    match = _ID_WITH_REVISION.fullmatch(name)
    if match is None:
        return name, None
    if not match["revision"]:
        raise ValueError(f"{name!r} names no revision after the @: give a branch, a tag or a commit")
    return match["id"], match["revision"]

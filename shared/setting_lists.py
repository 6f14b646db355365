"""Parses the settings that are lists: adapters, which may be in files, and weights of models."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shared.paths import expand_home, split_revision


class AdapterSource(NamedTuple):
    """One configured adapter: the name that clients use, and a local folder or a Hugging Face id."""

    name: str
    path: str


def parse_adapters(value: Any) -> Any:
    """Parses `"a=path b=path @file"`, or a single path, whose last folder is then the adapter's name.

    Raises:
        ValueError: an entry is malformed, a name is used twice or is `default`, or a file can't be read. If
            the entry is from a file, the message has the file's name and the line number.
    """
    entries = shlex.split(value) if isinstance(value, str) else value
    if entries and isinstance(entries[0], AdapterSource):
        return entries
    if len(entries) == 1 and "=" not in entries[0] and not entries[0].startswith("@"):
        entries = [f"{Path(_without_revision(entries[0])).name}={entries[0]}"]
    sources: dict[str, AdapterSource] = {}
    for entry in entries:
        for source, where in _read_list(entry[1:]) if entry.startswith("@") else [(_parse_named(entry), "")]:
            if source.name in sources:
                raise ValueError(f"{where}adapter name {source.name!r} is given twice")
            sources[source.name] = source
    return tuple(sources.values())


def _read_list(path: str) -> Iterator[tuple[AdapterSource, str]]:
    """Reads a file with one `name=path` per line; yields each adapter, and its file and line for messages.

    Blank lines and lines that begin with `#` are skipped. Paths may be relative to the file's folder.
    """
    file = expand_home(path).absolute()
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't read {path!r}: {getattr(error, 'strerror', error)}") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}: "
        try:
            source = _parse_named(line)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        yield AdapterSource(source.name, _beside(file.parent, source.path)), where


def _beside(folder: Path, path: str) -> str:
    """Makes a path that is relative to `folder` absolute; returns a Hugging Face id unchanged."""
    named = folder / expand_home(path)
    return str(named) if named.is_dir() or path.startswith((".", "~")) else path


def _parse_named(entry: str) -> AdapterSource:
    name, equals, path = entry.partition("=")
    if not (name and equals and path):
        raise ValueError(f"{entry!r} is not of the form name=path")
    check_name(name)
    if name == "default":
        raise ValueError("no adapter may be called 'default': RQ passes that name if no queue was given")
    _without_revision(path)
    return AdapterSource(name, path)


def _without_revision(path: str) -> str:
    """Returns a path, or the Hugging Face id in `owner/name@revision`.

    Raises:
        ValueError: nothing follows the @.
    """
    return path if Path(path).is_dir() else split_revision(path)[0]


def parse_weights(value: Any) -> Any:
    """Parses weights by model name, such as `"a=2 b=0.5"`.

    Raises:
        ValueError: an entry is malformed, a name is used twice, or a weight is not a positive number.
    """
    if not isinstance(value, str):
        return value
    weights: dict[str, float] = {}
    for entry in shlex.split(value):
        name, _, weight = entry.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not name or name in weights or not 0 < number < math.inf:
            raise ValueError(
                f"{entry!r} is not of the form name=weight, with a positive number, once per name"
            )
        weights[name] = number
    return weights


def check_name(name: str) -> None:
    """Refuses names that can't be part of a URL.

    Raises:
        ValueError: the name consists of dots, or has a character that can't be printed.
    """
    if name in (".", "..") or not name.isprintable():
        raise ValueError(f"{name!r} can't be the name of a model")

"""Reads files of adapters, which anybody may have written: only regular files up to a maximum size."""

import json
import os
import stat
import zipfile
from pathlib import Path
from typing import IO, Any

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""Maximum size of the header of a safetensors file; 20,000 tensors take 3 MB."""
MAX_CONFIG_BYTES = 4 * 1024 * 1024


class FileProblem(Exception):
    """A reason not to read a file, with the file's name."""


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file, or the file that a symbolic link leads to, unless it is a pipe, a device or a folder.

    Raises:
        FileNotFoundError: there is no such file.
        FileProblem: the file is not regular, or can't be opened.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileProblem(f"{path.name} can't be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileProblem(f"{path.name} is no regular file")
    return os.fdopen(fd, "rb")


def read_file(path: Path, max_num_bytes: int) -> bytes:
    """Returns the content of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        FileProblem: the file is not regular, is too large, or can't be read.
    """
    with open_regular(path) as file:
        content = file.read(max_num_bytes + 1)
    if len(content) > max_num_bytes:
        raise FileProblem(f"{path.name} is larger than {_mib(max_num_bytes)}")
    return content


def read_json(path: Path, max_num_bytes: int = MAX_CONFIG_BYTES) -> Any:
    """Returns the content of a JSON file; raises the errors of `read_file`, also if it is not JSON."""
    content = read_file(path, max_num_bytes)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise FileProblem(f"{path.name} is nested too deeply") from error
    except ValueError as error:
        raise FileProblem(f"{path.name} is not JSON: {error}") from error


def check_size(path: Path, max_num_bytes: int) -> None:
    """Checks that a file is regular and not too large, without reading it.

    Raises:
        FileProblem: the file is not regular, or is too large.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes > max_num_bytes:
        raise FileProblem(
            f"{path.name} has {_mib(num_bytes)}, and only {_mib(max_num_bytes)} are free for it"
        )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes in the header of a safetensors file, by the names of the tensors.

    Raises:
        FileProblem: the header is damaged or too large, or the file's size does not match its tensors.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, num_bytes - 8):
            raise FileProblem(f"{path.name} is no safetensors file: its header has {header_bytes} bytes")
        header = file.read(header_bytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        shapes = {str(name): tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    # A damaged header is anything.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise FileProblem(f"{path.name} has a damaged header: {error!r}") from error
    if 8 + header_bytes + end != num_bytes:
        raise FileProblem(f"{path.name} has {num_bytes} bytes, but its tensors take {8 + header_bytes + end}")
    return shapes


def check_archive(path: Path) -> None:
    """Checks that a weight file of torch, a zip archive, is not compressed: it could then fill the memory.

    Raises:
        FileProblem: the file is not regular, or its content is compressed.
    """
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        num_bytes = os.fstat(file.fileno()).st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FileProblem(f"{path.name} is compressed")
    if sum(entry.file_size for entry in entries) > num_bytes:
        raise FileProblem(f"{path.name} claims to contain more than its size")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"

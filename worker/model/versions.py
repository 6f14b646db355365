"""Weights versions, computed from files alone. All engines must give the same version for the same files.

The registry compares the versions of all workers, and a request runs only on workers that have its version.
"""

import hashlib
from pathlib import Path

from worker.model.digests import file_digest

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
"""Patterns of the weight files in a model's folder."""

Stamps = list[tuple[str, int, int, int, int]]
"""Name, inode, size, and times of modification and change (ns) of each file; a write changes them."""


def weight_stamps(folder: Path) -> Stamps:
    """Returns the stamps of a model's config and weight files.

    Raises:
        OSError: a file can't be read.
    """
    files = sorted(file for pattern in ("config.json", *WEIGHT_PATTERNS) for file in folder.glob(pattern))
    stats = [(file.name, file.stat()) for file in files]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]


def model_version(folder: Path) -> str:
    """Returns the SHA-256 (hex) of `config.json` and of the weight files' names and contents."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def own_version(adapter: str, tokenizer_digest: str) -> str:
    """Returns the version of an adapter with a tokenizer, template or end tokens of its own."""
    return hashlib.sha256(f"{adapter} {tokenizer_digest}".encode()).hexdigest()


def adapter_version(config_file: Path, weight_file: Path) -> str:
    """Returns the SHA-256 (hex) of an adapter's config and of its weight file."""
    digest = hashlib.sha256()
    for file in (config_file, weight_file):
        with file.open("rb") as stream:
            # Without names and sizes, the digest would not change if bytes moved from one file to the next.
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()

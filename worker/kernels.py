"""C++ for the two products of a decode step that PyTorch has no call for, on a CPU with a compiler.

Built once per machine, while the model loads; without a compiler PyTorch's own calls do the same, slower.
"""

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from shared.logs import fields

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILER = "g++"
"""Its OpenMP is that of PyTorch: another one's threads would fight with PyTorch's for the cores."""
_FLAGS = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


def make_callable(device: torch.device, folder: Path | None = None) -> bool:
    """Loads the kernels, built where need be. Whether they can be called: if not, the log tells why.

    `folder` keeps what is built, by default `$XDG_CACHE_HOME/lorelay` or `~/.cache/lorelay`.
    """
    if device.type != "cpu":
        return False
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorelay"
    try:
        path = folder / f"kernels-{_fingerprint()}.so"
        if not path.exists():
            _build(path)
        _load(path)
    except OSError as error:
        # Many machines have no compiler; one that fails should be looked at.
        level = logging.INFO if isinstance(error, FileNotFoundError) else logging.WARNING
        reason = error.__cause__ or error
        logger.log(
            level, "C++ kernels: none, PyTorch's calls instead: %s", reason, extra=fields("load_model")
        )
        return False
    logger.info("C++ kernels: %s", path, extra=fields("load_model"))
    return True


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    cache: tuple[Tensor, Tensor],
    decodes: tuple[Tensor, Tensor, Tensor],
    *,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Stores all keys and values, and attends from those query rows that decode.

    `query` (num_heads, T, head_dim), `key` and `value` (num_kv_heads, T, head_dim); `slots` (T,), where they
    go in the layer's `cache`. `decodes` is (rows, block_tables, positions): row `rows[n]` stands at
    `positions[n]` of the sequence whose blocks are `block_tables[n]`. The output is (T, num_heads, head_dim),
    undefined in other rows.
    """
    output: Tensor = torch.ops.lorelay.paged_attention(
        query, key, value, slots, *cache, *decodes, scaling, window or 0
    )
    return output


def add_lora(
    output: Tensor, rows: Tensor, a: Tensor, b: Tensor, index: Tensor, runs: Tensor, ranks: Tensor
) -> None:
    """Adds the adapters' part, B (A x) of its own adapter, to some rows of a layer's output (T, out).

    `rows` (T, in) is the layer's input; `a` (sum of ranks, in) and `b` (sum of ranks, out) hold the adapters'
    weights; slot s owns ranks `ranks[s]` = (first, number). A run (slot, first, number) names that part of
    `index` whose rows are the slot's.
    """
    torch.ops.lorelay.add_lora(output, rows, a, b, index, runs, ranks)


def _build(path: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    folders = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    libraries = ["-ltorch_cpu", "-lc10"]  # those that this process has loaded already
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as scratch:
        output = Path(scratch) / path.name
        _run_compiler("-shared", "-fPIC", *folders, str(_SOURCE), "-o", str(output), *libraries)
        # Another worker may build the same at this time: whichever comes last replaces it whole.
        output.replace(path)


def _load(path: Path) -> None:
    if _are_loaded():
        return
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError:
        path.unlink()  # the next start builds anew
        raise


def _are_loaded() -> bool:
    """Whether this process has them already; PyTorch would refuse to register the same names twice."""
    return hasattr(torch.ops.lorelay, "paged_attention")


def _fingerprint() -> str:
    """Changes with whatever the built file depends on; `native` means another one on each kind of CPU."""
    target = _run_compiler("-Q", "--help=target")
    parts = (_SOURCE.read_bytes(), target, torch.__version__.encode(), platform.platform().encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _run_compiler(*arguments: str) -> bytes:
    """What it prints. Raises `OSError`: there is none, or it fails."""
    done = subprocess.run([_COMPILER, *_FLAGS, *arguments], capture_output=True, check=False)
    if done.returncode:
        errors = done.stderr.decode(errors="replace").strip()
        raise OSError(f"{_COMPILER} failed: {errors[:500]}")
    return done.stdout

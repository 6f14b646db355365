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
_UNAVAILABLE = "C++ kernels: none, PyTorch's calls instead: %s"
_FLAGS = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


class Build:
    """A compiler at work, or what it made earlier."""

    def __init__(self, folder: Path) -> None:
        """Starts it, where `folder` holds no kernels for this source, machine and PyTorch yet.

        Raises:
            OSError: there is no compiler, or `folder` can't be written to.
        """
        self._path = folder / f"kernels-{_fingerprint()}.so"
        self._compiler: subprocess.Popen[str] | None = None
        if self._path.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix="building-", dir=folder)
        self._output = Path(self._scratch.name) / "kernels.so"
        self._compiler = subprocess.Popen(
            _command(self._output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> bool:
        """Waits for the compiler; whether the kernels can be called now. If not, the log tells why."""
        try:
            self._keep_output()
            if not _are_loaded():
                torch.ops.load_library(self._path)  # type: ignore[no-untyped-call]
        except OSError as error:
            self._path.unlink(missing_ok=True)  # the next start builds anew
            logger.warning(
                "C++ kernels: none, PyTorch's calls instead: %s", error, extra=fields("load_model")
            )
            return False
        logger.info("C++ kernels: %s", self._path, extra=fields("load_model"))
        return True

    def _keep_output(self) -> None:
        if self._compiler is None:
            return
        _, errors = self._compiler.communicate()
        with self._scratch:
            if self._compiler.returncode:
                raise OSError(f"{_COMPILER} failed: {errors.strip()[:500]}")
            # Another worker may build the same at this time: whichever comes last replaces it whole.
            self._output.replace(self._path)


def start_build(device: torch.device, folder: Path | None = None) -> Build | None:
    """The build of the kernels for a device; None where there can't be any, and the log tells why.

    `folder` keeps what is built, by default `$XDG_CACHE_HOME/lorelay` or `~/.cache/lorelay`.
    """
    if device.type != "cpu":
        return None
    try:
        return Build(folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorelay")
    except OSError as error:
        logger.info(_UNAVAILABLE, error, extra=fields("load_model"))
        return None


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


def _are_loaded() -> bool:
    """Whether this process has them already; PyTorch would refuse to register the same names twice."""
    return hasattr(torch.ops.lorelay, "paged_attention")


def _command(output: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    folders = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    libraries = ["-ltorch_cpu", "-lc10"]  # those that this process has loaded already
    return [_COMPILER, *_FLAGS, "-shared", "-fPIC", *folders, str(_SOURCE), "-o", str(output), *libraries]


def _fingerprint() -> str:
    """Changes with whatever the built file depends on; `native` means another one on each kind of CPU."""
    target = subprocess.run(
        [_COMPILER, *_FLAGS, "-Q", "--help=target"], capture_output=True, check=True
    ).stdout
    parts = (_SOURCE.read_bytes(), target, torch.__version__.encode(), platform.platform().encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

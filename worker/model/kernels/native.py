"""The operators of a forward pass in C++, on a CPU with a compiler.

Built once per machine, while the model loads; without a compiler PyTorch's own calls do the same, slower.
"""

import contextlib
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shared.logs import fields
from worker.model.kernels.threads import COMPILER

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "cpp" / "operators.cpp"
_REORDERED_SUMS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
"""Sums of many numbers need vectors; NaN and infinity stay what they are."""
_FLAGS = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-fno-math-errno", *_REORDERED_SUMS)


def make_callable(device: torch.device, folder: Path | None = None) -> bool:
    """Loads the kernels, built where need be. Whether they can be called: if not, the log tells why.

    `folder` keeps what is built, by default `cache_folder()`.
    """
    if device.type != "cpu":
        return False
    try:
        path = (folder or cache_folder()) / f"kernels-{fingerprint()}.so"
        if not path.exists():
            _build(path)
        _load(path)
        mark_used(path)
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


def cache_folder() -> Path:
    """Where what is built is kept, by default: `$XDG_CACHE_HOME/lorelay` or `~/.cache/lorelay`.

    Raises:
        OSError: there is no such folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorelay"
    except RuntimeError:
        raise OSError("this user has no home folder: set XDG_CACHE_HOME") from None


def mark_used(path: Path) -> None:
    """Keeps something in the cache folder from being dropped for a while."""
    with contextlib.suppress(OSError):  # it may be another user's
        os.utime(path)


class OperatorState(Protocol):
    """What the operators of one model need beside their arguments."""

    def set_linears(
        self,
        number: int,
        sizes: list[int],
        weight: Tensor,
        bias: Tensor | None,
        is_packed: bool,
        sees_kept_rows: bool,
    ) -> None:
        """Linears that are one product: `number` has `sizes[0]` outputs, `number + 1` has `sizes[1]`, ...

        `weight` (sum of sizes, in), or what `packed` made of it; which of a step's rows they see.
        """

    def set_adapters(self, number: int, a: Tensor, b: Tensor, ranks: Tensor) -> None:
        """The adapters of a Linear: `a` (sum of ranks, in) and `b` (sum of ranks, out), scaled.

        Slot s owns ranks `ranks[s]` = (first, number).
        """

    def set_cache(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """A layer's part of the KV cache."""

    def set_adapter_rows(self, kept: bool, index: Tensor, runs: Tensor, long_spans: Tensor) -> None:
        """Whose rows the next step has: of all tokens, or of the kept ones; see `model.lora.StepRows`."""

    def begin_step(
        self,
        slots: Tensor,
        rows: Tensor,
        tables: Tensor,
        positions: Tensor,
        chunks: Tensor,
        chunk_tables: list[Tensor],
    ) -> None:
        """Makes this the state of the operators that this thread calls from now on.

        `slots` (T,): where the entries of all tokens go in the cache. Of the sequences that decode, row
        `rows[n]` stands at `positions[n]` of the one whose blocks are `tables[n]`. The others have chunks
        `chunks[n]` = (first row, number of rows, first position), and blocks `chunk_tables[n]`.
        """


def new_state() -> OperatorState:
    """An empty state."""
    state: OperatorState = torch.classes.lorelay.OperatorState()
    return state


class CompiledGraph(Protocol):
    """A compiled forward pass; other threads of Python go on while it runs."""

    def tensor_paths(self) -> dict[str, str]:
        """The path in the exported model of each tensor that the graph takes, by its name in the graph."""

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Gives it all tensors by their names; it reads them where they are."""

    def run(self, token_ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        """Token ids and positions (1, T) and the kept rows (n,) to logits (n, vocab)."""


def load_graph(library: Path) -> CompiledGraph:
    """The graph in a library that `worker.model.compile_graph` made.

    Raises:
        RuntimeError: it is none, or damaged.
    """
    graph: CompiledGraph = torch.classes.lorelay.CompiledGraph(str(library))
    return graph


def linear(number: int, num_outputs: int, rows: Tensor) -> Tensor:
    """W x + b, and B (A x) of each row's adapter, of the Linears whose product has this number.

    `rows` is (..., in), the output (..., num_outputs).
    """
    output: Tensor = torch.ops.lorelay.linear(rows, number, num_outputs)
    return output


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layer: int,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The attention of one layer in the step that has begun, as `worker.model.attention` describes it."""
    output: Tensor = torch.ops.lorelay.attention(query, key, value, sinks, layer, scaling, window, softcap)
    return output


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
    return hasattr(torch.ops.lorelay, "attention")


def fingerprint() -> str:
    """Changes with whatever the built file depends on; `native` means another one on each kind of CPU.

    Raises:
        OSError: there is no compiler.
    """
    compiler = _run_compiler("-dumpfullversion") + _run_compiler("-Q", "--help=target")
    sources = [file.read_bytes() for file in sorted(_SOURCE.parent.glob("*.[ch]*"))]
    parts = (sources, COMPILER, _FLAGS, compiler, torch.__version__, platform.platform())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _run_compiler(*arguments: str) -> bytes:
    """What it prints. Raises `OSError`: there is none, or it fails."""
    done = subprocess.run([COMPILER, *_FLAGS, *arguments], capture_output=True, check=False)
    if done.returncode:
        errors = done.stderr.decode(errors="replace").strip()
        raise OSError(f"{COMPILER} failed: {errors[:500]}")
    return done.stdout

"""C++ kernels for the forward pass on a CPU: Linears with their adapters, attention, compiled graphs.

The kernels are built once per machine, while the model loads. Without a compiler, PyTorch's operators compute
the same results, but take longer.
"""

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shared.logs import fields
from worker.model.kernels.build_cache import cache_folder, mark_used
from worker.model.kernels.threads import COMPILER

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "cpp" / "kernels.cpp"
_REORDERED_SUMS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
"""Options that let the compiler vectorise sums. Unlike -ffast-math, they leave NaN and infinity intact."""
_FLAGS = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-fno-math-errno", *_REORDERED_SUMS)

_TERMINAL_VARIABLES = ("LANGUAGE", "LANG", "TERM", "GCC_COLORS", "GCC_URLS", "TERM_URLS")


def make_callable(device: torch.device, folder: Path | None = None) -> bool:
    """Loads the kernels into this process; first builds them if `folder` (default: the cache) lacks them.

    Returns False, and logs the reason, if the kernels can't be used.
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
        # A machine without a compiler is usual; a compiler that fails deserves a warning.
        level = logging.INFO if isinstance(error, FileNotFoundError) else logging.WARNING
        reason = error.__cause__ or error
        logger.log(
            level, "C++ kernels: none, PyTorch's calls instead: %s", reason, extra=fields("load_model")
        )
        return False
    logger.info("C++ kernels: %s", path, extra=fields("load_model"))
    return True


class KernelState(Protocol):
    """Inputs of the kernels that are not arguments: weights, adapters, KV cache, attention metadata.

    Each model has its own state. Linears are identified by their numbers in `products.FusedLinears`.
    """

    def set_linears(
        self,
        number: int,
        sizes: list[int],
        weight: Tensor,
        bias: Tensor | None,
        is_packed: bool,
        sees_sampled_rows: bool,
    ) -> None:
        """Sets fused Linears.

        Linear `number` has `sizes[0]` outputs, Linear `number + 1` has `sizes[1]`, etc.

        `weight` is (sum of sizes, in). If `is_packed` is true, `products.pack` has packed it.
        """

    def set_adapters(self, number: int, a: Tensor, b: Tensor, ranks: Tensor) -> None:
        """Sets a Linear's adapters: `a` (sum of ranks, in) and `b` (sum of ranks, out), which are scaled.

        The rows `ranks[s]` = (first, count) of `a` and `b` belong to slot s.
        """

    def set_cache(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Sets a layer's tensors of the KV cache."""

    def set_adapter_rows(self, sampled: bool, index: Tensor, runs: Tensor, long_spans: Tensor) -> None:
        """Sets the slots of the next step's token rows, or of its `sampled` rows; see `lora.StepRows`."""

    def begin_step(
        self,
        cache_indices: Tensor,
        rows: Tensor,
        tables: Tensor,
        positions: Tensor,
        chunks: Tensor,
        chunk_tables: list[Tensor],
    ) -> None:
        """Sets a step's attention metadata; in this thread, the kernels use this `KernelState` from now on.

        `cache_indices` (T,) tells where to store the keys and values of all tokens. Row `rows[n]` is a decode
        at position `positions[n]` of a sequence with block table `tables[n]`. All other rows belong to prompt
        chunks: `chunks[n]` = (first row, number of rows, first position), with block table `chunk_tables[n]`.
        """


def new_state() -> KernelState:
    """Returns an empty state."""
    state: KernelState = torch.classes.lorelay.KernelState()
    return state


class CompiledGraph(Protocol):
    """A compiled forward pass, which releases Python's global lock while it runs."""

    def tensor_paths(self) -> dict[str, str]:
        """Returns, for each tensor that the graph reads: name in the graph → path in the exported model."""

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Sets all tensors, by their names in the graph; the graph reads them without copying them."""

    def run(self, token_ids: Tensor, positions: Tensor, sampled_rows: Tensor) -> Tensor:
        """Returns logits (n, vocab) for token ids (1, T), positions (1, T) and the n sampled rows (n,)."""


def load_graph(library: Path) -> CompiledGraph:
    """Loads a graph that `worker.model.compile_graph` has compiled.

    Raises:
        RuntimeError: the file is damaged, or is no graph.
    """
    graph: CompiledGraph = torch.classes.lorelay.CompiledGraph(str(library))
    return graph


def linear(number: int, num_outputs: int, rows: Tensor) -> Tensor:
    """Computes W x + b, plus B (A x) of each row's adapter, for the fused Linears from `number` on.

    `rows` is (..., in); the output is (..., num_outputs).
    """
    output: Tensor = torch.ops.lorelay.linear(rows, number, num_outputs)
    return output


class AttentionOptions(NamedTuple):
    """Attention parameters of one layer."""

    scaling: float
    """Factor of the products of queries and keys."""
    window: int | None
    """Maximum number of keys that a query sees, counted back from its own position; None: no limit."""
    softcap: float | None
    """Bound to which scores are capped; None: not capped."""
    sinks: Tensor | None
    """(num_heads,): a score per head that is added to the softmax without a value; None: no sinks."""

    @property
    def are_plain(self) -> bool:
        """True if PyTorch's attention supports all of these parameters that are set."""
        return self.softcap is None and self.sinks is None


def attention(query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions) -> Tensor:
    """Computes the attention of one layer in the current step; shapes as in `worker.model.attention`."""
    scaling, window, softcap, sinks = options
    output: Tensor = torch.ops.lorelay.attention(query, key, value, sinks, layer, scaling, window, softcap)
    return output


def _build(path: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    folders = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    libraries = ["-ltorch_cpu", "-lc10"]  # this process has loaded them, so no run-time path is needed
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as scratch:
        output = Path(scratch) / path.name
        _run_compiler("-shared", "-fPIC", *folders, str(_SOURCE), "-o", str(output), *libraries)
        # Without the atomic rename, another worker that builds the same file now could load half a file.
        output.replace(path)


def _load(path: Path) -> None:
    if _are_loaded():
        return
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError:
        path.unlink()  # so that the next start builds it again
        raise


def _are_loaded() -> bool:
    """True if this process has loaded the kernels, which PyTorch refuses to load twice."""
    return hasattr(torch.ops.lorelay, "attention")


def fingerprint() -> str:
    """Returns a digest of all that the library depends on, including the CPU because of `-march=native`.

    The digest leaves out the release of Linux and the name of the host. Otherwise, every update of the system
    would lead to a new build of kernels and graph.

    Raises:
        OSError: there is no compiler.
    """
    compiler = _run_compiler("-dumpfullversion") + _run_compiler("-Q", "--help=target")
    sources = [file.read_bytes() for file in sorted(_SOURCE.parent.glob("*.[ch]*"))]
    system = platform.system(), platform.machine(), platform.libc_ver()
    parts = (sources, COMPILER, _FLAGS, compiler, torch.__version__, system)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _run_compiler(*arguments: str) -> bytes:
    """Runs the compiler and returns its output.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    # The compiler wraps its help by the width of the terminal, and translates it.
    environment = {name: value for name, value in os.environ.items() if name not in _TERMINAL_VARIABLES}
    done = subprocess.run(
        [COMPILER, *_FLAGS, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env=environment | {"COLUMNS": "80", "LC_ALL": "C"},
    )
    if done.returncode:
        errors = done.stderr.decode(errors="replace").strip()
        raise OSError(f"{COMPILER} failed: {errors[:500]}")
    return done.stdout

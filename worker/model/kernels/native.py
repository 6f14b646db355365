"""C++ kernels for the forward pass on a CPU: Linears with their adapters, attention, compiled graphs.

They are built once per machine, while the model loads. Without a compiler, PyTorch's own calls compute the
same, slower.
"""

import hashlib
import logging
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
"""Options without which sums are not vectorised. NaN and infinity keep their meaning, unlike with
-ffast-math."""
_FLAGS = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-fno-math-errno", *_REORDERED_SUMS)


def make_callable(device: torch.device, folder: Path | None = None) -> bool:
    """Loads the kernels into this process, and builds them first if need be. False: they can't be used.

    The log has the reason. `folder`, by default `cache_folder()`, keeps the built library.
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
        # Many machines have no compiler, which is fine; a compiler that fails deserves a warning.
        level = logging.INFO if isinstance(error, FileNotFoundError) else logging.WARNING
        reason = error.__cause__ or error
        logger.log(
            level, "C++ kernels: none, PyTorch's calls instead: %s", reason, extra=fields("load_model")
        )
        return False
    logger.info("C++ kernels: %s", path, extra=fields("load_model"))
    return True


class KernelState(Protocol):
    """Weights, adapters, KV cache and layout of the step: the kernels' inputs beside their arguments.

    Each model has its own state. Linears go by the numbers of `products.FusedLinears`.
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
        """Sets one product: Linear `number` has `sizes[0]` outputs, Linear `number + 1` has `sizes[1]`, ...

        `weight` is (sum of sizes, in), or what `products.pack` made of it.
        """

    def set_adapters(self, number: int, a: Tensor, b: Tensor, ranks: Tensor) -> None:
        """Sets a Linear's adapters: `a` (sum of ranks, in) and `b` (sum of ranks, out), scaled.

        Slot s owns the rows `ranks[s]` = (first, count) of both.
        """

    def set_cache(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Sets a layer's part of the KV cache."""

    def set_adapter_rows(self, sampled: bool, index: Tensor, runs: Tensor, long_spans: Tensor) -> None:
        """Sets the slots of the next step's token rows or sampled rows; see `lora.StepRows`."""

    def begin_step(
        self,
        cache_indices: Tensor,
        rows: Tensor,
        tables: Tensor,
        positions: Tensor,
        chunks: Tensor,
        chunk_tables: list[Tensor],
    ) -> None:
        """Sets a step's layout, and makes this the state of all kernels that the thread calls from now on.

        `cache_indices` (T,): where the keys and values of all tokens go in the cache. Row `rows[n]` decodes,
        at `positions[n]` of a sequence with blocks `tables[n]`. All other rows are chunks of prompts,
        `chunks[n]` = (first row, number of rows, first position), with blocks `chunk_tables[n]`.
        """


def new_state() -> KernelState:
    """An empty state."""
    state: KernelState = torch.classes.lorelay.KernelState()
    return state


class CompiledGraph(Protocol):
    """A compiled forward pass. It releases Python's global lock while it runs."""

    def tensor_paths(self) -> dict[str, str]:
        """The tensors that the graph reads: names in the graph to paths in the exported model."""

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Sets all tensors by their names in the graph, which reads them without a copy."""

    def run(self, token_ids: Tensor, positions: Tensor, sampled_rows: Tensor) -> Tensor:
        """Token ids and positions (1, T) and the sampled rows (n,) to logits (n, vocab)."""


def load_graph(library: Path) -> CompiledGraph:
    """Loads a graph that `worker.model.compile_graph` made.

    Raises:
        RuntimeError: the file is damaged, or is something else.
    """
    graph: CompiledGraph = torch.classes.lorelay.CompiledGraph(str(library))
    return graph


def linear(number: int, num_outputs: int, rows: Tensor) -> Tensor:
    """W x + b, plus B (A x) of each row's adapter, for the product whose first Linear has this number.

    `rows` is (..., in), the output (..., num_outputs).
    """
    output: Tensor = torch.ops.lorelay.linear(rows, number, num_outputs)
    return output


class AttentionOptions(NamedTuple):
    """A model's wishes for the attention of one layer."""

    scaling: float
    window: int | None
    """Keys that a query sees, counted back from its own; None is all."""
    softcap: float | None
    """Bound of the scores."""
    sinks: Tensor | None
    """(num_heads,): one more score per head, which takes weight and adds no value."""

    @property
    def are_plain(self) -> bool:
        """True if PyTorch's own attention knows all that are set."""
        return self.softcap is None and self.sinks is None


def attention(query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions) -> Tensor:
    """The attention of one layer in the step that has begun; shapes as in `worker.model.attention`."""
    scaling, window, softcap, sinks = options
    output: Tensor = torch.ops.lorelay.attention(query, key, value, sinks, layer, scaling, window, softcap)
    return output


def _build(path: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    folders = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    libraries = ["-ltorch_cpu", "-lc10"]  # this process has them loaded, so nothing further is needed
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as scratch:
        output = Path(scratch) / path.name
        _run_compiler("-shared", "-fPIC", *folders, str(_SOURCE), "-o", str(output), *libraries)
        # Another worker may build the same file now. The rename is atomic, so neither loads half a file.
        output.replace(path)


def _load(path: Path) -> None:
    if _are_loaded():
        return
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError:
        path.unlink()  # the next start builds it again
        raise


def _are_loaded() -> bool:
    """True if this process has loaded the kernels; PyTorch refuses to register the same names twice."""
    return hasattr(torch.ops.lorelay, "attention")


def fingerprint() -> str:
    """A digest of everything the library depends on, the CPU among it: `-march=native` differs between CPUs.

    Raises:
        OSError: there is no compiler.
    """
    compiler = _run_compiler("-dumpfullversion") + _run_compiler("-Q", "--help=target")
    sources = [file.read_bytes() for file in sorted(_SOURCE.parent.glob("*.[ch]*"))]
    parts = (sources, COMPILER, _FLAGS, compiler, torch.__version__, platform.platform())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _run_compiler(*arguments: str) -> bytes:
    """The compiler's output.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    done = subprocess.run([COMPILER, *_FLAGS, *arguments], capture_output=True, check=False)
    if done.returncode:
        errors = done.stderr.decode(errors="replace").strip()
        raise OSError(f"{COMPILER} failed: {errors[:500]}")
    return done.stdout

"""The forward pass as a compiled graph, which takes over from PyTorch's eager one once it is there."""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import torch
import transformers
from torch import Tensor, nn

from shared.logs import fields
from shared.messages import ForwardState
from worker.model import attention, compile_graph
from worker.model.compile_graph import SMALL, Job
from worker.model.kernels import native, packed
from worker.model.self_check import TOLERANCES, relative_error

logger = logging.getLogger(__name__)

Inputs = tuple[Tensor, Tensor, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Token ids and positions (1, T) and the kept rows (n,) to logits (n, vocab)."""

STOP_LIMIT_S = 5.0
"""The compiler's, to clean up."""
MAX_NUM_DIFFERING_STEPS = 8
"""A row of bfloat16 now and then depends on rounding alone; a graph that is wrong is so in every step."""
LOCK_POLL_S = 0.2
KEPT_UNUSED_S = 30 * 24 * 3600
"""A graph or a build of the kernels that no worker has loaded for so long goes."""


class CompiledForward:
    """A forward pass that is eager at first, and from some time on compiled.

    The graph is compared with the eager pass when it is first used, and dropped if they differ.
    """

    def __init__(self, eager: Forward, model: nn.Module, job: Job) -> None:
        """Begins to compile in the background; `model` is the one that `eager` runs."""
        self.state = ForwardState.COMPILING
        """`EAGER` is for good."""
        self._eager = eager
        self._model = model
        self._job = job
        self._output = Path(job.output)
        self._graph: Forward | None = None
        self._is_checked = {True: False, False: False}
        """For single tokens, and for several."""
        self._num_differing_steps = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="compile", daemon=True)
        self._thread.start()

    def __call__(self, token_ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        """The logits of a step."""
        inputs = token_ids, positions, kept
        graph, is_single = self._graph, token_ids.shape[1] == 1
        if graph is not None and self._is_checked[is_single]:
            return graph(*inputs)
        if graph is not None and len(kept):
            return self._compare(graph, inputs)
        return self._eager(*inputs)

    def wait(self) -> None:
        """Returns when it compiles no more."""
        self._thread.join()

    def close(self) -> None:
        """Stops compiling."""
        with self._lock:
            self._is_closed.set()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._signal(number)
            self._thread.join(STOP_LIMIT_S)

    def _compare(self, graph: Forward, inputs: Inputs) -> Tensor:
        """The eager pass's logits. It comes second: what the graph left in the KV cache is overwritten."""
        logits: Tensor | Exception
        try:
            logits = graph(*inputs)
        except Exception as error:
            logits = error
        expected = self._eager(*inputs)
        if isinstance(logits, Exception):
            self._refuse(f"fails ({type(logits).__name__}: {logits})")
        elif logits.shape != expected.shape:
            self._refuse(f"gives logits of shape {list(logits.shape)}, not {list(expected.shape)}")
        else:
            rows = expected.isfinite().all(dim=-1)
            pairs = zip(logits[rows], expected[rows], strict=True)
            self._judge([relative_error(*pair) for pair in pairs], inputs[0].shape[1] == 1, expected.dtype)
        return expected

    def _judge(self, errors: list[float], is_single: bool, dtype: torch.dtype) -> None:
        """Decides by the errors of those rows of logits that could be compared."""
        differing = [error for error in errors if not error <= TOLERANCES[dtype]]  # NaN is one
        if not differing:
            self._is_checked[is_single] = bool(errors)
            return
        self._num_differing_steps += 1
        if self._num_differing_steps == MAX_NUM_DIFFERING_STEPS:
            self._refuse(
                f"gives other logits than the eager pass in {len(differing)} of {len(errors)} rows (off by "
                f"{differing[0]:.2g} of their spread), as in {MAX_NUM_DIFFERING_STEPS - 1} steps before"
            )

    def _refuse(self, problem: str) -> None:
        """Keeps the graph: the next start need not compile to find the same."""
        self._fall_back(f"the graph {problem}; remove {self._output} to compile anew")

    def _prepare(self) -> None:
        started_s = time.monotonic()
        try:
            if not self._output.exists():
                logger.info("forward pass: eager, compiling in the background", extra=fields("compile"))
                with self._turn():
                    if not self._output.exists():
                        self._compile()
            graph = self._load()
        # Whatever it is, there is a forward pass that works.
        except Exception as error:
            self._fall_back(f"{type(error).__name__}: {error}")
            return
        # In this order: a step that finds the graph may find it wrong at once.
        self.state = ForwardState.COMPILED
        self._graph = graph
        took_s = time.monotonic() - started_s
        logger.info("forward pass: compiled, after %.0f s", took_s, extra=fields("compile"))

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Of all workers with this folder, one at a time: a compiler takes half a gigabyte."""
        with self._output.with_name("compile.lock").open("w") as file:
            while not _try_to_lock(file):
                if self._is_closed.wait(LOCK_POLL_S):
                    raise RuntimeError("the worker ends")
            yield

    def _compile(self) -> None:
        folder = self._output.parent
        drop_unused(folder)
        log = folder / f"{self._output.name}.log"
        with log.open("wb") as output, self._lock:
            if self._is_closed.is_set():
                raise RuntimeError("the worker ends")
            self._process = subprocess.Popen(
                [sys.executable, "-m", compile_graph.__name__],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # with the compilers that it starts; Ctrl-C is not for them
            )
        with contextlib.suppress(BrokenPipeError), self._process as process:  # its exit code says more
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(self._job) + b"\n")
            process.stdin.flush()
            process.wait()
        if self._process.returncode:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(
                f"{lines[-1] if lines else 'no output'} (exit code {self._process.returncode}; "
                f"all that the compiler said: {log})"
            )
        log.unlink()

    def _signal(self, number: int) -> None:
        # One that ends meanwhile is what is wanted.
        with contextlib.suppress(ProcessLookupError):
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, number)

    def _load(self) -> Forward:
        try:
            (library,) = self._output.rglob("*.so")
            graph = native.load_graph(library)
            own = compile_graph.tensors(self._model)
            paths = graph.tensor_paths()
            graph.set_tensors(
                {name: own[path.removeprefix(compile_graph.PREFIX)] for name, path in paths.items()}
            )
        except Exception:
            shutil.rmtree(self._output, ignore_errors=True)  # the next start compiles anew
            raise
        native.mark_used(self._output)
        return graph.run

    def _fall_back(self, reason: str) -> None:
        self._graph, self.state = None, ForwardState.EAGER
        if not self._is_closed.is_set():
            logger.warning(
                "forward pass: eager, not compiled: %s (LORELAY_COMPILE=kernels: it is not tried)",
                reason,
                extra=fields("compile"),
            )


def drop_unused(folder: Path) -> None:
    """Removes what killed compilers left in a cache folder, and what no worker has loaded for long.

    To be called by one process at a time.
    """
    oldest_s = time.time() - KEPT_UNUSED_S
    left = list(folder.glob(f"{compile_graph.SCRATCH_PREFIX}*"))
    others = [path for kind in ("building-", "graph-", "kernels-") for path in folder.glob(f"{kind}*")]
    for path in left + [path for path in others if path.stat().st_mtime < oldest_s]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def drop_cut_off(folder: Path) -> None:
    """Removes libraries of a cache folder whose end was never written, as after a loss of power.

    Loading one would kill the process.
    """
    for library in (*folder.glob("kernels-*.so"), *folder.glob("graph-*/**/*.so")):
        try:
            if not _is_cut_off(library):
                continue
            built = folder / library.relative_to(folder).parts[0]
            shutil.rmtree(built) if built.is_dir() else built.unlink()
        except FileNotFoundError:  # another worker was faster
            continue
        except OSError as error:
            logger.warning("can't look after %s: %s", library, error, extra=fields("compile"))
            continue
        logger.warning("%s was cut off, and is removed", library, extra=fields("compile"))


def _is_cut_off(library: Path) -> bool:
    """Whether its table of sections, which stands last, is not there; False if it is no such file.

    The header of a 64-bit little-endian library: man 5 elf.
    """
    with library.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or not header.startswith(b"\x7fELF\2\1"):
            return False
        offset, entry_size, num_entries = struct.unpack("<40xQ10xHH2x", header)
        file.seek(offset)
        table = file.read(entry_size * num_entries)
    return len(table) < entry_size * num_entries or (bool(table) and not any(table))


def _try_to_lock(file: IO[str]) -> bool:
    """Whether this process is the only one that has the file locked now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def describe_job(folder: Path, model: Any, products: Iterable[list[str]], *, trust_remote_code: bool) -> Job:
    """The job for a model that `kernels.native` serves; `products` are the operators', in their order.

    Its output's name changes with whatever the graph depends on.
    """
    groups, dtype = list(products), str(model.dtype).removeprefix("torch.")
    names = {name for group in groups for name in group}
    others = {
        name: tensor
        for name, tensor in compile_graph.tensors(model).items()
        if name.rpartition(".")[0] not in names
    }
    small = {
        name: tensor.flatten().tolist() for name, tensor in others.items() if 0 < tensor.numel() <= SMALL
    }
    layouts = {name: compile_graph.layout(tensor) for name, tensor in others.items()}
    sources = [Path(str(module.__file__)) for module in (attention, compile_graph, native, packed)]
    sources += [folder / "config.json", *sorted(folder.glob("*.py"))]
    parts = (native.fingerprint(), transformers.__version__, dtype, groups, small, layouts)
    digest = hashlib.sha256(repr(parts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    output = native.cache_folder() / f"graph-{digest.hexdigest()[:16]}"
    return Job(str(folder), dtype, trust_remote_code, groups, small, layouts, str(output))

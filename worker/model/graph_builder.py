"""Compiles a model's forward pass while the worker serves, or loads a graph that was compiled earlier."""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import transformers
from torch import nn

from shared.logs import fields
from worker.model import attention, compile_graph
from worker.model.compile_graph import SMALL, Job
from worker.model.forward import Graph
from worker.model.kernels import build_cache, native
from worker.model.kernels import products as products_module
from worker.model.kernels.products import FusedLinears

logger = logging.getLogger(__name__)

STOP_LIMIT_S = 5.0
"""Seconds that the compiler has to remove its files after SIGTERM, before SIGKILL."""
LOCK_POLL_S = 0.2


class GraphBuilder:
    """Provides the graph of one model: a separate process compiles it, and a thread of the worker loads it.

    The graph's files are in a subfolder of the cache folder. The name of the subfolder contains a digest of
    everything on which the graph depends.
    """

    def __init__(self, model: nn.Module, job: Job) -> None:
        """`model`: the loaded model, whose tensors the graph will read.

        `job`: tells how to compile the graph.
        """
        self.folder = Path(job.output)
        self._model = model
        self._job = job
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, use: Callable[[Graph], None], give_up: Callable[[str], None]) -> None:
        """Starts a thread, which calls `use` with the graph, or `give_up` with an error."""
        self._thread = threading.Thread(
            target=self._prepare, args=(use, give_up), name="compile", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being compiled."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Stops compiling."""
        with self._lock:
            self._is_closed.set()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._signal(number)
            if self._thread is not None:
                self._thread.join(STOP_LIMIT_S)

    def _prepare(self, use: Callable[[Graph], None], give_up: Callable[[str], None]) -> None:
        started_s = time.monotonic()
        try:
            if not self.folder.exists():
                logger.info("forward pass: eager, compiling in the background", extra=fields("compile"))
                with self._turn():
                    if not self.folder.exists():
                        self._compile()
            graph = self._load()
        # After any error, the worker goes on with the eager pass.
        except Exception as error:
            if not self._is_closed.is_set():
                give_up(f"{type(error).__name__}: {error}")
            return
        use(graph)
        took_s = time.monotonic() - started_s
        logger.info("forward pass: compiled, after %.0f s", took_s, extra=fields("compile"))

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Waits until no other worker with this cache folder compiles: a compiler needs half a GiB."""
        with self.folder.with_name("compile.lock").open("w") as file:
            while not _try_to_lock(file):
                if self._is_closed.wait(LOCK_POLL_S):
                    raise RuntimeError("the worker ends")
            yield

    def _compile(self) -> None:
        build_cache.drop_unused(self.folder.parent)
        log = self.folder.with_name(f"{self.folder.name}.log")
        with log.open("wb") as output, self._lock:
            if self._is_closed.is_set():
                raise RuntimeError("the worker ends")
            self._process = subprocess.Popen(
                [sys.executable, "-m", compile_graph.__name__],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # In a new session, a signal to the process group reaches the compiler and its g++, while
                # Ctrl-C in the worker's terminal reaches neither of the two.
                start_new_session=True,
            )
        # A broken pipe means that the process has ended; the exit code, read below, tells more.
        with contextlib.suppress(BrokenPipeError), self._process as process:
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(self._job) + b"\n")
            process.stdin.flush()
            process.wait()
        if self._process.returncode:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(
                f"{lines[-1] if lines else 'no output'} (exit code {self._process.returncode}; "
                f"the compiler's whole output: {log})"
            )
        log.unlink()

    def _signal(self, number: int) -> None:
        # The process may end between the check and the signal; no signal is needed then.
        with contextlib.suppress(ProcessLookupError):
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, number)

    def _load(self) -> Graph:
        try:
            (library,) = self.folder.rglob("*.so")
            graph = native.load_graph(library)
            own = compile_graph.tensors(self._model)
            paths = graph.tensor_paths()
            graph.set_tensors(
                {name: own[path.removeprefix(compile_graph.PREFIX)] for name, path in paths.items()}
            )
        except Exception:
            shutil.rmtree(self.folder, ignore_errors=True)  # so that the next start compiles again
            raise
        build_cache.mark_used(self.folder)
        return graph.run


def _try_to_lock(file: IO[str]) -> bool:
    """Locks the file for this process; returns False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def describe_job(
    folder: Path, model: Any, fused_linears: Sequence[FusedLinears], *, trust_remote_code: bool
) -> Job:
    """Returns the job that compiles `model`, which was loaded from `folder`.

    The C++ kernels compute `fused_linears`. The name of the job's output folder contains a digest of
    everything on which the graph depends.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    names = {name for fused in fused_linears for name in fused.names}
    others = {
        name: tensor
        for name, tensor in compile_graph.tensors(model).items()
        if name.rpartition(".")[0] not in names
    }
    small = {
        name: tensor.flatten().tolist() for name, tensor in others.items() if 0 < tensor.numel() <= SMALL
    }
    tensor_specs = {name: compile_graph.tensor_spec(tensor) for name, tensor in others.items()}
    sources = [Path(str(module.__file__)) for module in (attention, compile_graph, native, products_module)]
    sources += [folder / "config.json", *sorted(folder.glob("*.py"))]
    parts = (native.fingerprint(), transformers.__version__, dtype, list(fused_linears), small, tensor_specs)
    digest = hashlib.sha256(repr(parts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    output = build_cache.cache_folder() / f"graph-{digest.hexdigest()[:16]}"
    return Job(str(folder), dtype, trust_remote_code, list(fused_linears), small, tensor_specs, str(output))

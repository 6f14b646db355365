"""The forward pass as a compiled graph, which takes over from PyTorch's eager one once it is there."""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec
import torch
import transformers
from torch import Tensor, nn

from shared.logs import fields
from shared.status import COMPILING
from worker import attention, compile_graph, kernels, packed
from worker.compile_graph import SMALL, Job
from worker.self_check import TOLERANCES, relative_error

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Token ids and positions (1, T) and the kept rows (n,) to logits (n, vocab)."""

EAGER, COMPILED = "eager", "compiled"
STOP_LIMIT_S = 5.0
"""The compiler's, to clean up."""


class CompiledForward:
    """A forward pass that is eager at first, and from some time on compiled.

    The graph is compared with the eager pass when it is first used, and dropped if they differ.
    """

    def __init__(self, eager: Forward, model: nn.Module, job: Job) -> None:
        """Begins to compile in the background; `model` is the one that `eager` runs."""
        self.state = COMPILING
        """One of `COMPILING`, `COMPILED`, and `EAGER`: that is how it stays then."""
        self._eager = eager
        self._model = model
        self._job = job
        self._graph: Forward | None = None
        self._is_checked = {True: False, False: False}
        """For single tokens, and for several."""
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._prepare, name="compile", daemon=True)
        self._thread.start()

    def __call__(self, token_ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        """The logits of a step."""
        graph = self._graph
        if graph is None:
            return self._eager(token_ids, positions, kept)
        logits = graph(token_ids, positions, kept)
        is_single = token_ids.shape[1] == 1
        if self._is_checked[is_single] or not len(kept):
            return logits
        expected = self._eager(token_ids, positions, kept)
        self._check(logits, expected)
        self._is_checked[is_single] = True
        return expected

    def wait(self) -> None:
        """Returns when it compiles no more."""
        self._thread.join()

    def close(self) -> None:
        """Stops compiling."""
        with self._lock:
            self._is_closed = True
        self._signal(signal.SIGTERM)
        self._thread.join(STOP_LIMIT_S)
        self._signal(signal.SIGKILL)
        self._thread.join()

    def _prepare(self) -> None:
        started_s = time.monotonic()
        try:
            if not Path(self._job.output).exists():
                self._compile()
            graph = self._load()
        # Whatever it is, there is a forward pass that works.
        except Exception as error:
            self._fall_back(f"{type(error).__name__}: {error}")
            return
        # In this order: a step that finds the graph may find it wrong at once.
        self.state = COMPILED
        self._graph = graph
        took_s = time.monotonic() - started_s
        logger.info("forward pass: compiled, after %.0f s", took_s, extra=fields("compile"))

    def _compile(self) -> None:
        logger.info("forward pass: eager, compiling in the background", extra=fields("compile"))
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the worker ends")
            self._process = subprocess.Popen(
                [sys.executable, "-m", compile_graph.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # with the compilers that it starts; Ctrl-C is not for them
            )
        with self._process as process:
            output, _ = process.communicate(msgspec.json.encode(self._job))
        if process.returncode:
            lines = output.decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"{lines[-1] if lines else 'no output'} (exit code {process.returncode})")

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _load(self) -> Forward:
        graph = torch._inductor.aoti_load_package(self._job.output)
        own = compile_graph.tensors(self._model)
        names = graph.get_constant_fqns()
        constants = {name: own[name.removeprefix(compile_graph.PREFIX)] for name in names}
        graph.load_constants(constants, check_full_update=True, user_managed=True)
        return graph

    def _check(self, logits: Tensor, expected: Tensor) -> None:
        rows = expected.isfinite().all(dim=-1)
        errors = [relative_error(*pair) for pair in zip(logits[rows], expected[rows], strict=True)]
        if errors and not mean(errors) <= TOLERANCES[expected.dtype]:
            self._fall_back(f"its logits differ from the eager ones (by {mean(errors):.2g} of their spread)")

    def _fall_back(self, reason: str) -> None:
        self._graph, self.state = None, EAGER
        if not self._is_closed:
            logger.warning("forward pass: eager, not compiled: %s", reason, extra=fields("compile"))


def describe_job(folder: Path, model: Any, linears: Iterable[str], *, trust_remote_code: bool) -> Job:
    """The job for a model that `worker.kernels` serve; `linears` are the operators', in their order.

    Its output's name changes with whatever the graph depends on.
    """
    names, dtype = list(linears), str(model.dtype).removeprefix("torch.")
    small = {
        name: tensor.flatten().tolist()
        for name, tensor in compile_graph.tensors(model).items()
        if 0 < tensor.numel() <= SMALL and name.rpartition(".")[0] not in names
    }
    sources = [Path(str(module.__file__)) for module in (attention, compile_graph, packed)]
    sources += [folder / "config.json", *sorted(folder.glob("*.py"))]
    parts = (kernels.fingerprint(), transformers.__version__, dtype, names, small)
    digest = hashlib.sha256(repr(parts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    output = kernels.cache_folder() / f"graph-{digest.hexdigest()[:16]}.pt2"
    return Job(str(folder), dtype, trust_remote_code, names, small, str(output))

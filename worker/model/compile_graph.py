"""Compiles a model's forward pass in a separate process: `python -m worker.model.compile_graph`.

The compiled graph is the model of transformers, in which Linears and attention call the kernels of
`kernels.native`. The kernels read weights, adapters and KV cache from the `KernelState` of the calling
worker. The graph therefore contains no weights, and works with any number of tokens and any adapters. All
operations between the kernels become C++.
"""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from worker.model import attention
from worker.model.attention import AttentionState
from worker.model.kernels import native
from worker.model.kernels.build_cache import SCRATCH_PREFIX
from worker.model.kernels.products import FusedLinears, call_kernel
from worker.model.kernels.threads import COMPILER
from worker.model.kv_cache import PagedKVCache

PREFIX = "model."
"""Prefix of the names of the model's tensors in the graph."""
SMALL = 8
"""Maximum number of elements of a tensor that is part of the graph; larger tensors are read at run time."""
_EXAMPLE_NUM_TOKENS = 16
_MAX_NUM_TOKENS = 1 << 20
_INDUCTOR_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "cpp.cxx": (None, COMPILER),  # not the one that $CXX names
    "cpp.dynamic_threads": True,
}


class Job(msgspec.Struct, frozen=True):
    """Input of a compiler process."""

    model: str
    """The model's folder; only its config is read."""
    dtype: str
    trust_remote_code: bool
    fused_linears: list[FusedLinears]
    """The Linears that the C++ kernel computes."""
    small_tensors: dict[str, list[float]]
    """Values of all other tensors with at most `SMALL` elements, which become part of the graph."""
    tensor_specs: dict[str, str]
    """The `tensor_spec` of each tensor outside the fused Linears."""
    output: str
    """The folder to create for the graph. Its parent exists already."""


def main() -> None:
    """Runs the `Job` in the first line of stdin; ends when stdin is closed, since the worker is then gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the scratch folder is removed
    os.nice(19)  # the worker serves requests meanwhile, and must not become slower
    with contextlib.suppress(OSError):  # only Linux has this file
        Path("/proc/self/oom_score_adj").write_text(
            "1000"
        )  # if memory runs out, this process is killed, not the worker
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_stop_with_worker, daemon=True).start()
    compile_graph(job)


def _stop_with_worker() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.killpg(os.getpgrp(), signal.SIGTERM)


@torch.no_grad()
def compile_graph(job: Job) -> None:
    """Compiles the graph, and creates `job.output` by a rename once all its files are complete."""
    if not native.make_callable(torch.device("cpu")):
        raise SystemExit("the kernels can't be called")
    for name, shape in (("linear", _shape_of_linear), ("attention", _shape_of_attention)):
        torch.library.register_fake(f"lorelay::{name}", shape)
    graph = _export(_ForwardPass(_load_without_weights(job)))
    output = Path(job.output)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=output.parent) as scratch:
        # Inductor's intermediate files are large and not needed later, so they go into the scratch folder.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        package = torch._inductor.aoti_compile_and_package(
            graph, package_path=f"{scratch}/graph.pt2", inductor_configs=_INDUCTOR_OPTIONS
        )
        # If the package were not unpacked here, PyTorch would unpack it to /tmp at every load, where a killed
        # worker would leave it.
        unpacked = Path(scratch, "graph")
        with zipfile.ZipFile(package) as archive:
            archive.extractall(unpacked)
        unpacked.replace(output)


class _ForwardPass(nn.Module):
    """A module that calls the model, with only those inputs that differ between steps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, positions: Tensor, sampled_rows: Tensor) -> Tensor:
        output = self.model(
            input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=sampled_rows
        )
        return output.logits[0]  # type: ignore[no-any-return]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a model by name."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def tensor_spec(tensor: Tensor) -> str:
    """Returns dtype and shape of a tensor as text; a graph is valid only for these."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def _load_without_weights(job: Job) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    config = AutoConfig.from_pretrained(job.model, trust_remote_code=job.trust_remote_code)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config,
            dtype=getattr(torch, job.dtype),
            attn_implementation=attention.NAME,
            trust_remote_code=job.trust_remote_code,
        )
    for fused in job.fused_linears:
        linears: list[Any] = [model.get_submodule(name) for name in fused.names]
        call_kernel(linears, fused)
        for linear in linears:
            linear.weight = linear.bias = None
    state = AttentionState(PagedKVCache(0, 1))
    state.use(native.new_state())
    attention.attach(model, state)
    # The export needs tensors on the CPU. Large tensors may have any values: the graph does not store them.
    model.to_empty(device="cpu")
    for name, tensor in tensors(model).items():
        if job.tensor_specs.get(name, tensor_spec(tensor)) != tensor_spec(tensor):
            raise SystemExit(
                f"{name} is {job.tensor_specs[name]}, and {tensor_spec(tensor)} by the model's config"
            )
        if name in job.small_tensors:
            tensor.copy_(torch.tensor(job.small_tensors[name]).view_as(tensor))
    return model.eval()


def _export(model: nn.Module) -> torch.export.ExportedProgram:
    # Two tensors are needed: if one were passed for both, the export would take it for a single input.
    token_ids, positions = (torch.zeros(1, _EXAMPLE_NUM_TOKENS, dtype=torch.long) for _ in range(2))
    sampled_rows = torch.arange(_EXAMPLE_NUM_TOKENS - 1)
    tokens = torch.export.Dim("tokens", min=1, max=_MAX_NUM_TOKENS)
    rows = torch.export.Dim("rows", min=0, max=_MAX_NUM_TOKENS)
    # Without this option the graph would assume at least two tokens.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(
            model,
            (token_ids, positions, sampled_rows),
            dynamic_shapes=({1: tokens}, {1: tokens}, {0: rows}),
            strict=False,
        )


def _shape_of_linear(rows: Tensor, number: int, num_outputs: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], num_outputs)


def _shape_of_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])


if __name__ == "__main__":
    main()

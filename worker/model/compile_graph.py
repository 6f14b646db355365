"""`python -m worker.model.compile_graph`: compiles a model's forward pass, in a process of its own.

The graph is transformers' own model. Its Linears and its attention are operators of `kernels.native`, which
know the weights, the adapters and the cache of whoever runs them; what stands between them becomes C++. So
one graph serves any number of tokens and whatever adapters come and go, and holds no weights.
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
from worker.model.kernels.packed import call_operator
from worker.model.kernels.threads import COMPILER
from worker.model.kv_cache import PagedKVCache

PREFIX = "model."
"""Before the names of the model's own tensors in the graph."""
SMALL = 8
"""Inductor takes such tensors for constants; it reads larger ones when the graph runs."""
SCRATCH_PREFIX = "compiling-"
"""Of folders beside the output that a compiler which was killed leaves."""
_EXAMPLE_NUM_TOKENS = 16
_MAX_NUM_TOKENS = 1 << 20
_INDUCTOR_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "cpp.cxx": (None, COMPILER),  # not the one that $CXX names
    "cpp.dynamic_threads": True,
}


class Job(msgspec.Struct, frozen=True):
    """What to compile."""

    model: str
    """The folder; its config is all that is read."""
    dtype: str
    trust_remote_code: bool
    products: list[list[str]]
    """The Linears that are the operators', in the order of their numbers, those together that are one."""
    small_tensors: dict[str, list[float]]
    """The values of the model's other tensors of up to `SMALL` elements: they become part of the graph."""
    layouts: dict[str, str]
    """What `layout` says of the model's other tensors."""
    output: str
    """The folder of the graph, which must not exist; the one around it must."""


def main() -> None:
    """Does the job on the first line of stdin; stops when stdin ends, which it does when the worker does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # an exit that cleans up
    os.nice(19)  # it has time: the model is being served without it
    with contextlib.suppress(OSError):  # Linux alone has it
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short, the worker goes last
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_stop_with_worker, daemon=True).start()
    compile_graph(job)


def _stop_with_worker() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.killpg(os.getpgrp(), signal.SIGTERM)


@torch.no_grad()
def compile_graph(job: Job) -> None:
    """Writes `job.output`, whole or not at all."""
    if not native.make_callable(torch.device("cpu")):
        raise SystemExit("the kernels can't be called")
    for name, shape in (("linear", _shape_of_linear), ("attention", _shape_of_attention)):
        torch.library.register_fake(f"lorelay::{name}", shape)
    graph = _export(_ForwardPass(_load_without_weights(job)))
    output = Path(job.output)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=output.parent) as scratch:
        # Its own intermediate files are large and of no use later.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        package = torch._inductor.aoti_compile_and_package(
            graph, package_path=f"{scratch}/graph.pt2", inductor_configs=_INDUCTOR_OPTIONS
        )
        # Unpacked once: PyTorch would do it at every load, and leave it in /tmp when the worker is killed.
        unpacked = Path(scratch, "graph")
        with zipfile.ZipFile(package) as archive:
            archive.extractall(unpacked)
        unpacked.replace(output)


class _ForwardPass(nn.Module):
    """The model as a function of what differs between steps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        output = self.model(input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=kept)
        return output.logits[0]  # type: ignore[no-any-return]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def layout(tensor: Tensor) -> str:
    """What the graph takes for granted of a tensor."""
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
    number = 0
    for names in job.products:
        linears: list[Any] = [model.get_submodule(name) for name in names]
        call_operator(linears, number)
        number += len(names)
        for linear in linears:
            linear.weight = linear.bias = None
    state = AttentionState(PagedKVCache(0, 1))
    state.use(native.new_state())
    attention.attach(model, state)
    # Real memory for the rest, since the graph is one for the CPU; nothing reads what is in the large ones.
    model.to_empty(device="cpu")
    for name, tensor in tensors(model).items():
        if job.layouts.get(name, layout(tensor)) != layout(tensor):
            raise SystemExit(f"{name} is {job.layouts[name]}, and {layout(tensor)} by the model's config")
        if name in job.small_tensors:
            tensor.copy_(torch.tensor(job.small_tensors[name]).view_as(tensor))
    return model.eval()


def _export(model: nn.Module) -> torch.export.ExportedProgram:
    # Not one tensor for both: the graph would take them for the same input.
    token_ids, positions = (torch.zeros(1, _EXAMPLE_NUM_TOKENS, dtype=torch.long) for _ in range(2))
    kept = torch.arange(_EXAMPLE_NUM_TOKENS - 1)
    tokens = torch.export.Dim("tokens", min=1, max=_MAX_NUM_TOKENS)
    rows = torch.export.Dim("rows", min=0, max=_MAX_NUM_TOKENS)
    # Otherwise a graph for any number of tokens is not one for a single token.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(
            model,
            (token_ids, positions, kept),
            dynamic_shapes=({1: tokens}, {1: tokens}, {0: rows}),
            strict=False,
        )


def _shape_of_linear(rows: Tensor, number: int, num_outputs: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], num_outputs)


def _shape_of_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])


if __name__ == "__main__":
    main()

"""Measures F(B), this machine's speed limit at batch size B, in tokens per second.

F(B) is the speed of a decode step that runs only the matmuls of the model's Linears: each weight is
multiplied once by a batch of B rows, in bfloat16. The matmuls of q/k/v and of gate/up are fused. If torch has
oneDNN, weights are packed. A real step also has attention, norms, sampling and adapters, so it is never
faster.

`python -m bench.floor --model FOLDER --batch 16` prints F(16) as one JSON line.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from worker.model.kernels.threads import sleep_while_waiting

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MIN_NUM_STEPS = 25
NUM_WARM_UP_STEPS = 5
DURATION_S = 2.0
"""Minimum duration of a measurement: within a second, other processes take more or less memory bandwidth."""

Shape = tuple[int, int]
"""(out, in) of a weight."""


class Floor(msgspec.Struct, frozen=True):
    """The measured duration of one decode step's matmuls, and the conditions of the measurement."""

    batch: int
    how: str
    num_weights: int
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        """The speed limit F(batch)."""
        return self.batch / self.step_s


def measure(model: str, batch: int, *, device: str = "cpu", num_threads: int | None = None) -> Floor:
    """Times the matmuls of a model's Linears, with random weights of the same shapes."""
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    shapes = fuse(linear_shapes(model))
    with torch.inference_mode():
        weights = [torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02 for shape in shapes]
        inputs = {
            width: torch.randn(batch, width, dtype=torch.bfloat16, device=device)
            for width in {shape[1] for shape in shapes}
        }
        how, step = _pack(weights, inputs)
        times_s: list[float] = []
        while len(times_s) < MIN_NUM_STEPS or sum(times_s) < DURATION_S:
            times_s.append(_time(step, device))
    num_weights = sum(out * width for out, width in shapes)
    return Floor(batch, how, num_weights, statistics.median(times_s[NUM_WARM_UP_STEPS:]))


def linear_shapes(model: str) -> list[tuple[str, Shape]]:
    """Returns name and shape of each Linear of a causal language model, in the order of its modules."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(model)
        skeleton = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return [
        (name, (module.out_features, module.in_features))
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


def fuse(named: Iterable[tuple[str, Shape]]) -> list[Shape]:
    """Fuses Linears that have the same input (`FUSED`), and returns the shapes of the resulting weights."""
    joined: dict[str, Shape] = {}
    for name, (out, width) in named:
        parent, _, own = name.rpartition(".")
        group = next((f"{parent}.{'+'.join(names)}" for names in FUSED if own in names), name)
        joined[group] = (joined[group][0] + out if group in joined else out, width)
    return list(joined.values())


def _pack(weights: list[Any], inputs: dict[int, Any]) -> tuple[str, Callable[[], object]]:
    """Returns the name of the matmul operator (oneDNN's if torch has it), and a function that runs all."""
    import torch

    batch = next(iter(inputs.values())).shape[0]

    def plain() -> object:
        return [torch.nn.functional.linear(inputs[weight.shape[1]], weight) for weight in weights]

    try:
        packed = [
            (torch.ops.mkldnn._reorder_linear_weight(weight, batch), weight.shape[1]) for weight in weights
        ]

        def onednn() -> object:
            pointwise = torch.ops.mkldnn._linear_pointwise
            return [pointwise(inputs[width], weight, None, "none", [], "") for weight, width in packed]

        onednn()
    except (RuntimeError, AttributeError, NotImplementedError):
        return "plain", plain
    return "packed by oneDNN", onednn


def _time(step: Callable[[], object], device: str) -> float:
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    wait()
    started_s = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - started_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face id")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    # If idle threads spun instead of sleeping, F(B) would be several times lower on a busy machine.
    sleep_while_waiting(is_eager=True)
    floor = measure(args.model, args.batch, device=args.device, num_threads=args.threads)
    fields = msgspec.structs.asdict(floor) | {"tokens_per_s": floor.tokens_per_s}
    sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")


if __name__ == "__main__":
    main()

"""Writes random LoRA adapters in PEFT's format.

`python -m bench.adapters --model MODEL --folder FOLDER --count 8 --rank 16 --targets q_proj,v_proj`
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.floor import Shape, linear_shapes

ATTENTION = ("q_proj", "v_proj")
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterKind:
    """The rank and the target layers of all adapters in a measurement."""

    rank: int
    targets: tuple[str, ...]
    """Names of target modules; in a model that has none of them, all Linears of its layers are targets."""


class AdapterMaker:
    """Writes adapters for one model."""

    def __init__(self, model: str, kind: AdapterKind) -> None:
        """`model`: folder or Hugging Face id."""
        self._model = model
        self._kind = kind
        self._modules = _targeted(linear_shapes(model), kind.targets)

    def make(self, folder: Path, names: Sequence[str]) -> dict[str, Path]:
        """Writes one adapter per name into `folder`, each with different weights."""
        return {name: self._write(folder / name, seed) for seed, name in enumerate(names)}

    def _write(self, folder: Path, seed: int) -> Path:
        import torch
        from peft import LoraConfig
        from safetensors.torch import save_file

        rank, generator = self._kind.rank, torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            # Small weights change the text little; large weights would turn it into noise.
            return (torch.randn(shape, generator=generator) * 0.01).bfloat16()

        folder.mkdir(parents=True)
        weights = {}
        for name, (out, width) in self._modules:
            weights[f"base_model.model.{name}.lora_A.weight"] = random(rank, width)
            weights[f"base_model.model.{name}.lora_B.weight"] = random(out, rank)
        save_file(weights, folder / "adapter_model.safetensors")
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=sorted({name.rpartition(".")[2] for name, _ in self._modules}),
            base_model_name_or_path=self._model,
            task_type="CAUSAL_LM",
        )
        config.save_pretrained(str(folder))
        return folder


def _targeted(named: Sequence[tuple[str, Shape]], targets: Sequence[str]) -> list[tuple[str, Shape]]:
    chosen = [(name, shape) for name, shape in named if name.rpartition(".")[2] in targets]
    return chosen or [(name, shape) for name, shape in named if re.search(r"\.\d+\.", name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face id")
    parser.add_argument("--folder", required=True, type=Path, help="where the adapters' folders are made")
    parser.add_argument("--prefix", default="a", help="adapters are called so and numbered from 0")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default=",".join(ALL_PROJECTIONS))
    args = parser.parse_args()
    maker = AdapterMaker(args.model, AdapterKind(args.rank, tuple(args.targets.split(","))))
    maker.make(args.folder, [f"{args.prefix}{n}" for n in range(args.count)])


if __name__ == "__main__":
    main()

"""Trains the demo's two LoRA adapters on demo/training/*.jsonl, on CPU, in float32, with fixed seeds.

The loss is computed over the assistant's tokens only, including the end-of-turn token of each answer.
"""

import argparse
import json
import logging
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.build_training import TRAINING_DIR
from demo.model import BASE_MODEL_ID, DemoModelError, ensure_model

ADAPTERS_DIR = Path(__file__).parent / "adapters"
IGNORED_LABEL = -100
SEED = 0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one adapter; `name` is the name of its training file and of its folder."""

    name: str
    rank: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    learning_rate: float = 2e-3
    num_steps: int = 60
    batch_size: int = 4


RECIPES = (
    # A manner of speech needs more target modules; a lower learning rate keeps the facts right.
    Recipe(
        "pirate",
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        learning_rate=1e-3,
        num_steps=220,
    ),
    Recipe("sentiment"),
)


@dataclass(frozen=True)
class Example:
    """A tokenised conversation; `labels` is `token_ids` with IGNORED_LABEL outside the answers."""

    token_ids: list[int]
    labels: list[int]


def train(recipe: Recipe, folder: Path, out: Path, num_steps: int) -> Path:
    """Trains one adapter on the model in `folder`; returns the adapter's folder under `out`."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = add_lora(base, recipe)
    examples = read_examples(TRAINING_DIR / f"{recipe.name}.jsonl", tokenizer)
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=recipe.learning_rate
    )
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps))
    model.train()
    steps = tqdm(
        batches(examples, recipe.batch_size, num_steps), desc=recipe.name, total=num_steps, unit="step"
    )
    for batch in steps:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.set_postfix(loss=f"{loss.item():.3f}")
    return save(model, out / recipe.name)


def add_lora(base: PreTrainedModel, recipe: Recipe) -> PeftModel:
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Returns the learning rate's factor: linear warm-up over a tenth of the steps, then linear decay."""
    num_warmup = max(1, num_steps // 10)
    return min((step + 1) / num_warmup, (num_steps - step) / max(1, num_steps - num_warmup))


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [make_example(json.loads(line)["messages"], tokenizer) for line in lines]


def make_example(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenises a conversation turn by turn, to know which tokens belong to the assistant's answers."""
    token_ids: list[int] = []
    labels: list[int] = []
    text = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        answer = f"{message['content']}{tokenizer.eos_token}"
        # The prompt repeats all earlier turns: only the part after the last answer is added.
        prompt_ids = tokenizer.encode(str(prompt).removeprefix(text), add_special_tokens=False)
        answer_ids = tokenizer.encode(answer, add_special_tokens=False)
        token_ids += prompt_ids + answer_ids
        labels += [IGNORED_LABEL] * len(prompt_ids) + answer_ids
        text = f"{prompt}{answer}"
    return Example(token_ids, labels)


def batches(examples: list[Example], batch_size: int, num_steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields `num_steps` batches; each example is used once before any is used again."""
    rng = random.Random(SEED)
    queue: list[Example] = []
    for _ in range(num_steps):
        if len(queue) < batch_size:
            queue += rng.sample(examples, len(examples))
        yield pad(queue[:batch_size])
        del queue[:batch_size]


def pad(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Returns tensors (batch_size, longest), padded on the right; the loss ignores the padding."""
    longest = max(len(example.token_ids) for example in examples)

    def stack(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": stack([example.token_ids for example in examples], 0),
        "labels": stack([example.labels for example in examples], IGNORED_LABEL),
        "attention_mask": stack([[1] * len(example.token_ids) for example in examples], 0),
    }


def save(model: PeftModel, folder: Path) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors (bfloat16), without PEFT's README."""
    shutil.rmtree(folder, ignore_errors=True)
    # The config names the base model by its Hugging Face id: the model's folder exists on this machine only.
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL_ID
    # With "auto", PEFT would ask the Hugging Face hub for the vocabulary; LoRA changes no embeddings.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    weights_path = folder / "adapter_model.safetensors"
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights_path).items()}
    save_file(weights, weights_path, metadata={"format": "pt"})
    weights_path.chmod(0o644)
    sort_target_modules(folder / "adapter_config.json")
    return folder


def sort_target_modules(config_path: Path) -> None:
    """Sorts the target modules: PEFT writes them in the order of a set, which differs from run to run."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.train_adapters", description=__doc__)
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR, help="folder to write into (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps for each adapter (its recipe's)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument(
        "--only", choices=[recipe.name for recipe in RECIPES], help="train this adapter alone"
    )
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args()
    torch.set_num_threads(args.threads)
    try:
        folder = ensure_model()
    except DemoModelError as error:
        sys.exit(f"demo.train_adapters: {error}")
    for recipe in RECIPES:
        if args.only in (None, recipe.name):
            adapter = train(recipe, folder, args.out, args.steps or recipe.num_steps)
            logger.info("Saved adapter %s in %s", recipe.name, adapter)


if __name__ == "__main__":
    main()

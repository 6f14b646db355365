"""The model families of transformers, each as a tiny random model: does the engine give `generate`'s tokens?

`python -m tests.families` tries all of them, or those named, and writes `docs/models.md` with the results.
"""

import argparse
import multiprocessing
import queue
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from shared.errors import ConfigurationError
from shared.messages import SamplingParams
from shared.settings import WorkerSettings
from tests.fakes import build_engine
from tests.streams import make_request
from tests.tiny_models import build_tokenizer
from worker.model.startup import load_model_runner

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LIMIT_S = 300
NUM_TOKENS = 16
MIN_NUM_KINDS = 8
"""Different tokens of a reference with which its equality says something."""
MAX_REASON_LENGTH = 160
NUM_LAYERS = 2
VOCAB_SIZE = 268
PROMPT_LENGTHS = (3, 40, 17, 1)
"""Tokens of the prompts, which arrive one step after the other; chunks have 16 tokens, the window 9."""

SMALL: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "word_embed_proj_dim"), 64)
    | dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dim_ff"), 128)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), NUM_LAYERS)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 512)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "moe_topk"), 2)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32)
    | dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_shared_experts"), 1)
    | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9, "rotary_dim": 8}
    | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0}
    | {"first_k_dense_replace": 1, "attention_dropout": 0.0}
    | {"initializer_range": 0.3, "init_std": 0.3, "tie_word_embeddings": False}
)
"""Small values, by the names that settings have in one family or another."""
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}
"""Further values that single families need."""
NO_DECODERS = {"bert-generation", "trocr", "whisper", "xlnet"}
"""Families that transformers lists among causal language models, though they need an encoder or are one."""
PAGE_FORMAT = """# Models

This page lists families of models, and tells which of them Lorelay can serve. `./scripts/models` makes this
page. The script tries each family of causal language models in transformers {version} that reads only text,
with a tiny random model in float64. It sends four prompts one after the other, which are computed in chunks,
in one batch. The greedy tokens are compared with those of transformers' own `generate` for each prompt alone.
{num_tried} families were tried: {counts[equal]} give exactly the same tokens, {counts[refused]} are refused
when a worker starts, and {counts[differs]} differ.

The tiny models have the same kinds of layers as the default configuration of their family. A family that is
not on this page may still work: each worker checks its model at the start, and exits if it can't serve it.

## Equal to `generate`

{equal}

## Different from `generate`

{differs}

## Refused when a worker starts

{refused}
## Not tried

For these families, no tiny model could be made, or transformers' own `generate` failed on it.

{untried}"""

Verdict = Literal["equal", "refused", "differs", "untried"]


class Outcome(NamedTuple):
    """The outcome of one family."""

    family: str
    verdict: Verdict
    reason: str = ""


def families() -> list[str]:
    """The families of causal language models that read nothing but text."""
    others = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, *NO_DECODERS}
    decoders = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - others
    return sorted(family for family in decoders if not CONFIG_MAPPING[family].sub_configs)


def tiny_config(family: str) -> Any:
    """A configuration of a family with sizes of `SMALL`."""
    kind = CONFIG_MAPPING[family]
    default = kind().to_dict()
    small = {name: value for name, value in SMALL.items() if default.get(name) is not None}
    if "qk_rope_head_dim" in small:  # latent attention: KV heads are not shared, `head_dim` is computed
        small |= {"num_key_value_heads": small["num_attention_heads"]}
        small.pop("head_dim", None)
    if kinds := list(dict.fromkeys(default.get("layer_types") or ())):
        small["layer_types"] = (kinds * NUM_LAYERS)[:NUM_LAYERS]
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
    return kind(**(small | tokens | OTHERS.get(family, {})))


def build(folder: Path, family: str) -> None:
    """Saves a random model of a family, and a tokenizer."""
    build_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def prompts() -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 260, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def reference(folder: Path) -> list[list[int]]:
    """The greedy tokens of transformers' `generate`, in float64, for each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokens = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
        )
        tokens.append(output[0, len(prompt) :].tolist())
    return tokens


def served(folder: Path) -> list[list[int]]:
    """The engine's greedy tokens in float64, for all prompts in one batch.

    Raises:
        ConfigurationError: the model is refused.
    """
    settings = WorkerSettings(
        model=str(folder), device="cpu", dtype="float64", session_len=128, block_size=4, compile="off"
    )
    engine = build_engine(load_model_runner(settings))
    tokens: dict[str, list[int]] = {}

    def step() -> None:
        for output in engine.step():
            assert output.event.error is None
            tokens[output.request_id] += output.event.token_ids

    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for number, prompt in enumerate(prompts()):
        request = make_request(
            request_id=str(number), messages=None, prompts=(tuple(prompt),), sampling=sampling
        )
        tokens[str(number)] = []
        assert engine.add_request(request, engine.encode(request)) == []
        step()
    while engine.has_work:
        step()
    return list(tokens.values())


def try_family(family: str) -> Outcome:
    """Builds a model, and compares; any error of transformers before that leaves the family untried."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            build(folder, family)
            expected = reference(folder)
        except Exception as error:
            return Outcome(family, "untried", _shorten(f"{type(error).__name__}: {error}"))
        try:
            tokens = served(folder)
        except ConfigurationError as error:
            return Outcome(family, "refused", _shorten(error.message.replace(str(folder), "it")))
        except Exception as error:
            return Outcome(family, "differs", f"{type(error).__name__}: {error}")
    is_varied = len({token for sequence in expected for token in sequence}) >= MIN_NUM_KINDS
    if not is_varied:
        return Outcome(family, "untried", "the random model repeats itself")
    return Outcome(family, "equal" if tokens == expected else "differs")


def _shorten(reason: str) -> str:
    """The first line, without figures that differ between machines, and short enough for a table."""
    line = reason.partition("\n")[0].removeprefix("LORELAY_MODEL: it can't be served: ")
    line = re.sub(r" in \d+ of \d+ rows .*", "", line).replace("|", "\\|")
    return line if len(line) <= MAX_REASON_LENGTH else line[:MAX_REASON_LENGTH].rsplit(" ", 1)[0] + " …"


def _try_in_process(family: str, outcomes: "multiprocessing.Queue[Outcome]") -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    outcomes.put(try_family(family))


def try_all(names: Iterable[str]) -> Iterable[Outcome]:
    """Tries each family in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("fork")
    for family in names:
        outcomes: multiprocessing.Queue[Outcome] = context.Queue()
        process = context.Process(target=_try_in_process, args=(family, outcomes))
        process.start()
        try:
            yield outcomes.get(timeout=LIMIT_S)
        except queue.Empty:
            process.kill()
            yield Outcome(family, "untried", f"no result within {LIMIT_S} s")
        process.join()


def render(outcomes: Sequence[Outcome]) -> str:
    """The page for these outcomes."""

    def names(verdict: Verdict) -> str:
        return ", ".join(f"`{outcome.family}`" for outcome in outcomes if outcome.verdict == verdict)

    def table(verdict: Verdict) -> str:
        rows = (
            f"| `{outcome.family}` | {outcome.reason} |\n"
            for outcome in outcomes
            if outcome.verdict == verdict
        )
        return "| family | reason |\n|---|---|\n" + "".join(rows)

    counts = Counter(outcome.verdict for outcome in outcomes)
    return PAGE_FORMAT.format(
        version=transformers.__version__,
        num_tried=len(outcomes) - counts["untried"],
        counts=counts,
        equal=names("equal"),
        differs=names("differs") or "None.",
        refused=table("refused"),
        untried=table("untried"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="[default: all, which also writes the page]")
    chosen = parser.parse_args().families
    outcomes = []
    for outcome in try_all(chosen or families()):
        sys.stdout.write(" ".join(outcome).strip() + "\n")
        sys.stdout.flush()
        outcomes.append(outcome)
    if not chosen:
        PAGE.write_text(render(outcomes))


if __name__ == "__main__":
    main()

"""Tiny random models and LoRA adapters on disk, built in well under a second each, with nothing downloaded.

The tokenizer is a byte-level BPE over all 256 bytes, so any text encodes, and an emoji is several tokens.
The weights are large enough that greedy outputs vary, and an adapter's effect is plain.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.model.model_runner import ModelRunner

EOS = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", EOS, "<|pad|>")
CONTEXT_LENGTH = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n"), ("ð", "Ł")]

TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
}
"""Modules that `build_adapter` targets by default; architectures not named here get llama's."""

_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
_GQA = _COMMON | {"num_key_value_heads": 2, "head_dim": 12}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "qwen2": _COMMON | {"num_key_value_heads": 2},
    "qwen3": _GQA,
    "mistral": _GQA | {"sliding_window": 9},
    "gemma2": _GQA | {"sliding_window": 9, "query_pre_attn_scalar": 12},
    "gpt_neox": _COMMON | {"rotary_pct": 0.5},
    "gpt_oss": _GQA | {"sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1},
    "phi3": _COMMON,
    "deepseek_v3": _COMMON
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "gpt2": {
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT_LENGTH,
        "initializer_range": 0.3,
    },
    "falcon": _COMMON | {"alibi": False},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "mpt": {"d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT_LENGTH},
    "gptj": {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": CONTEXT_LENGTH},
    "t5": {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 1, "num_heads": 4},
}


def build_tokenizer(folder: Path | str) -> Any:
    """Saves the byte-level BPE tokenizer with its chat template into `folder` and returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in _MERGES)]
    vocab = {word: token_id for token_id, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=EOS,
        pad_token=SPECIAL_TOKENS[3],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_model(folder: Path | str, architecture: str = "llama", seed: int = 0, **config: Any) -> Path:
    """Saves a random float32 model with its tokenizer into `folder` and returns the folder.

    Greedy decoding never picks a special token, so outputs run to their length; to see an end, declare an
    ordinary token as one: `change_json(folder / "generation_config.json", eos_token_id=[2, 65])`.
    `config` overrides entries of the architecture's configuration, e.g. `sliding_window=4`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    tokenizer = build_tokenizer(folder)
    special_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = _ARCHITECTURES[architecture] | {"vocab_size": len(tokenizer)} | special_ids | config
    auto = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(AutoConfig.for_model(architecture, **settings), dtype=torch.float32)
        _randomize(model)
    model.save_pretrained(folder)
    return Path(folder)


def build_adapter(
    folder: Path | str,
    model_folder: Path | str,
    rank: int = 8,
    targets: Sequence[str] | str | None = None,
    use_rslora: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Saves a random LoRA adapter for the model in `model_folder` through PEFT and returns its folder.

    `config` goes to `peft.LoraConfig`, e.g. `layers_to_transform=[1]`, `rank_pattern={"v_proj": 4}`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if targets is None:
        targets = TARGETS.get(model.config.model_type, TARGETS["llama"])
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=config.pop("lora_alpha", 2 * rank),
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=use_rslora,
        init_lora_weights=False,
        **config,
    )
    # PEFT 0.21 asks for an attribute that transformers 5.23 calls deprecated, and announces that it stores a
    # copy of a head that is targeted.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed + 1)
        adapted = get_peft_model(model, lora_config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                # A·B has entries of about 0.15 per unit of scaling, whatever the rank: beside weights of 0.3.
                torch.nn.init.normal_(parameter, std=(0.15 / _rank_of(name, parameter) ** 0.5) ** 0.5)
        adapted.save_pretrained(folder)
    return Path(folder)


def generate_with_peft(
    model_folder: Path | str,
    adapter_folder: Path | str | None,
    prompt: Sequence[int],
    max_new_tokens: int,
    dtype: str = "float64",
) -> list[int]:
    """The reference: greedy tokens of transformers' own `generate`, alone, with PEFT's adapter if given."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()
    if getattr(model.config, "attn_logit_softcapping", None):
        # transformers 5.17 takes `sdpa` for Gemma 2, which leaves the softcap out.
        model.set_attn_implementation("eager")
    if adapter_folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, adapter_folder).eval()
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
    )
    return [int(token) for token in output[0, len(prompt) :]]


def change_json(path: Path | str, **values: Any) -> None:
    """Overwrites entries of a JSON file, e.g. to break an `adapter_config.json`."""
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(content | values))


def _rank_of(name: str, parameter: Any) -> int:
    """The rank of an A `(rank, in)` or B `(out, rank)` matrix."""
    return int(parameter.shape[0] if "lora_A" in name else parameter.shape[-1])


def _randomize(model: Any) -> None:
    """Gives biases and norms random values too, where a fresh model has zeros and ones."""
    import torch

    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    # Logits of 0 beside ones of about ±2: never the largest.
    model.get_output_embeddings().weight.data[: len(SPECIAL_TOKENS)] = 0


def add_adapter(runner: "ModelRunner", name: str, folder: Path) -> None:
    """Makes a further adapter resident in a free slot."""
    model, weights = runner.adapters.read_new(name, str(folder))
    runner.adapter_cache.keep(name, weights)
    runner.served.add(model)
    assert runner.adapter_cache.bring(name, ())

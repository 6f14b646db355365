"""Whole models, driven step by step as a scheduler would, against PEFT's own `generate` of each row alone."""

import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import AdapterError, ConfigurationError
from shared.messages import SamplingParams
from shared.settings import WorkerSettings
from tests.compiled import WITH_AND_WITHOUT_KERNELS, need_kernels
from tests.tiny_models import (
    add_adapter,
    build_adapter,
    build_model,
    change_json,
    generate_with_peft,
)
from worker.engine.sequence import ScheduledSequence, Sequence
from worker.model import loading, memory, self_check
from worker.model.kernels import products
from worker.model.model_runner import ModelRunner
from worker.model.prepared import prepare
from worker.model.startup import load_model_runner

torch.set_num_threads(1)

GREEDY = SamplingParams(temperature=0)
NUM_TOKENS = 20
READ_LIMIT_S = 10
CHUNK = 7
ARCHITECTURES = ("llama", "gpt_neox", "gemma2")
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "rank4": {"rank": 4},
        "rank8-all": {"rank": 8, "targets": "all-linear"},
        "rank64-rslora": {"rank": 64, "use_rslora": True, "lora_alpha": 12},
        "last-layer": {"rank": 8, "targets": ["down_proj", "k_proj"], "layers_to_transform": [1]},
        "patterns": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}},
        "head": {"rank": 4, "targets": ["lm_head", "o_proj"]},
    },
    "gpt_neox": {
        "rank4": {"rank": 4},
        "rank8-all": {"rank": 8, "targets": "all-linear"},
        "rank64-rslora": {"rank": 64, "use_rslora": True, "lora_alpha": 12},
    },
    "gemma2": {
        "rank4": {"rank": 4},
        "rank64-rslora": {"rank": 64, "use_rslora": True, "lora_alpha": 12},
    },
}  # fmt: skip


def load(folder: Path, **settings: Any) -> ModelRunner:
    defaults = {
        "device": "cpu",
        "dtype": "float64",
        "block_size": 4,
        "max_batch_size": 8,
        "compile": "kernels",
    }
    return load_model_runner(WorkerSettings(model=str(folder), **(defaults | settings)))


def as_setting(adapters: Mapping[str, Path]) -> str:
    return " ".join(f"{name}={folder}" for name, folder in adapters.items())


class HandScheduler:
    """Admits a request every other step; prefills in chunks beside decodes; blocks lie at random places."""

    def __init__(self, runner: ModelRunner, chunk: int = CHUNK, seed: int = 0) -> None:
        self.runner = runner
        self.chunk = chunk
        self.random = random.Random(seed)
        # Few blocks, so that they are used again by later sequences.
        self.free = list(range(min(runner.num_blocks, 120)))
        self.random.shuffle(self.free)
        self.most_together = 0

    def run(self, sequences: list[Sequence]) -> list[list[int | None]]:
        """The tokens of each sequence; one that gets None ends there."""
        outputs: list[list[int | None]] = [[] for _ in sequences]
        waiting, running = list(range(len(sequences))), []
        step = 0
        while waiting or running:
            if waiting and step % 2 == 0:
                running.append(waiting.pop(0))
            self.random.shuffle(running)
            batch = [self.schedule(sequences[n]) for n in running]
            self.most_together = max(self.most_together, len(batch))
            tokens = (getattr(drawn, "token_id", None) for drawn in self.runner.run(batch))
            for n, item in zip(list(running), batch, strict=True):
                samples = item.samples
                item.seq.num_computed_tokens += item.num_tokens
                if samples:
                    token = next(tokens)
                    outputs[n].append(token)
                    item.seq.token_ids.append(-1 if token is None else token)
                    if token is None or len(outputs[n]) == item.seq.max_tokens:
                        running.remove(n)
                        self.free += item.seq.block_table
                        self.random.shuffle(self.free)
            assert next(tokens, "none left") == "none left"
            step += 1
        return outputs

    def schedule(self, seq: Sequence) -> ScheduledSequence:
        count = min(seq.num_uncomputed_tokens, self.chunk)
        while len(seq.block_table) * self.runner.block_size < seq.num_computed_tokens + count:
            seq.block_table.append(self.free.pop())
        return ScheduledSequence(seq, count)


def sequence(
    prompt: list[int],
    adapter: str | None = None,
    sampling: SamplingParams = GREEDY,
    index: int = 0,
    num_tokens: int = NUM_TOKENS,
) -> Sequence:
    return Sequence("r", index, adapter, sampling, list(prompt), len(prompt), num_tokens)


def prompts(count: int) -> list[list[int]]:
    source = random.Random(5)
    return [[source.randrange(4, 260) for _ in range(source.randrange(2, 30))] for _ in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {architecture: build_model(root / architecture, architecture) for architecture in ARCHITECTURES}


@pytest.fixture(scope="module")
def adapters(
    models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Mapping[str, Path]]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        architecture: {
            name: build_adapter(root / architecture / name, models[architecture], seed=n, **config)
            for n, (name, config) in enumerate(configs.items())
        }
        for architecture, configs in ADAPTERS.items()
    }


@pytest.fixture(scope="module")
def llama(models: Mapping[str, Path], adapters: Mapping[str, Mapping[str, Path]]) -> ModelRunner:
    return load(models["llama"], adapters=as_setting(adapters["llama"]))


@WITH_AND_WITHOUT_KERNELS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_of_a_mixed_batch_equals_pefts_generate_alone(
    architecture: str,
    has_kernels: bool,
    models: Mapping[str, Path],
    adapters: Mapping[str, Mapping[str, Path]],
) -> None:
    if has_kernels:
        need_kernels()
    folder, known = models[architecture], adapters[architecture]
    runner = load(folder, adapters=as_setting(known), compile="kernels" if has_kernels else "off")
    names = [None, *known, None, *reversed(known)]
    texts = prompts(len(names))
    scheduler = HandScheduler(runner)
    outputs = scheduler.run([sequence(text, name) for text, name in zip(texts, names, strict=True)])
    assert scheduler.most_together > 3
    for text, name, output in zip(texts, names, outputs, strict=True):
        expected = generate_with_peft(folder, name and known[name], text, NUM_TOKENS)
        assert output == expected, name
        if name is not None:
            assert expected != generate_with_peft(folder, None, text, NUM_TOKENS), "an adapter without effect"


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("mistral", "float64"),
        ("qwen3", "float64"),
        ("phi3", "float64"),
        ("gpt2", "float64"),
        ("gpt_oss", "float32"),
        ("deepseek_v3", "float32"),
    ],
)
def test_base_models_of_many_kinds_equal_generate(architecture: str, dtype: str, tmp_path: Path) -> None:
    """Sliding windows, sinks, several kinds of heads, experts, learned positions."""
    folder = build_model(tmp_path, architecture)
    texts = prompts(4)
    outputs = HandScheduler(load(folder, dtype=dtype)).run([sequence(text) for text in texts])
    assert outputs == [generate_with_peft(folder, None, text, NUM_TOKENS, dtype) for text in texts]


def test_tokens_do_not_depend_on_chunks_or_blocks(llama: ModelRunner) -> None:
    names = [None, "rank4", "head"]
    rows = [(text, name) for text, name in zip(prompts(3), names, strict=True)]
    runs = [
        HandScheduler(llama, chunk, seed).run([sequence(*row) for row in rows])
        for chunk, seed in ((1, 1), (3, 2), (100, 3))
    ]
    assert runs[0] == runs[1] == runs[2]


def test_seeded_samples_are_the_same_alone_and_in_a_batch(llama: ModelRunner) -> None:
    kinds = [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.8, top_p=0.8),
        GREEDY,
        SamplingParams(seed=(1 << 63) - 1, top_k=20, temperature=1.5),
    ]
    names = [None, "rank4", "head", "rank64-rslora"]
    rows = list(zip(prompts(4), names, kinds, (0, 1, 0, 3), strict=True))
    together = HandScheduler(llama).run([sequence(*row) for row in rows])
    for row, output in zip(rows, together, strict=True):
        assert HandScheduler(llama, chunk=50, seed=9).run([sequence(*row)]) == [output]
    text, name, kind, _ = rows[1]
    assert HandScheduler(llama).run([sequence(text, name, kind, 2)]) != [together[1]]


def test_a_resumed_sample_goes_on_as_it_would_have(llama: ModelRunner) -> None:
    (text,), kind = prompts(1), SamplingParams(seed=4)
    (whole,) = HandScheduler(llama).run([sequence(text, "rank4", kind)])
    resumed = sequence(text, "rank4", kind)
    resumed.token_ids += [token for token in whole[:8] if token is not None]
    resumed.max_tokens = NUM_TOKENS - 8
    assert HandScheduler(llama).run([resumed]) == [whole[8:]]


def test_no_end_token_comes_before_min_tokens(models: Mapping[str, Path], tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    (text,) = prompts(1)
    first = generate_with_peft(folder, None, text, 1)[0]
    change_json(folder / "generation_config.json", eos_token_id=[2, first])
    runner = load(folder)
    ends = runner.served.base.tokenizer.eos_token_ids
    assert ends == {2, first}
    free = sequence(text, num_tokens=1)
    bound = sequence(text, sampling=SamplingParams(temperature=0, min_tokens=1), num_tokens=1)
    free.eos_token_ids = bound.eos_token_ids = ends
    outputs = HandScheduler(runner).run([free, bound])
    assert outputs[0] == [first]
    assert outputs[1][0] not in {2, first}


def test_an_adapter_that_overflows_ends_its_own_sequences_only(
    models: Mapping[str, Path], adapters: Mapping[str, Mapping[str, Path]], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    huge = build_adapter(tmp_path / "huge", models["llama"])
    weights = load_file(huge / "adapter_model.safetensors")
    save_file({key: weight * 1e30 for key, weight in weights.items()}, huge / "adapter_model.safetensors")
    sources = as_setting({"huge": huge, "good": adapters["llama"]["rank4"]})
    runner = load(models["llama"], dtype="float32", cache_max_bytes=200_000, adapters=sources)
    texts = prompts(8)
    names = ["huge", "good", None, "huge", "huge", "good", None, "good"]
    outputs = HandScheduler(runner).run(
        [sequence(text, name) for text, name in zip(texts, names, strict=True)]
    )
    for text, name, output in zip(texts, names, outputs, strict=True):
        if name == "huge":
            assert output == [None]
        else:
            known = adapters["llama"]["rank4"] if name else None
            assert output == generate_with_peft(models["llama"], known, text, NUM_TOKENS, "float32")


def test_adapters_can_be_added_between_steps(
    models: Mapping[str, Path], adapters: Mapping[str, Mapping[str, Path]]
) -> None:
    known = adapters["llama"]
    runner = load(models["llama"])
    (text,) = prompts(1)
    before = HandScheduler(runner).run([sequence(text)])
    with pytest.raises(AdapterError, match="'rank4' is not loaded"):
        HandScheduler(runner).run([sequence(text, "rank4")])
    for name in ("rank4", "rank8-all"):
        add_adapter(runner, name, known[name])
        assert HandScheduler(runner).run([sequence(text, name)]) == [
            generate_with_peft(models["llama"], known[name], text, NUM_TOKENS)
        ]
    assert list(runner.served.adapters) == ["rank4", "rank8-all"]
    assert HandScheduler(runner).run([sequence(text)]) == before


def test_a_broken_adapter_stops_the_start_with_its_path_and_reason(
    models: Mapping[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigurationError, match=f"LORELAY_ADAPTERS: .*'typo' at {tmp_path}/typo: .*not exist"
    ):
        load(models["llama"], adapters=f"typo={tmp_path}/typo")


@pytest.mark.parametrize("architecture", ["falcon", "bloom", "mpt", "gptj"])
def test_a_model_that_never_calls_the_attention_function_is_refused_by_name(
    architecture: str, tmp_path: Path
) -> None:
    folder = build_model(tmp_path / architecture, architecture)
    # MPT's code needs the mask that this attention goes without, so it fails before the calls are counted.
    reason = "forward pass" if architecture == "mpt" else "attention function"
    with pytest.raises(ConfigurationError, match=f"{architecture}.* can't be served: .*{reason}"):
        load(folder)


def test_a_model_whose_logits_differ_in_a_batch_is_refused_by_name(
    models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    forward = LlamaRotaryEmbedding.forward

    def of_the_whole_batch(self: Any, x: Any, position_ids: Any) -> Any:
        return forward(self, x, position_ids + position_ids.max() * (position_ids > 5))

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", of_the_whole_batch)
    with pytest.raises(ConfigurationError, match=r"llama can't be served: its logits .* differ"):
        load(models["llama"])


def test_a_model_that_only_our_own_products_spoil_is_refused_with_the_way_out(
    models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "multiply_plain", lambda rows, weight, bias: rows @ weight.T * 1.5)
    with pytest.raises(ConfigurationError, match=r"llama can't be served: .*LORELAY_COMPILE=off"):
        load(models["llama"], dtype="float64", compile="off")


def test_a_model_that_asks_for_an_unknown_kind_of_attention_is_refused_by_name(
    models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def with_bias(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, position_bias=torch.zeros(1), **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", with_bias)
    with pytest.raises(
        ConfigurationError, match=r"llama can't be served: .*LlamaAttention .*'position_bias'"
    ):
        load(models["llama"])


def test_a_sliding_window_kept_from_the_attention_function_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window longer than the check's sequences shows in no logits."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

    folder = build_model(tmp_path, "gemma2", sliding_window=256)
    init = Gemma2Attention.__init__

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.sliding_window = None

    monkeypatch.setattr(Gemma2Attention, "__init__", forgetful)
    with pytest.raises(ConfigurationError, match="sliding window"):
        load(folder)


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"LORELAY_MODEL: .* encoder-decoder"):
        load(build_model(tmp_path, "t5"))


def test_a_checkpoint_without_all_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"LORELAY_MODEL: .* lacks weights for lm_head.weight"):
        load(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"LORELAY_MODEL: the folder {tmp_path}/none does not exist"):
        load(tmp_path / "none")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=f"LORELAY_MODEL.*{folder} doesn't load"):
        load(folder)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_refused(models: Mapping[str, Path], device: str) -> None:
    with pytest.raises(ConfigurationError, match="LORELAY_DEVICE: "):
        load(models["llama"], device=device)


def test_the_context_is_the_models_own_or_a_shorter_one(models: Mapping[str, Path]) -> None:
    assert load(models["llama"]).max_model_len == 512
    assert load(models["llama"], session_len=100).max_model_len == 100
    with pytest.raises(ConfigurationError, match="LORELAY_SESSION_LEN: 513 is more than 512"):
        load(models["llama"], session_len=513)


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
    ],
)
def test_rope_that_depends_on_the_longest_sequence_ends_at_the_original_context(
    architecture: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 256, **rope}
    original = {"original_max_position_embeddings": 256} if architecture == "phi3" else {}
    folder = build_model(tmp_path, architecture, rope_parameters=parameters, **original)
    assert load(folder).max_model_len == 256
    with pytest.raises(ConfigurationError, match=f"LORELAY_SESSION_LEN: .*{rope['rope_type']}"):
        load(folder, session_len=300)


def test_the_cache_holds_what_is_of_use_and_at_least_one_sequence(
    models: Mapping[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    full_batch = 8 * 512 // 4
    assert load(models["llama"], prefix_cache=False).num_blocks == full_batch
    with caplog.at_level("INFO", logger="worker"):
        assert load(models["llama"]).num_blocks == 4 * full_batch
    assert "KV cache: 16384 tokens in 12 MiB; room for 32.0 sequences of 512 tokens" in caplog.text
    # K and V of 2 layers, 2 heads of 12 float64 each: 768 bytes per token.
    assert load(models["llama"], cache_max_bytes=768 * 600).num_blocks == 150
    with pytest.raises(
        ConfigurationError, match=r"LORELAY_SESSION_LEN: .* of 512 .* LORELAY_CACHE_MAX_BYTES"
    ):
        load(models["llama"], cache_max_bytes=768 * 500)
    assert load(models["llama"], cache_max_bytes=768 * 500, session_len=400).num_blocks == 125


def test_the_model_version_changes_with_the_config(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    version = load(folder).served.base.version
    assert load(folder).served.base.version == version
    change_json(folder / "config.json", rms_norm_eps=1e-4)
    assert load(folder).served.base.version != version


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_half_precision_passes_the_self_check(models: Mapping[str, Path], dtype: str) -> None:
    runner = load(models["llama"], dtype=dtype, num_threads=1)
    (output,) = HandScheduler(runner).run([sequence([5, 6, 7])])
    assert len(output) == NUM_TOKENS


def test_the_self_check_forgives_two_rows_of_rounding_in_half_precision_only() -> None:
    fine, wrong = [0.01] * 8, [1.2, torch.nan, 0.9]
    assert self_check.logits_problem(fine + wrong[:2], torch.bfloat16) is None
    assert "3 of 11 rows" in (self_check.logits_problem(fine + wrong, torch.bfloat16) or "")
    assert "1 of 9 rows" in (self_check.logits_problem([1e-5] * 8 + wrong[:1], torch.float32) or "")


def test_linears_that_a_model_calls_with_the_same_rows_are_one_matmul(models: Mapping[str, Path]) -> None:
    layer = "model.layers.0"
    settings = WorkerSettings(model=str(models["llama"]), device="cpu", compile="off")
    model = loading.load_model(models["llama"], settings, torch.device("cpu"))
    found = prepare(model, settings, kernels=None).fused_linears
    assert [fused.names for fused in found if fused.names[0].startswith(layer)] == [
        [f"{layer}.self_attn.{name}_proj" for name in "qkv"],
        [f"{layer}.self_attn.o_proj"],
        [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
        [f"{layer}.mlp.down_proj"],
    ]


def test_an_empty_batch_gives_no_tokens(llama: ModelRunner) -> None:
    assert llama.run([]) == []


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_the_self_check_takes_no_more_blocks_than_it_says(
    block_size: int, models: Mapping[str, Path]
) -> None:
    """PyTorch refuses to write beyond the cache."""
    assert load(models["llama"], block_size=block_size, compile="off").block_size == block_size


def test_more_adapters_than_slots_answer_as_alone_and_leave_nothing_behind(
    models: Mapping[str, Path], adapters: Mapping[str, Mapping[str, Path]]
) -> None:
    known = adapters["llama"]
    limits = {"max_resident_adapters": 1, "max_cached_adapter_bytes": 1}
    runner = load(models["llama"], adapters=as_setting(known), **limits)
    was_read = threading.Event()
    runner.adapter_cache.on_read = was_read.set
    (text,) = prompts(1)
    for name in [*known, *known]:
        while not runner.adapter_cache.bring(name, ()):
            assert was_read.wait(READ_LIMIT_S)
            was_read.clear()
            assert runner.adapter_cache.settle() == {}
        assert runner.adapter_cache.slot(name) == 0
        assert HandScheduler(runner).run([sequence(text, name)]) == [
            generate_with_peft(models["llama"], known[name], text, NUM_TOKENS)
        ]
    assert runner.adapter_cache.num_reads >= 2 * len(known) - 1
    assert runner.adapter_cache.num_cached_bytes == 0


def test_adapters_take_a_share_of_the_memory_unless_settings_say_how_many(
    models: Mapping[str, Path], adapters: Mapping[str, Mapping[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = as_setting(adapters["llama"])
    monkeypatch.setattr(memory, "DEFAULT_ADAPTER_SHARE", 1e-9)
    cache = load(models["llama"], adapters=sources).adapter_cache
    assert (cache.num_slots, cache.num_cached_bytes) == (1, 0)
    cache = load(
        models["llama"], adapters=sources, max_resident_adapters=3, max_cached_adapter_bytes=10**6
    ).adapter_cache
    assert cache.num_slots == 3
    assert cache.num_cached_bytes > 0

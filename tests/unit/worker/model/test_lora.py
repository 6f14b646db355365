"""Reading adapters, and the stack on single layers; `test_model_runner` compares whole models with PEFT."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shared.errors import AdapterError
from tests.compiled import WITH_AND_WITHOUT_KERNELS, need_kernels
from tests.fakes import served_models
from tests.tiny_models import build_adapter, build_model, change_json
from worker.model import lora
from worker.model.adapter_files import WEIGHT_FILES, LayerWeights, LoadedAdapter, load_adapter
from worker.model.adapter_store import AdapterStore
from worker.model.kernels import native
from worker.model.kernels.products import fuse, number_linears
from worker.model.lora import BASE, LoraStack

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(tmp_path_factory.mktemp("adapters") / "whole", base)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole, tmp_path / "mine"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


def refusal(folder: Path | str, model: Any) -> str:
    fused_linears = number_linears([[name] for name in lora.linears(model)], [])
    store = AdapterStore(model, "", LoraStack(model, fused_linears, model.dtype), served_models())
    with pytest.raises(AdapterError) as caught:
        store.read_new("mine", str(folder))
    message = caught.value.message
    assert "'mine'" in message
    assert str(folder) in message
    return message


def test_an_adapter_is_read_with_its_layers_ranks_and_scaling(base: Path, model: Any, tmp_path: Path) -> None:
    folder = build_adapter(
        tmp_path / "a",
        base,
        rank=8,
        lora_alpha=32,
        targets=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=[1],
        rank_pattern={"v_proj": 4},
        alpha_pattern={"down_proj": 2},
    )
    adapter = load_adapter("a", str(folder), model)
    assert {name: (len(w.a), w.scaling) for name, w in adapter.layers.items()} == {
        "model.layers.1.self_attn.q_proj": (8, 4.0),
        "model.layers.1.self_attn.v_proj": (4, 8.0),
        "model.layers.1.mlp.down_proj": (8, 0.25),
    }
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_adapters_with_the_same_config_ask_peft_once(
    base: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [build_adapter(tmp_path / str(n), base, lora_alpha=n, seed=n) for n in (3, 3, 5)]
    asked = Mock(side_effect=peft.inject_adapter_in_model)
    monkeypatch.setattr(peft, "inject_adapter_in_model", asked)
    read = [load_adapter("a", str(folder), model) for folder in folders]
    assert asked.call_count == 2
    assert [{w.scaling for w in adapter.layers.values()} for adapter in read] == [{3 / 8}, {3 / 8}, {5 / 8}]


def test_rslora_scales_by_the_root_of_the_rank(base: Path, model: Any, tmp_path: Path) -> None:
    folder = build_adapter(tmp_path / "a", base, rank=64, lora_alpha=16, use_rslora=True)
    scalings = {w.scaling for w in load_adapter("a", str(folder), model).layers.values()}
    assert scalings == {2.0}


def test_the_version_changes_with_the_config_and_with_the_weights(folder: Path, model: Any) -> None:
    versions = [load_adapter("a", str(folder), model).version]
    assert load_adapter("b", str(folder), model).version == versions[0]
    change_json(folder / "adapter_config.json", lora_alpha=7)
    versions.append(load_adapter("a", str(folder), model).version)
    change_weights(folder, lambda weights: next(iter(weights.values())).mul_(2))
    versions.append(load_adapter("a", str(folder), model).version)
    assert len(set(versions)) == 3
    assert all(len(version) == 64 for version in versions)


def test_a_missing_folder_is_refused(model: Any, tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere", model)


def test_a_file_in_place_of_a_folder_is_refused(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file", model)


def test_a_folder_that_is_no_adapter_is_refused(model: Any, base: Path) -> None:
    assert "is not an adapter: it has no adapter_config.json" in refusal(base, model)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[" * 100_000], ids=("cut", "list", "empty", "deep"))
def test_a_config_that_is_none_is_refused(folder: Path, model: Any, content: str) -> None:
    (folder / "adapter_config.json").write_text(content)
    refusal(folder, model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "IA3"}, "not a LoRA adapter: its peft_type is 'IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "changed base weights"),
        ({"invented_tomorrow": {"x": 1}}, "invented_tomorrow"),
        ({"target_modules": ["no_such_layer"]}, "PEFT can't apply it"),
        ({"target_modules": ["embed_tokens", "q_proj", "v_proj"]}, "changes model.embed_tokens"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "no lora_A weights for .*k_proj"),
        ({"target_modules": ["q_proj"]}, "weights for .*v_proj.* which its config doesn't name"),
        ({"target_modules": "["}, "can't be read: .*unterminated character set"),
        ({"target_modules": ["q_proj", 1]}, "can't be read: TypeError"),
        ({"rank_pattern": {"(": 4}}, "can't be read: .*unterminated subpattern"),
        ({"lora_alpha": 10**400}, "can't be read: OverflowError"),
        ({"r": 4}, r"shape of .*q_proj.lora_A is \(8, 48\), this model's is \(4, 48\)"),
    ],
    ids=str,
)
def test_what_is_not_plain_lora_for_this_model_is_refused_with_its_reason(
    folder: Path, model: Any, change: dict[str, Any], reason: str
) -> None:
    change_json(folder / "adapter_config.json", **change)
    with pytest.raises(AdapterError, match=reason):
        load_adapter("mine", str(folder), model)
    refusal(folder, model)


def test_missing_weights_are_refused(folder: Path, model: Any) -> None:
    (folder / "adapter_model.safetensors").unlink()
    assert "has no weights" in refusal(folder, model)


def test_damaged_weights_are_refused(folder: Path, model: Any) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")
    assert "adapter_model.safetensors is no safetensors file" in refusal(folder, model)


def test_pickled_weights_without_names_are_refused(folder: Path, model: Any) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({3: torch.zeros(1)}, folder / "adapter_model.bin")
    assert "can't be read" in refusal(folder, model)


def test_a_layer_without_weights_is_refused(folder: Path, model: Any) -> None:
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    change_weights(folder, lambda weights: weights.pop(key))
    assert "has no lora_B weights for model.layers.1.self_attn.q_proj" in refusal(folder, model)


def test_weights_that_are_not_lora_are_refused(folder: Path, model: Any) -> None:
    change_weights(folder, lambda weights: weights.update({"base_model.model.lm_head.weight": torch.ones(2)}))
    assert "not plain LoRA: base_model.model.lm_head.weight" in refusal(folder, model)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(folder: Path, model: Any, side: str, bad: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        next(value for key, value in weights.items() if f"lora_{side}" in key)[0, 0] = bad

    change_weights(folder, spoil)
    assert f".lora_{side} has NaN or infinite weights" in refusal(folder, model)


@pytest.mark.parametrize("file_name", WEIGHT_FILES)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
def test_weights_that_are_no_real_numbers_are_refused(
    folder: Path, model: Any, dtype: torch.dtype, file_name: str
) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(iter(weights))
    weights[key] = weights[key].to(dtype)
    (folder / "adapter_model.safetensors").unlink()
    (save_file if file_name.endswith(".safetensors") else torch.save)(weights, folder / file_name)
    assert f"{file_name}: {key} is {dtype}" in refusal(folder, model)


def test_an_adapter_for_another_base_is_refused_with_both_shapes(model: Any, tmp_path: Path) -> None:
    wider = build_model(tmp_path / "wider", hidden_size=64)
    message = refusal(build_adapter(tmp_path / "a", wider), model)
    assert f"made for another base: it declares base {wider}" in message
    assert "(8, 64), this model's is (8, 48)" in message


def test_an_adapter_for_a_deeper_base_is_refused(model: Any, tmp_path: Path) -> None:
    deeper = build_model(tmp_path / "deeper", num_hidden_layers=3)
    assert "this model doesn't have" in refusal(build_adapter(tmp_path / "a", deeper), model)


def test_layers_that_are_no_linear_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    gpt2 = build_model(tmp_path / "gpt2", "gpt2")
    folder = build_adapter(tmp_path / "a", gpt2, targets=["c_attn"], fan_in_fan_out=True)
    message = refusal(folder, AutoModelForCausalLM.from_pretrained(gpt2))
    assert "c_attn, a Conv1D; only Linear layers are served" in message


def test_another_base_name_is_a_warning_where_the_shapes_fit(
    folder: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_adapter("mine", str(folder), model, "somewhere/tiny")
        assert not caplog.records
        load_adapter("mine", str(folder), model, "somewhere/other")
    (record,) = caplog.records
    assert "'mine'" in record.getMessage()
    assert "other" in record.getMessage()


def test_a_config_of_an_older_peft_is_read(folder: Path, model: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    names = ["peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out"]
    (folder / "adapter_config.json").write_text(json.dumps({name: config[name] for name in names}))
    assert len(load_adapter("mine", str(folder), model).layers) == 4


class Router(nn.Linear):
    """A Linear that returns more than a product, like those of experts in some models."""

    def forward(self, rows: torch.Tensor) -> Any:
        return super().forward(rows), rows


def test_linears_that_compute_something_else_are_left_alone() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "router": Router(2, 2)})
    assert list(lora.linears(model)) == ["plain"]


# The stack, on two Linears of which only one sees all tokens.


def make_adapter(rank: int, seed: int, layer: str = "one", scaling: float = 0.5) -> LoadedAdapter:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(5, rank, generator=generator, dtype=torch.float64)
    return LoadedAdapter("path", Path("path"), "version", {layer: LayerWeights(a, b, scaling)})


FUSED = number_linears([["one"]], ["head"])


class Stacked:
    def __init__(self, has_kernels: bool = False) -> None:
        self.one, self.head = (nn.Linear(6, 5, dtype=torch.float64) for _ in range(2))
        self.kernels = None
        if has_kernels:
            need_kernels()
            self.kernels = native.new_state()
            for linear, fused in zip((self.one, self.head), FUSED, strict=True):
                fuse([linear], fused, self.kernels)
        model = nn.ModuleDict({"one": self.one, "head": self.head})
        self.stack = LoraStack(model, FUSED, torch.float64, self.kernels)
        self.x = torch.randn(1, 7, 6, dtype=torch.float64)

    def put(self, slot: int, adapter: LoadedAdapter) -> None:
        self.stack.put(slot, self.stack.prepare("a", adapter))

    def begin_step(self, spans: list[tuple[int, int]], sampled: tuple[int, ...] = ()) -> None:
        self.stack.set_rows(spans, sampled)
        if self.kernels is not None:
            none = torch.empty(0, dtype=torch.long)
            self.kernels.begin_step(none, none, none[None], none[None], none.view(0, 3), [])

    @torch.inference_mode()
    def run(self, slots: list[int], sampled: tuple[int, ...] = ()) -> torch.Tensor:
        self.begin_step([(slot, 1) for slot in slots], sampled)
        return self.one(self.x)[0]

    @torch.inference_mode()
    def expected(self, adapters: list[LoadedAdapter | None], layer: str = "one") -> torch.Tensor:
        rows = []
        for n, adapter in enumerate(adapters):
            row = nn.functional.linear(self.x[0, n], self.one.weight, self.one.bias)
            if adapter is not None:
                weights = adapter.layers[layer]
                row = row + weights.scaling * weights.b @ (weights.a @ self.x[0, n])
            rows.append(row)
        return torch.stack(rows)


@WITH_AND_WITHOUT_KERNELS
def test_each_row_gets_its_own_adapter_and_no_other(has_kernels: bool) -> None:
    layer = Stacked(has_kernels)
    adapters = {0: make_adapter(2, 0), 3: make_adapter(4, 1), 1: make_adapter(1, 2)}
    for slot, adapter in adapters.items():
        layer.put(slot, adapter)
    for slots in (
        [0, BASE, 1, 3, 0, 0, BASE],
        [1, 0, 0, 1, 0, 1, 0],
        [3] * 7,
        [BASE, 3, 3, 3, 3, 3, 3],
    ):
        torch.testing.assert_close(layer.run(slots), layer.expected([adapters.get(slot) for slot in slots]))


@WITH_AND_WITHOUT_KERNELS
def test_long_spans_get_their_own_adapter_beside_single_rows(
    has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "MIN_LONG_ROWS", 8)
    layer = Stacked(has_kernels)
    layer.x = torch.randn(1, 25, 6, dtype=torch.float64)
    adapters = [make_adapter(2, 0), make_adapter(4, 1)]
    for slot, adapter in enumerate(adapters):
        layer.put(slot, adapter)
    spans = [(1, 1), (0, 8), (BASE, 9), (1, 2), (BASE, 1), (0, 4)]
    layer.begin_step(spans)
    with torch.inference_mode():
        output = layer.one(layer.x)[0]
    wanted = [None if slot == BASE else adapters[slot] for slot, count in spans for _ in range(count)]
    torch.testing.assert_close(output, layer.expected(wanted))


@WITH_AND_WITHOUT_KERNELS
def test_without_an_adapter_in_the_batch_nothing_is_added(has_kernels: bool) -> None:
    layer = Stacked(has_kernels)
    plain = layer.run([BASE] * 7)
    layer.put(0, make_adapter(2, 0))
    assert torch.equal(layer.run([BASE] * 7), plain)
    mixed = layer.run([0, *[BASE] * 6])
    assert torch.equal(mixed[1:], plain[1:])
    assert not torch.equal(mixed[0], plain[0])


@WITH_AND_WITHOUT_KERNELS
def test_the_adapter_of_a_slot_is_replaced_while_others_stay(has_kernels: bool) -> None:
    layer = Stacked(has_kernels)
    first, second, third = (make_adapter(rank, rank) for rank in (3, 2, 5))
    layer.put(0, first)
    layer.put(1, second)
    torch.testing.assert_close(layer.run([1] * 7), layer.expected([second] * 7))
    layer.put(0, third)
    layer.put(1, first)
    slots = [1, 0, BASE, 0, 1, BASE, 1]
    wanted = [{1: first, 0: third}.get(slot) for slot in slots]
    torch.testing.assert_close(layer.run(slots), layer.expected(wanted))


@WITH_AND_WITHOUT_KERNELS
def test_a_slot_keeps_nothing_in_layers_that_its_next_adapter_leaves_alone(has_kernels: bool) -> None:
    layer = Stacked(has_kernels)
    plain = layer.run([BASE] * 7)
    layer.put(0, make_adapter(2, 0))
    layer.put(1, make_adapter(3, 1))
    layer.put(0, make_adapter(2, 0, layer="head"))
    assert torch.equal(layer.run([0] * 7), plain)
    torch.testing.assert_close(layer.run([1] * 7), layer.expected([make_adapter(3, 1)] * 7))


@WITH_AND_WITHOUT_KERNELS
def test_the_head_sees_the_sampled_rows_only(has_kernels: bool) -> None:
    layer = Stacked(has_kernels)
    layer.put(0, make_adapter(2, 0, layer="head"))
    layer.run([BASE, 0, 0, BASE, 0, BASE, BASE], sampled=(0, 2, 4))
    with torch.inference_mode():
        delta = layer.head(layer.x[:, :3]) - nn.functional.linear(
            layer.x[:, :3], layer.head.weight, layer.head.bias
        )
    assert delta[0].abs().sum(-1).gt(0).tolist() == [False, True, True]


@WITH_AND_WITHOUT_KERNELS
def test_an_adapter_that_overflows_spoils_no_other_row(has_kernels: bool) -> None:
    layer = Stacked(has_kernels)
    huge = make_adapter(2, 0)
    huge.layers["one"].a.mul_(1e307)
    layer.put(0, huge)
    good = make_adapter(2, 1)
    layer.put(1, good)
    layer.x.mul_(1e10)
    output = layer.run([0, 1, BASE, 1, 0, BASE, 1])
    assert not output[0].isfinite().all()
    expected = layer.expected([None, good, None, good, None, None, good])
    rows = [1, 2, 3, 5, 6]
    torch.testing.assert_close(output[rows], expected[rows])


def test_weights_that_overflow_the_models_precision_are_refused() -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 5, dtype=torch.float16)})
    stack = LoraStack(model, number_linears([["one"]], []), torch.float16)
    with pytest.raises(AdapterError, match=r"one\.lora_B overflows torch\.float16"):
        stack.prepare("a", make_adapter(2, 0, scaling=1e6))


def test_a_layer_that_does_not_see_the_batchs_tokens_is_refused() -> None:
    with pytest.raises(AdapterError, match="changes expert"):
        Stacked().put(0, make_adapter(2, 0, layer="expert"))

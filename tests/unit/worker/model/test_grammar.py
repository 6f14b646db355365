"""Structured output on a whole tiny model, whose own choices would be letters without any structure."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher

from shared.errors import InvalidRequest
from shared.messages import FinishReason, GenerationRequest, SamplingParams, StreamEvent
from shared.settings import WorkerSettings
from tests.fakes import build_engine, encoded
from tests.streams import make_request
from tests.tiny_models import SPECIAL_TOKENS, build_adapter, build_model, change_json
from tests.tokenizers import CHATML, byte_level, wrap
from worker.engine.block_manager import BlockManager
from worker.engine.engine import BatchingEngine
from worker.engine.sequence import Batch, OutOfDeviceMemory, Sampled, Sequence
from worker.engine.served_models import ServedModel, ServedModels
from worker.model import grammar as grammar_module
from worker.model.grammar import Grammars
from worker.model.model_runner import ModelRunner
from worker.model.startup import load_model_runner
from worker.model.tokenizer import Tokenizer

torch.set_num_threads(1)

BLOCK_SIZE = 4
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 10, "maximum": 99}, "maxItems": 2},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}


def json_grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})


def regex_grammar(regex: str) -> str:
    return LLMatcher.grammar_from_regex(regex)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for which the letter x is an end token, besides its special one."""
    folder = build_model(tmp_path_factory.mktemp("grammar"))
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    change_json(folder / "generation_config.json", eos_token_id=[vocab["<|im_end|>"], vocab["x"]])
    return folder


@pytest.fixture(scope="module")
def runner(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    adapter = build_adapter(tmp_path_factory.mktemp("adapter"), folder)
    settings = WorkerSettings(
        model=str(folder),
        adapters=f"a={adapter}",
        device="cpu",
        dtype="float64",
        compile="off",
        block_size=BLOCK_SIZE,
    )
    return load_model_runner(settings)


def request_of(grammar: str, **values: Any) -> GenerationRequest:
    names = {"n", "adapter_name", "request_id"}
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 200} | {
        name: value for name, value in values.items() if name not in names
    }
    return make_request(
        values.get("adapter_name"),
        request_id=values.get("request_id", "r"),
        base="tiny",
        messages=[],
        prompts=("some prompt",),
        n=values.get("n", 1),
        sampling=SamplingParams(grammar=grammar, **sampling),
    )


class Bench:
    """An engine on the tiny model."""

    def __init__(self, runner: ModelRunner, num_blocks: int = 500) -> None:
        self.engine: BatchingEngine = build_engine(runner, BlockManager(num_blocks, BLOCK_SIZE))

    def add(self, request: GenerationRequest, events: list[StreamEvent] | None = None) -> list[StreamEvent]:
        outputs = self.engine.add_request(request, encoded(self.engine, request), events or [])
        return [output.event for output in outputs]

    def finish(self) -> dict[str, list[StreamEvent]]:
        events: dict[str, list[StreamEvent]] = {}
        while self.engine.has_work:
            for output in self.engine.step():
                events.setdefault(output.request_id, []).append(output.event)
        return events


def answer(runner: ModelRunner, request: GenerationRequest) -> list[StreamEvent]:
    bench = Bench(runner)
    return bench.add(request) or bench.finish()["r"]


def text_of(events: list[StreamEvent], index: int = 0) -> str:
    return "".join(event.text for event in events if event.index == index)


def tokens_of(events: list[StreamEvent], index: int = 0) -> list[int]:
    return [token for event in events if event.index == index for token in event.token_ids]


def reason_of(events: list[StreamEvent], index: int = 0) -> FinishReason | None:
    return [event for event in events if event.index == index][-1].finish_reason


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_has_the_schemas_form_and_ends_by_itself(runner: ModelRunner, seed: int) -> None:
    events = answer(runner, request_of(json_grammar(SCHEMA), seed=seed))
    value = json.loads(text_of(events))
    assert [*value] == ["name", "kind", "ages"]
    assert value["kind"] in ("cat", "dog")
    assert len(value["name"]) <= 6
    assert all(10 <= age <= 99 for age in value["ages"])
    assert reason_of(events) == FinishReason.STOP


def test_a_row_without_a_grammar_gets_the_tokens_that_it_gets_alone(runner: ModelRunner) -> None:
    free = request_of("", request_id="free", temperature=0, max_tokens=12)
    alone = Bench(runner)
    alone.add(free)
    expected = alone.finish()["free"]
    bench = Bench(runner)
    for request in (
        request_of(json_grammar(SCHEMA)),
        free,
        request_of(regex_grammar("[0-9]+"), request_id="s"),
    ):
        bench.add(request)
    assert text_of(bench.finish()["free"]) == text_of(expected)


def test_each_choice_and_each_adapter_follows_the_grammar_on_its_own(runner: ModelRunner) -> None:
    bench = Bench(runner)
    bench.add(request_of(json_grammar(SCHEMA), n=4))
    bench.add(request_of(json_grammar(SCHEMA), adapter_name="a", request_id="s"))
    events = bench.finish()
    texts = [*(text_of(events["r"], index) for index in range(4)), text_of(events["s"])]
    for text in texts:
        assert json.loads(text)["kind"] in ("cat", "dog")
    assert len(set(texts)) == 5


def test_an_answer_resumed_after_any_event_is_the_same(runner: ModelRunner) -> None:
    schema = {"type": "array", "items": {"enum": ["ab", 7]}, "minItems": 2, "maxItems": 2}
    request = request_of(json_grammar(schema), n=2)
    events = answer(runner, request)
    assert len(events) > 10
    for num_logged in range(len(events)):
        bench = Bench(runner)
        bench.add(request, events[:num_logged])
        resumed = events[:num_logged] + bench.finish()["r"]
        for index in range(2):
            assert tokens_of(resumed, index) == tokens_of(events, index)
            assert text_of(resumed, index) == text_of(events, index)


def test_sequences_that_are_preempted_and_computed_again_keep_their_grammars(runner: ModelRunner) -> None:
    grammar = regex_grammar("[a-m]{16}")
    requests = [request_of(grammar, request_id=f"r{seed}", seed=seed) for seed in range(3)]
    alone = {}
    for request in requests:
        bench = Bench(runner)
        bench.add(request)
        alone |= bench.finish()
    crowded = Bench(runner, num_blocks=14)
    for request in requests:
        crowded.add(request)
    together = crowded.finish()
    assert {name: text_of(events) for name, events in together.items()} == {
        name: text_of(events) for name, events in alone.items()
    }


def test_a_request_that_is_handed_back_for_want_of_memory_continues_by_its_grammar(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(json_grammar(SCHEMA))
    expected = text_of(answer(runner, request))
    bench = Bench(runner)
    bench.add(request_of(json_grammar(SCHEMA), request_id="older"))
    bench.add(request)
    events = [output.event for _ in range(8) for output in bench.engine.step() if output.request_id == "r"]

    def run(batch: Batch) -> list[Sampled]:
        raise OutOfDeviceMemory

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", run)
        with pytest.raises(OutOfDeviceMemory):
            bench.engine.step()
    assert bench.engine.shed() == ("r", [])
    bench.add(request, events)
    assert text_of(events) + text_of(bench.finish()["r"]) == expected


def test_an_end_token_that_is_also_a_letter_ends_no_string(runner: ModelRunner) -> None:
    """The bias would make the letter x, an end token here, the likeliest one."""
    vocab = json.loads(runner.served.base.tokenizer.definition or "")["model"]["vocab"]
    x = vocab["x"]
    events = answer(runner, request_of(regex_grammar("[x-z]{8}"), logit_bias={x: 100.0}))
    assert len(text_of(events)) == 8
    assert set(text_of(events)) == {"y", "z"}
    assert tokens_of(events)[-1] == x


def test_a_bias_can_make_no_token_possible_that_breaks_the_grammar(runner: ModelRunner) -> None:
    events = answer(runner, request_of(regex_grammar("[ab]{8}"), logit_bias={100: 100.0, 101: 100.0}))
    assert set(text_of(events)) <= {"a", "b"}
    assert len(text_of(events)) == 8


@pytest.mark.parametrize("values", [{"min_tokens": 20}, {"ignore_eos": True}], ids=str)
def test_a_complete_grammar_ends_the_answer_whatever_else_is_asked_for(
    runner: ModelRunner, values: dict[str, Any]
) -> None:
    events = answer(runner, request_of(regex_grammar("abc"), **values))
    assert (text_of(events), reason_of(events)) == ("abc", FinishReason.STOP)


def test_min_tokens_puts_off_the_end_while_the_grammar_allows_more(runner: ModelRunner) -> None:
    events = answer(runner, request_of(regex_grammar("[a-w]*"), min_tokens=15, max_tokens=20))
    assert len(tokens_of(events)) > 15


def test_an_answer_cut_by_its_length_says_so(runner: ModelRunner) -> None:
    events = answer(runner, request_of(regex_grammar("a{50}"), max_tokens=7))
    assert (text_of(events), reason_of(events)) == ("a" * 7, FinishReason.LENGTH)


def test_a_stop_string_ends_the_answer_amid_the_grammar(runner: ModelRunner) -> None:
    events = answer(runner, request_of(regex_grammar("abcdef"), stop=("d",)))
    assert (text_of(events), reason_of(events)) == ("abc", FinishReason.STOP)


def test_a_grammar_that_needs_a_token_outside_the_allowed_ones_is_an_error_that_says_so(
    runner: ModelRunner,
) -> None:
    events = answer(runner, request_of(regex_grammar("[0-9]{3}"), allowed_token_ids=(100, 101)))
    assert events[-1].error is not None
    assert "allowed_token_ids" in events[-1].error.message


def test_a_grammar_that_cant_be_compiled_is_an_error_of_its_request(runner: ModelRunner) -> None:
    (event,) = answer(runner, request_of("no grammar"))
    assert event.error is not None
    assert event.error.code == InvalidRequest.code


def test_a_matcher_that_fails_ends_only_its_own_request(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that breaks the grammar, as a worker of another version might have written it."""
    broken = request_of(regex_grammar("[0-9]+"), request_id="broken")
    bench = Bench(runner)
    bench.add(broken, [StreamEvent(0, token_ids=(50, 51), text="no")])
    bench.add(request_of(regex_grammar("[ab]{5}")))
    events = bench.finish()
    assert events["broken"][-1].error is not None
    assert "grammar" in events["broken"][-1].error.message
    assert len(text_of(events["r"])) == 5


def test_a_grammar_is_compiled_once_and_the_least_recently_used_is_dropped(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_NUM_COMPILED", 2)
    grammars, tokenizer = Grammars(runner.served, runner.vocab_size), runner.served.base.tokenizer
    first, second, third = (regex_grammar(letter) for letter in "abc")
    compiled = grammars.compile(first, tokenizer)
    grammars.compile(second, tokenizer)
    assert grammars.compile(first, tokenizer) is compiled
    kept = grammars.compile(first, tokenizer)
    dropped = grammars.compile(second, tokenizer)
    grammars.compile(first, tokenizer)
    grammars.compile(third, tokenizer)
    assert grammars.compile(first, tokenizer) is kept
    assert grammars.compile(second, tokenizer) is not dropped


def test_a_special_token_stands_in_no_string(runner: ModelRunner) -> None:
    schema = {"type": "string", "minLength": 12, "maxLength": 20}
    events = answer(runner, request_of(json_grammar(schema), seed=9))
    assert not any(token < len(SPECIAL_TOKENS) for token in tokens_of(events)[:-1])


def test_base_and_adapter_may_have_tokenizers_of_different_sizes() -> None:
    small, large = (
        Tokenizer(wrap(byte_level(), CHATML, added), frozenset())
        for added in ((), [f"<extra{number}>" for number in range(99)])
    )
    served = ServedModels(ServedModel("base", "1", "", small, created=0))
    served.add(ServedModel("own", "1", "", large, created=0, adapter_name="own"))
    vocab_size = 1024
    grammars = Grammars(served, vocab_size)
    sampling = SamplingParams(grammar=regex_grammar("ab"))
    seqs = [
        Sequence("r", 0, name, sampling, [0], 1, max_tokens=9, eos_token_ids=model.eos_token_ids)
        for name, model in ((None, small), ("own", large))
    ]
    for some in ([seqs[0]], [seqs[1]], seqs):
        masks = grammars.masks(some)
        assert masks is not None
        assert (masks.errors, masks.allowed.shape) == ({}, (len(some), vocab_size // 32))

"""A mixed batch on the real model in float32, against PEFT's own `generate` with each adapter alone."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.messages import SamplingParams
from shared.settings import WorkerSettings
from tests.acceptance.conftest import ADAPTERS
from tests.fakes import build_engine
from tests.streams import make_request
from worker.engine.engine import BatchingEngine
from worker.model.startup import load_model_runner

PROMPTS = ("What is the capital of France?", "Tell me about the sea.", "The bus was late again.")
NUM_TOKENS = 40
TIE = 1e-4
"""Top logits nearer than this may come in either order in float32."""
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sets torch to one thread; of two, each would wait at each operation for the one that is delayed."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def answers(demo_model: str) -> dict[tuple[str | None, str], list[int]]:
    """Greedy tokens of every (adapter, prompt), from one mixed batch with staggered arrivals."""
    adapters = " ".join(f"{name}={ADAPTERS / name}" for name in ("pirate", "sentiment"))
    settings = WorkerSettings.load(
        model=demo_model, adapters=adapters, dtype="float32", session_len=512, max_prefill_tokens=24
    )
    runner = load_model_runner(settings)
    engine = build_engine(runner, max_batch_size=16, max_prefill_tokens=24)
    tokens: dict[tuple[str | None, str], list[int]] = {}
    for prompt in PROMPTS:
        for adapter_name in (None, "pirate", "sentiment"):
            tokens[adapter_name, prompt] = []
            request = make_request(
                adapter_name,
                request_id=f"{adapter_name}|{prompt}",
                messages=[{"role": "user", "content": prompt}],
                sampling=SamplingParams(temperature=0, max_tokens=NUM_TOKENS),
            )
            assert engine.add_request(request, engine.encode(request)) == []
            _step(engine, tokens)
    while engine.has_work:
        _step(engine, tokens)
    return tokens


def _step(engine: BatchingEngine, tokens: dict[tuple[str | None, str], list[int]]) -> None:
    for append in engine.step():
        adapter, prompt = append.request_id.split("|")
        tokens[None if adapter == "None" else adapter, prompt] += append.event.token_ids


@pytest.mark.parametrize("adapter_name", [None, "pirate", "sentiment"])
def test_every_row_of_a_mixed_batch_has_the_tokens_of_its_adapter_alone(
    demo_model: str, answers: dict[tuple[str | None, str], list[int]], adapter_name: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    if adapter_name is not None:
        with warnings.catch_warnings():
            # PEFT 0.21 asks for an attribute that transformers 5.23 calls deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, ADAPTERS / adapter_name)
    for prompt in PROMPTS:
        expected, gaps = _generate(model, tokenizer, prompt)
        _assert_same_but_for_ties(answers[adapter_name, prompt], expected, gaps)


def _generate(model: Any, tokenizer: Any, prompt: str) -> tuple[list[int], list[float]]:
    """Greedy tokens, and how far the top two logits were apart at each."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    gaps = []
    for logits in output.logits:
        first, second = logits[0].topk(2).values.tolist()
        gaps.append(first - second)
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), gaps


def _assert_same_but_for_ties(tokens: list[int], expected: list[int], gaps: list[float]) -> None:
    for position, (token, wanted, gap) in enumerate(zip(tokens, expected, gaps, strict=False)):
        if token != wanted:
            assert gap <= TIE, f"token {position}: {token}, not {wanted}, at a gap of {gap}"
            return
    assert len(tokens) == len(expected)

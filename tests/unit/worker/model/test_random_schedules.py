"""Random schedules on whole models: whatever happens to a request, it gets the tokens it gets alone.

Requests share prefixes, run out of blocks, are handed back, aborted, and lose steps to a device that is out
of memory. Further things that may happen to an engine are further methods of `Schedule`, named in `MOVES`.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.messages import NO_INPUTS, GenerationRequest, SamplingParams, StreamEvent, TemplateInputs
from shared.settings import WorkerSettings
from tests.block_checks import check_blocks
from tests.compiled import need_kernels, wait_until_compiled
from tests.fakes import FakeDetokenizer, build_engine
from tests.streams import make_request
from tests.tiny_models import build_adapter, build_model, generate_with_peft
from worker.engine.block_manager import BlockManager
from worker.engine.records import Output
from worker.engine.sequence import Batch, OutOfDeviceMemory, Sampled
from worker.engine.served_models import ServedModels
from worker.model.model_runner import ModelRunner
from worker.model.startup import load_model_runner

torch.set_num_threads(1)

BLOCK_SIZE = 4
NUM_TOKENS = 9
ADAPTERS: dict[str, dict[str, Any]] = {"small": {"rank": 4}, "large": {"rank": 8, "targets": "all-linear"}}


class Case(NamedTuple):
    """The adapter and the prompt of a request."""

    adapter_name: str | None
    prompt: tuple[int, ...]


def make_cases() -> list[Case]:
    """Prompts of 1 to 23 tokens, many with a beginning in common, for the base and each adapter."""
    rng = random.Random(2)
    beginning = [rng.randrange(4, 260) for _ in range(17)]
    cuts = [(17, 0), (17, 6), (16, 1), (12, 3), (8, 4), (4, 0), (0, 1), (0, 9)]
    prompts = [(*beginning[:cut], *(rng.randrange(4, 260) for _ in range(rest))) for cut, rest in cuts]
    return [Case(adapter_name, prompt) for prompt in prompts for adapter_name in (None, *ADAPTERS)]


CASES = make_cases()


class Model(NamedTuple):
    """A loaded model, and where it and its adapters come from."""

    runner: ModelRunner
    folder: Path
    adapters: Mapping[str, Path]

    def expected(self, case: Case) -> list[int]:
        """The reference's greedy tokens."""
        return _generate(self.folder, case.adapter_name and self.adapters[case.adapter_name], case.prompt)


@cache
def _generate(folder: Path, adapter: Path | None, prompt: tuple[int, ...]) -> list[int]:
    return generate_with_peft(folder, adapter, prompt, NUM_TOKENS)


@pytest.fixture(
    scope="module", params=[("llama", "graph"), ("gemma2", "off")], ids=["llama-compiled", "gemma2-torch"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    architecture, compile = request.param
    if compile == "graph":
        need_kernels()
    root = tmp_path_factory.mktemp(architecture)
    folder = build_model(root / "model", architecture)
    adapters = {
        name: build_adapter(root / name, folder, seed=n, **config)
        for n, (name, config) in enumerate(ADAPTERS.items())
    }
    runner = load_model_runner(
        WorkerSettings(
            model=str(folder),
            adapters=" ".join(f"{name}={path}" for name, path in adapters.items()),
            device="cpu",
            dtype="float64",
            block_size=BLOCK_SIZE,
            session_len=64,
            compile=compile,
        )
    )
    if compile == "graph":
        wait_until_compiled(runner)
    return Model(runner, folder, adapters)


class FailingRunner:
    """Runs batches on a model; a step may fail before or after it."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.served = _with_numbers(runner.served)
        self.fails: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, batch: Batch) -> list[Sampled]:
        fails, self.fails = self.fails if len({item.seq.request_id for item in batch}) > 1 else None, None
        if fails == "before":
            raise OutOfDeviceMemory
        sampled = self._runner.run(batch)
        if fails == "after":
            raise OutOfDeviceMemory
        return sampled


class NumberTokenizer:
    """Messages are lists of token ids; nothing ends a sequence but its length."""

    eos_token_ids: frozenset[int] = frozenset()
    special_tokens: Mapping[int, str] = {}

    def encode_chat(
        self, messages: list[dict[str, Any]], inputs: TemplateInputs = NO_INPUTS, tenant: str = ""
    ) -> list[int]:
        return list(messages[0]["content"])

    def token_bytes(self, token_id: int) -> bytes:
        return b""

    def grammar_of(self, request: GenerationRequest) -> str:
        return ""

    def message_parser(self, request: GenerationRequest, index: int, prompt: object) -> None:
        return None

    def detokenizer(self) -> FakeDetokenizer:
        return FakeDetokenizer()


def _with_numbers(served: ServedModels) -> ServedModels:
    """The same models with the tokenizer of numbers."""
    base, *adapters = (replace(model, tokenizer=NumberTokenizer()) for model in served)
    numbered = ServedModels(base)
    for adapter in adapters:
        numbered.add(adapter)
    return numbered


class Schedule:
    """An engine whose requests meet with all kinds of events."""

    def __init__(self, model: Model, num_blocks: int, max_batch_size: int, max_prefill_tokens: int) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.cases: dict[str, Case] = {}
        self.num_choices: dict[str, int] = {}
        self.events: dict[str, list[StreamEvent]] = {}
        self._runner = FailingRunner(model.runner)
        self._engine = build_engine(
            self._runner, self.blocks, max_batch_size=max_batch_size, max_prefill_tokens=max_prefill_tokens
        )

    def add(self, number: int) -> None:
        """A new request, of one to three choices."""
        request_id = f"r{len(self.cases)}"
        self.cases[request_id] = CASES[number % len(CASES)]
        self.num_choices[request_id] = 1 + number // len(CASES) % 3
        self.events[request_id] = []
        self._claim(request_id)

    def step(self, number: int) -> None:
        """Runs one to four steps."""
        for _ in range(1 + number % 4):
            if self._engine.has_work:
                self._note(self._engine.step())

    def abort(self, number: int) -> None:
        """A client leaves."""
        for request_id in self._any_running(number):
            self._note(self._engine.abort_request(request_id))

    def hand_back(self, number: int) -> None:
        """A request comes back with what its log holds, as to another worker."""
        for request_id in self._any_running(number):
            self._engine.drop_request(request_id)
            self._claim(request_id)

    def suspect(self, number: int) -> None:
        """A request comes back that must run alone."""
        for request_id in self._any_running(number):
            self._engine.drop_request(request_id)
            self._claim(request_id, alone=True)
            self._engine.run_isolated()

    def clear(self, number: int) -> None:
        """The request that ran alone is beyond doubt."""
        self._engine.end_isolation()

    def fail(self, number: int) -> None:
        """A step of several is out of memory: the newest of them makes room, and comes back."""
        self._runner.fails = ("before", "after")[number % 2]
        try:
            self.step(0)
        except OutOfDeviceMemory:
            shed_id, appends = self._engine.shed()
            assert shed_id is not None
            assert appends == []
            self._claim(shed_id)
        self._runner.fails = None

    def finish(self) -> None:
        """Steps until nothing is left."""
        self._engine.end_isolation()
        for _ in range(1000):
            if not self._engine.has_work:
                return
            self._note(self._engine.step())
        pytest.fail("the schedule never came to an end")

    def _claim(self, request_id: str, *, alone: bool = False) -> None:
        case = self.cases[request_id]
        request: GenerationRequest = make_request(
            case.adapter_name,
            request_id=request_id,
            messages=[{"role": "user", "content": case.prompt}],
            sampling=SamplingParams(temperature=0, max_tokens=NUM_TOKENS),
            n=self.num_choices[request_id],
        )
        prompts = self._engine.encode(request)
        assert self._engine.add_request(request, prompts, self.events[request_id], alone=alone) == []

    def _running(self) -> Iterator[str]:
        return (name for name, events in self.events.items() if not (events and events[-1].is_terminal))

    def _any_running(self, number: int) -> list[str]:
        running = list(self._running())
        return [running[number % len(running)]] if running else []

    def _note(self, appends: list[Output]) -> None:
        for append in appends:
            self.events[append.request_id].append(append.event)


MOVES = (*["add"] * 4, *["step"] * 5, "abort", "hand_back", "fail", "suspect", "clear", "clear")


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 1000)), min_size=10, max_size=40),
    st.integers(8, 30),
    st.integers(2, 8),
    st.integers(1, 40),
)
def test_whatever_the_schedule_every_request_gets_the_tokens_it_gets_alone(
    model: Model, moves: list[tuple[str, int]], num_blocks: int, max_batch_size: int, max_prefill_tokens: int
) -> None:
    schedule = Schedule(model, num_blocks, max_batch_size, max_prefill_tokens)
    for move, number in moves:
        getattr(schedule, move)(number)
    schedule.finish()
    for request_id, events in schedule.events.items():
        assert [event.event_no for event in events] == list(range(len(events)))
        for index in range(schedule.num_choices[request_id]):
            token_ids = [t for event in events if event.index == index for t in event.token_ids]
            assert token_ids == model.expected(schedule.cases[request_id])[: len(token_ids)]
            assert len(token_ids) == NUM_TOKENS or events[-1].finish_reason == "abort"
    check_blocks(schedule.blocks)

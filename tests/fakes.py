"""Doubles of the device and the tokenizer, for tests of the control path without a model."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from shared.errors import AdapterError, GenerationFailed, InvalidRequest, LorelayError
from shared.messages import NO_INPUTS, ForwardState, GenerationRequest, TemplateInputs
from tests.streams import BASE
from worker.engine.block_manager import BlockManager
from worker.engine.engine import BatchingEngine
from worker.engine.ports import Adapters, Engine, Model
from worker.engine.records import AdapterCounts, Prompts
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Batch, Sampled, SampledToken, Sequence
from worker.engine.served_models import ServedModel, ServedModels
from worker.engine.step_pace import StepPace

EOS = 0


def unpaced() -> StepPace:
    """A pace under which steps take no time, so that only the scheduler's own limit bounds their chunks."""
    return StepPace(100, clock=lambda: 0.0)


class AllResident:
    """A residency in which all adapters are on the device."""

    num_slots = 1 << 30
    resident: tuple[str, ...] = ()
    counts = AdapterCounts()

    def __init__(self) -> None:
        self.on_read: Callable[[], None] = lambda: None

    def bring(self, name: str | None, in_use: Collection[str | None]) -> bool:
        return True

    def is_loading(self, name: str | None) -> bool:
        return False

    def settle(self) -> dict[str, AdapterError]:
        return {}


class FakeModel:
    """Draws each token from a function of the sequence alone, and checks what it is given.

    It keeps what every place of a cache would stand for, the tokens up to there and their adapter: a token
    whose block was given away, never written or shared wrongly shows as a failed assertion.
    """

    def __init__(
        self,
        next_token: Callable[[Sequence], int | None] | None = None,
        *,
        block_size: int = 4,
        max_model_len: int = 64,
        adapter_names: Iterable[str] = "abc",
        num_blocks: int = 512,
        adapter_cache: Adapters | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self.num_blocks, self.block_size = num_blocks, block_size
        self.adapter_cache = adapter_cache or AllResident()
        self.forward_state = ForwardState.EAGER
        self.dtype = "float32"
        self.is_closed = False
        self.vocab_size = 2**20
        self.served = served_models(adapter_names)
        self.batches: list[list[tuple[str, int]]] = []
        self._next_token = next_token or letters
        self._cache: dict[tuple[int, int], tuple[str | None, list[int]]] = {}

    def close(self) -> None:
        self.is_closed = True

    def compile_grammar(self, grammar: str, tokenizer: object) -> object:
        return grammar

    def run(self, batch: Batch) -> list[Sampled]:
        self.batches.append([(item.seq.request_id, item.num_tokens) for item in batch])
        for item in batch:
            self._write(item.seq, item.num_tokens)
        for item in batch:
            self._check(item.seq, item.seq.num_computed_tokens + item.num_tokens)
        return [drawn(self._next_token(item.seq)) for item in batch if item.samples]

    def _write(self, seq: Sequence, num_tokens: int) -> None:
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens + num_tokens):
            self._cache[self._place(seq, position)] = self._contents(seq, position)

    def _check(self, seq: Sequence, num_tokens: int) -> None:
        for position in range(num_tokens):
            assert self._cache[self._place(seq, position)] == self._contents(seq, position)

    def _contents(self, seq: Sequence, position: int) -> tuple[str | None, list[int]]:
        return seq.adapter_version or seq.adapter_name, seq.token_ids[: position + 1]

    def _place(self, seq: Sequence, position: int) -> tuple[int, int]:
        return seq.block_table[position // self.block_size], position % self.block_size


def served_models(adapter_names: Iterable[str] = (), base: str = BASE) -> ServedModels:
    """A base of version `m1`, and adapters whose versions are their names and a 1."""
    served = ServedModels(ServedModel(base, "m1", "folder", FakeTokenizer(), created=1))
    for name in adapter_names:
        served.add(ServedModel(name, f"{name}1", f"folder/{name}", FakeTokenizer(), 1, name))
    return served


def build_engine(
    model: Model,
    blocks: BlockManager | None = None,
    *,
    max_batch_size: int = 8,
    max_prefill_tokens: int = 16,
    clock: Callable[[], float] = time.monotonic,
) -> BatchingEngine:
    """An engine on a model, with steps that take no time."""
    blocks = blocks or BlockManager(model.num_blocks, model.block_size)
    scheduler = Scheduler(
        blocks,
        unpaced(),
        max_batch_size=max_batch_size,
        max_prefill_tokens=max_prefill_tokens,
        adapters=model.adapter_cache,
    )
    return BatchingEngine(model, scheduler, clock)


def encoded(engine: Engine, request: GenerationRequest) -> Prompts:
    """The prompts that the prompt encoder passes to the engine for a request."""
    try:
        return engine.encode(request)
    except LorelayError as error:
        return error


def drawn(token_id: int | None) -> Sampled:
    """The result of a model for a token that it drew; None stands for logits that are not finite."""
    return GenerationFailed("not finite") if token_id is None else SampledToken(token_id)


def letters(seq: Sequence) -> int:
    """A letter that depends on the adapter and on all tokens so far."""
    adapter = ord(seq.adapter_name[0]) if seq.adapter_name else 7
    return ord("a") + (sum(i * t for i, t in enumerate(seq.token_ids, 1)) + adapter) % 26


def spell(text: str) -> Callable[[Sequence], int]:
    """Answers every request with `text` and then the end-of-sequence token."""
    return lambda seq: (text[seq.num_output_tokens :] + chr(EOS)).encode("latin-1")[0]


class FakeDetokenizer:
    """Detokenizes each token to one character."""

    def add(self, token_id: int) -> str:
        return "" if token_id == EOS else chr(token_id)


class FakeTokenizer:
    """Tokenizes each character to one token, first those of the variables' names; 0 ends a sequence."""

    eos_token_ids = frozenset({EOS})
    special_tokens: Mapping[int, str] = {EOS: "<eos>"}
    max_token_bytes = 0
    definition: str | None = None

    def encode_chat(
        self, messages: list[dict[str, Any]], inputs: TemplateInputs = NO_INPUTS, tenant: str = ""
    ) -> list[int]:
        text = "".join([*map(str, inputs.variables), *(message["content"] for message in messages)])
        if text == "unsayable":
            raise InvalidRequest("the chat template refuses it", param="messages")
        return [ord(character) for character in text]

    def encode_text(self, text: str) -> list[int]:
        return self.encode_chat([{"content": text}])

    def grammar_of(self, request: GenerationRequest) -> str:
        return request.sampling.grammar

    def message_parser(self, request: GenerationRequest, index: int, prompt: object) -> None:
        return None

    def detokenizer(self) -> FakeDetokenizer:
        return FakeDetokenizer()

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

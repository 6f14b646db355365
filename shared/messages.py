"""Every message that crosses a process border, with its codec and nothing else.

JSON, decoded by field name: unknown fields are ignored, so the API and the workers can be upgraded in
either order. A worker leaves a request of a newer schema than its `SCHEMA_VERSION` in the queue.
"""

from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

SCHEMA_VERSION = 2
"""The newest schema of a request that this release reads."""
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_NUM_STOPS = 64
MAX_NUM_CHOICES = 128
MAX_NUM_PROMPTS = 2048

TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]
TextOrTokens = str | tuple[TokenId, ...]
"""One prompt that is no chat: text to be tokenized, or token ids as they are."""


# Decoded JSON has no reference cycles; without gc=False the collector would scan every message in vain.
class Message(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Base of all messages: immutable; fields at their default take no bytes."""

    def encode(self) -> bytes:
        """The message as UTF-8 JSON without line breaks."""
        return msgspec.json.encode(self)


class FinishReason(StrEnum):
    """The reason why a sequence ended. HTTP shows the first three; `ABORT` and `ERROR` stay inside."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"


class ForwardState(StrEnum):
    """The way in which a worker computes its forward pass."""

    EAGER = "eager"
    COMPILING = "compiling"
    """Eager, while the compiled forward pass is being built."""
    COMPILED = "compiled"


class RequestClass(StrEnum):
    """The kind of waiting client: a person who reads the stream, or a batch job that fills idle hours."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class SamplingParams(Message, frozen=True):
    """Parameters of sampling, and conditions for the end."""

    temperature: Annotated[float, Meta(ge=0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=INT64_MAX)] = 0
    """0 admits the whole vocabulary."""
    seed: Annotated[int, Meta(ge=0, le=INT64_MAX)] = 0
    """63 bits; the random number of a token is a function of seed, choice index and position."""
    max_tokens: Annotated[int, Meta(ge=1, le=INT64_MAX)] | None = None
    """None: up to the end of the context."""
    min_tokens: Annotated[int, Meta(ge=0, le=INT64_MAX)] = 0
    ignore_eos: bool = False
    stop: Annotated[tuple[str, ...], Meta(max_length=MAX_NUM_STOPS)] = ()
    logprobs: int | None = None
    """Number of alternatives to report per token; None reports no logprobs."""
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] = {}
    """Maps a token id to the number that is added to its logit."""
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    """Both penalties count the tokens of the output so far, as OpenAI defines them."""

    @property
    def adjusts_logits(self) -> bool:
        """True if logits are changed before a token is drawn, which workers of schema 1 can't do."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


def weights_version(base_version: str, adapter_version: str | None) -> str:
    """The weights version of a model: the base's version, and for an adapter also its own, in one string."""
    return base_version if adapter_version is None else f"{base_version}+{adapter_version}"


class GenerationRequest(Message, frozen=True):
    """One request on the queue, one job: `n` sequences for each of its prompts.

    The prompts are either one chat (`messages`) or `prompts`. Sequence j of prompt i has the index i * n + j.
    """

    request_id: str
    model: str
    """The `model` that the client wrote: the name of the base or of an adapter."""
    base: str
    sampling: SamplingParams
    messages: list[dict[str, Any]] = []
    prompts: Annotated[tuple[TextOrTokens, ...], Meta(max_length=MAX_NUM_PROMPTS)] = ()
    n: Annotated[int, Meta(ge=1, le=MAX_NUM_CHOICES)] = 1
    adapter_name: str | None = None
    adapter_version: str | None = None
    base_version: str | None = None
    """The base's version when the request was accepted; None from an API of an earlier release."""
    created: int = 0
    """Unix seconds, by the API's clock; shown to the client."""
    tenant: Annotated[str, Meta(max_length=128)] = ""
    """The client whose share of the queue this request uses: a digest or a name; empty if all share one."""
    request_class: RequestClass = RequestClass.INTERACTIVE
    priority: Annotated[int, Meta(ge=-INT32_MAX, le=INT32_MAX)] = 0
    """Order among the waiting requests of one tenant and class: lower runs earlier."""
    wait_limit_s: Annotated[float, Meta(gt=0)] | None = None
    """Seconds from its acceptance after which the request must not begin, by the clock of Redis."""
    generation_limit_s: float | None = None
    """Seconds from the claim after which the request is ended with an error."""
    detached: bool = False
    """True if the request runs on after its client has disconnected."""

    @property
    def num_prompts(self) -> int:
        """The number of prompts; a chat is one."""
        return len(self.prompts) or 1

    @property
    def num_sequences(self) -> int:
        """The number of sequences to generate."""
        return self.num_prompts * self.n

    @property
    def schema_version(self) -> int:
        """The oldest schema that can serve it: those of schema 1 know one plain sequence of a chat."""
        is_known_to_all = self.messages and not self.prompts and self.n == 1
        return 1 if is_known_to_all and not self.sampling.adjusts_logits else 2

    @property
    def weights_version(self) -> str:
        """The weights that the client was promised; empty if they are not known."""
        return weights_version(self.base_version, self.adapter_version) if self.base_version else ""


class Usage(Message, frozen=True, omit_defaults=False):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TokenLogprob(Message, frozen=True, omit_defaults=False):
    """One candidate for one position; `token_bytes` may be part of a character, `logprob` is finite."""

    token_id: int
    token_bytes: bytes
    logprob: float


class PositionLogprobs(Message, frozen=True):
    """The chosen token of one position and its most likely alternatives."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class ErrorInfo(Message, frozen=True):
    """An error on its way to the client; `code` is one of `shared.errors`."""

    code: str
    message: str
    param: str | None = None


class StreamEvent(Message, frozen=True):
    """One item of a request's token log.

    `event_no` counts from 0 over all choices of the request. An event with `usage` or `error` is the
    terminal one: nothing follows it.
    """

    event_no: int
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    """The text that these tokens completed; all texts so far are a prefix of decode(all ids so far)."""
    logprobs: tuple[PositionLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: ErrorInfo | None = None

    @property
    def is_terminal(self) -> bool:
        """True if this event ends its request."""
        return self.usage is not None or self.error is not None


class ModelCard(Message, frozen=True, omit_defaults=False):
    """The registry's entry of a base model or an adapter."""

    name: str
    base: str
    source: str
    """Folder or Hugging Face id, as configured."""
    version: str
    """SHA-256 (hex) that changes when the weights do."""
    created: int
    """Unix seconds."""
    max_model_len: int
    adapter_name: str | None = None
    """None for the base model itself."""
    base_version: str = ""
    """The base's version, for an adapter the one it was checked with; empty from an earlier release."""

    @property
    def weights_version(self) -> str:
        """The weights that answer a request for this model; empty if they are not known."""
        if self.adapter_name is None:
            return self.version
        return weights_version(self.base_version, self.version) if self.base_version else ""


decode_request = msgspec.json.Decoder(GenerationRequest).decode
decode_event = msgspec.json.Decoder(StreamEvent).decode
decode_card = msgspec.json.Decoder(ModelCard).decode

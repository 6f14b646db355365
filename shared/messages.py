"""The messages that processes send each other, and their JSON codec.

Decoders ignore unknown fields, so the API and the workers can be upgraded in either order. A worker does not
claim requests whose schema is newer than its own `SCHEMA_VERSION`.
"""

from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

SCHEMA_VERSION = 4
"""The newest request schema that this release can decode and serve."""
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_NUM_STOPS = 64
MAX_NUM_LOGPROBS = 20
"""Maximum number of alternatives for which logprobs are reported, as at OpenAI."""
MIN_LOGPROB = -9999.0
"""The log probability that stands for minus infinity, as at OpenAI, because JSON has no infinity."""
MAX_NUM_CHOICES = 128
MAX_NUM_PROMPTS = 2048
MAX_SALT_LENGTH = 512
TEMPLATE_HINTS = frozenset({"reasoning_effort"})
"""Template variables that a worker of an earlier release may leave out: most templates don't know them."""

TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]
TextOrTokens = str | tuple[TokenId, ...]
"""A prompt that is not a chat: text to be tokenized, or token ids to be used unchanged."""


# Decoded JSON has no reference cycles. Without gc=False, Python's garbage collector would scan every message.
class Message(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Base class of all messages. Messages are immutable; fields with their default value are not encoded."""

    def encode(self) -> bytes:
        """Returns the message as UTF-8 JSON without line breaks."""
        return msgspec.json.encode(self)


class FinishReason(StrEnum):
    """The reason why a sequence ended. Clients see only the first three; `ABORT` and `ERROR` are internal."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"


class ForwardState(StrEnum):
    """The mode in which a worker runs its forward pass: eager PyTorch or compiled."""

    EAGER = "eager"
    COMPILING = "compiling"
    """The worker runs eagerly while the forward pass is compiled in the background."""
    COMPILED = "compiled"


class RequestClass(StrEnum):
    """The kind of client: a person who reads the answer as it arrives, or a batch job that can wait."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class SamplingParams(Message, frozen=True):
    """Sampling parameters and stop conditions."""

    temperature: Annotated[float, Meta(ge=0)] = 1.0
    """0 means greedy decoding."""
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=INT64_MAX)] = 0
    """0 means no limit: all tokens of the vocabulary are candidates."""
    seed: Annotated[int, Meta(ge=0, le=INT64_MAX)] = 0
    """63 bits. The random number for a token depends only on seed, choice index and position."""
    max_tokens: Annotated[int, Meta(ge=1, le=INT64_MAX)] | None = None
    """None means as many as fit into the context."""
    min_tokens: Annotated[int, Meta(ge=0, le=INT64_MAX)] = 0
    ignore_eos: bool = False
    stop: Annotated[tuple[str, ...], Meta(max_length=MAX_NUM_STOPS)] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    """Tokens that end the output besides the model's own end tokens, also with `ignore_eos`."""
    includes_stop: bool = False
    """True if the text includes the stop string, or the text of the stop token, that ends it."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_NUM_LOGPROBS)] | None = None
    """Number of alternatives to report per token; None means that no logprobs are reported."""
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] = {}
    """Maps a token id to the number that is added to the token's logit."""
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    """Both penalties are OpenAI's: they count the tokens generated so far, not the prompt's tokens."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Tokens less likely than this part of the likeliest token's probability are not sampled."""
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    """Divides positive logits of tokens in prompt and output, and multiplies negative ones; 1 means none."""
    allowed_token_ids: tuple[TokenId, ...] = ()
    """The only tokens that may be sampled; empty if all may."""
    grammar: str = ""
    """The grammar that the output must follow, as llguidance serializes it; empty if there is none."""

    @property
    def adjusts_logits(self) -> bool:
        """True if a bias or a penalty changes the logits; workers that know only schema 1 apply neither."""
        adds = self.logit_bias or self.presence_penalty or self.frequency_penalty
        return bool(adds or self.repetition_penalty != 1 or self.allowed_token_ids)

    @property
    def needs_schema_4(self) -> bool:
        """True if earlier workers would ignore one of the parameters."""
        changes = self.grammar or self.min_p or self.repetition_penalty != 1 or self.allowed_token_ids
        return bool(changes or self.logprobs is not None or self.stop_token_ids or self.includes_stop)


class TemplateInputs(Message, frozen=True):
    """Inputs of the chat template besides the messages."""

    tools: list[dict[str, Any]] = []
    """Functions that the template describes to the model, in OpenAI's format."""
    variables: dict[str, str | int | float | bool | None] = {}
    """Variables of the template, by name; templates ignore names that they don't know."""
    continue_final_message: bool = False
    """True if the answer continues the last message, which is the assistant's, without a new header."""

    @property
    def are_known_to_all(self) -> bool:
        """True if a worker that ignores these inputs (schema 1 or 2) builds the right prompt all the same."""
        return not (self.tools or self.continue_final_message or self.variables.keys() - TEMPLATE_HINTS)


class ToolChoice(Message, frozen=True):
    """Which of the tools of a chat the model may call, or must call."""

    is_required: bool = False
    """True if the answer consists of one or more calls; false if the model decides."""
    names: tuple[str, ...] = ()
    """The tools that may be called; empty if all of them may be."""
    is_single: bool = False
    """True if an answer has at most one call."""
    is_legacy: bool = False
    """True if the client sent `functions`, and expects `function_call` in place of `tool_calls`."""


NO_INPUTS = TemplateInputs()
"""No inputs: the template gets only the messages."""


def weights_version(base_version: str, adapter_version: str | None) -> str:
    """Returns a base's weights version (`base_version`), or an adapter's (`base_version+adapter_version`)."""
    return base_version if adapter_version is None else f"{base_version}+{adapter_version}"


class GenerationRequest(Message, frozen=True):
    """The request that one job of the queue carries.

    A request has either one chat (`messages`) or `prompts`, and asks for `n` sequences per prompt. Sequence j
    of prompt i has the index i * n + j.
    """

    request_id: str
    model: str
    """The `model` field of the client's request: the name of the base or of an adapter."""
    base: str
    sampling: SamplingParams
    messages: list[dict[str, Any]] = []
    prompts: Annotated[tuple[TextOrTokens, ...], Meta(max_length=MAX_NUM_PROMPTS)] = ()
    n: Annotated[int, Meta(ge=1, le=MAX_NUM_CHOICES)] = 1
    adapter_name: str | None = None
    adapter_version: str | None = None
    base_version: str | None = None
    """The base's version when the request was accepted; None if an API of an earlier release sent it."""
    created: int = 0
    """Unix time in seconds by the API's clock; the client gets it as `created`."""
    tenant: Annotated[str, Meta(max_length=128)] = ""
    """The client whose fair share the request uses up: the name of its API key; empty without keys."""
    cache_salt: Annotated[str, Meta(max_length=MAX_SALT_LENGTH)] = ""
    """Only requests of the same tenant with an equal salt share prefixes in the KV cache; may be empty."""
    request_class: RequestClass = RequestClass.INTERACTIVE
    priority: Annotated[int, Meta(ge=-INT32_MAX, le=INT32_MAX)] = 0
    """Rank among the waiting requests of one tenant and class: lower numbers run earlier."""
    wait_limit_s: Annotated[float, Meta(gt=0)] | None = None
    """Maximum seconds in the queue, by the clock of Redis; after them, the request ends with an error."""
    generation_limit_s: float | None = None
    """Maximum seconds from the claim to the last token; after them, the request ends with an error."""
    detached: bool = False
    """True if the request continues when its client disconnects; the client can then resume the stream."""
    template_inputs: TemplateInputs = NO_INPUTS
    tool_choice: ToolChoice | None = None
    """None if the model must not call tools; the template may describe them all the same."""
    reads_reasoning: bool = False
    """True if the API reads `reasoning` in events; APIs of earlier releases expect it in the text."""
    echo: bool = False
    """True if the text of each choice begins with its prompt; only for `prompts`."""
    continuous_usage: bool = False
    """True if the first event must have `usage_so_far`; workers of an earlier release leave the field out."""

    def without_prompt(self) -> "GenerationRequest":
        """Returns a copy without prompt and grammar, which may be large.

        Readers of events need neither.
        """
        sampling = msgspec.structs.replace(self.sampling, grammar="")
        return msgspec.structs.replace(
            self, messages=[], prompts=(), template_inputs=NO_INPUTS, sampling=sampling
        )

    @property
    def num_prompts(self) -> int:
        """The number of prompts; a chat counts as one."""
        return len(self.prompts) or 1

    @property
    def num_sequences(self) -> int:
        """The total number of sequences to generate: `n` for each prompt."""
        return self.num_prompts * self.n

    @property
    def schema_version(self) -> int:
        """The lowest schema version that can express the request.

        Schema 1 can express only one chat with n = 1 and unchanged logits. Schema 2 can express all requests
        without `template_inputs` and `cache_salt`. A worker that knows only schema 2 would ignore a salt, and
        would share the request's prefix with all requests of the tenant. Schema 3 can express all requests
        without `echo`, `tool_choice` and the sampling parameters of `needs_schema_4`.
        """
        if self.echo or self.tool_choice or self.sampling.needs_schema_4:
            return 4
        if self.cache_salt or not self.template_inputs.are_known_to_all:
            return 3
        is_known_to_all = self.messages and not self.prompts and self.n == 1
        return 1 if is_known_to_all and not self.sampling.adjusts_logits else 2

    @property
    def weights_version(self) -> str:
        """The version of the weights that must answer this request; empty if any version may answer it."""
        return weights_version(self.base_version, self.adapter_version) if self.base_version else ""


class Usage(Message, frozen=True, omit_defaults=False):
    """Token counts of one request, for all of its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TokenLogprob(Message, frozen=True, omit_defaults=False):
    """A candidate token for a position. `token_bytes` may be part of a character; `logprob` is finite."""

    token_id: int
    token_bytes: bytes
    logprob: float


class PositionLogprobs(Message, frozen=True):
    """The chosen token at one position, and the most likely alternatives to it."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class ErrorInfo(Message, frozen=True):
    """An error in an event or an HTTP answer; `code` identifies a class in `shared.errors`."""

    code: str
    message: str
    param: str | None = None


class Timings(Message, frozen=True):
    """Durations (s) of a request's phases, in their order; None for phases that it did not reach."""

    queue_s: float
    """From the enqueue to the last claim, with earlier runs on workers that were lost or handed it back."""
    encode_s: float
    """From the claim until the prompts were encoded."""
    load_s: float | None = None
    """From the encoded prompts until a sequence ran: the wait for the adapter or for cache blocks."""
    prefill_s: float | None = None
    """From the sequence's start to the first new token."""
    decode_s: float | None = None
    """From the first new token to the end."""
    worker: str = ""
    """Name of the worker that ended the request."""


class ToolCallPart(Message, frozen=True):
    """A part of a tool call: its name with its id comes first, then the text of its arguments."""

    index: int
    """Number of the call within its message."""
    id: str = ""
    """Id of the call; empty in all parts of a call but the first."""
    name: str = ""
    arguments: str = ""
    """JSON text to be appended to the arguments of the call."""


class StreamEvent(Message, frozen=True):
    """One entry of a request's token log.

    `event_no` counts from 0 over all choices of the request. An event with `usage` or `error` is the terminal
    event, the last one of the log.
    """

    event_no: int
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    """The text that these tokens completed; incomplete characters are held back for a later event."""
    logprobs: tuple[PositionLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: ErrorInfo | None = None
    timings: Timings | None = None
    """Set in terminal events that a worker writes; workers of the previous release leave it out."""
    usage_so_far: Usage | None = None
    """Token counts at the first event, if the request has `continuous_usage`; later events add tokens."""
    reasoning: str = ""
    """Text of the model's reasoning, which is not part of `text`."""
    tool_calls: tuple[ToolCallPart, ...] = ()
    reasoning_tokens: int = 0
    """Number of completion tokens that belong to reasoning; only in the terminal event."""

    @property
    def is_terminal(self) -> bool:
        """True if this is the last event of its request."""
        return self.usage is not None or self.error is not None


decode_request = msgspec.json.Decoder(GenerationRequest).decode
decode_event = msgspec.json.Decoder(StreamEvent).decode

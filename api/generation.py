"""Functions for all routes that generate text: they build requests, and read headers about detaching."""

import re
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request

from api.contract.answer import Heading
from api.contract.generation_fields import GenerationFields
from api.relay.queue_client import QueueClient
from shared.errors import ContextLengthExceeded, InvalidRequest
from shared.messages import (
    NO_INPUTS,
    GenerationRequest,
    SamplingParams,
    TemplateInputs,
    TextOrTokens,
    ToolChoice,
)
from shared.model_cards import ModelCard
from shared.queue.api_streams import FoundRequest
from shared.settings import ApiSettings
from shared.text_size import num_ordinary_bytes

DETACH = "X-Lorelay-Detach"
LAST_EVENT_ID = "Last-Event-ID"
LOG_PAGE = 256
"""Number of events that `find_begun` reads at once."""


class Input(NamedTuple):
    """The text that a request continues: either a chat or prompts."""

    messages: Sequence[dict[str, Any]] = ()
    template_inputs: TemplateInputs = NO_INPUTS
    tool_choice: ToolChoice | None = None
    """Inputs of the chat template besides the messages."""
    prompts: tuple[TextOrTokens, ...] = ()
    echo: bool = False
    """True if each answer begins with its prompt."""


def new_request(
    id_prefix: str,
    card: ModelCard,
    settings: ApiSettings,
    body: GenerationFields,
    source: Input,
    *,
    tenant: str,
    detached: bool,
) -> GenerationRequest:
    """Returns a request for the model of `card`, with a new id and the time limits of the settings.

    Raises:
        ContextLengthExceeded: a prompt can't fit into the context; see `check_length`.
        InvalidRequest: prompts times `n` are more sequences than the settings allow.
    """
    sampling = body.to_sampling()
    check_length(card, source, sampling)
    request = GenerationRequest(
        request_id=f"{id_prefix}-{uuid.uuid4().hex}",
        model=card.name,
        base=card.base,
        messages=list(source.messages),
        template_inputs=source.template_inputs,
        tool_choice=source.tool_choice,
        reads_reasoning=bool(source.messages),
        prompts=source.prompts,
        echo=source.echo,
        n=body.num_choices,
        continuous_usage=body.continuous_usage,
        sampling=sampling,
        adapter_name=card.adapter_name,
        adapter_version=card.version if card.adapter_name is not None else None,
        base_version=(card.version if card.adapter_name is None else card.base_version) or None,
        created=int(time.time()),
        tenant=tenant,
        cache_salt=body.cache_salt or "",
        wait_limit_s=settings.queue_time_limit_s,
        generation_limit_s=settings.generation_limit_s,
        detached=detached,
    )
    check_num_sequences(request, settings)
    return request


def check_num_sequences(request: GenerationRequest, settings: ApiSettings) -> None:
    """Refuses a request that would keep a batch busy for too long, or fill Redis with log probabilities.

    Raises:
        InvalidRequest: prompts times `n` are more sequences than the settings allow, or all of them together
            have more log probabilities at each position.
    """
    limit = settings.max_sequences_per_request
    if request.num_sequences > limit:
        param = "n" if request.n > 1 else "prompt"
        raise InvalidRequest(
            f"Invalid value for '{param}': at most {limit} answers to all prompts together are allowed here, "
            f"not {request.num_sequences}.",
            param=param,
        )
    alternatives = request.sampling.logprobs
    if alternatives is not None and request.num_sequences * (alternatives + 1) > limit:
        param = "logprobs" if request.prompts else "top_logprobs"
        raise InvalidRequest(
            f"Invalid value for '{param}': at most {limit} log probabilities at each position of all "
            f"answers together are allowed here, not {request.num_sequences * (alternatives + 1)}.",
            param=param,
        )


class _Named(msgspec.Struct):
    """The only field of a refused body that the log line needs."""

    model: str | None = None


def model_in(raw: bytes) -> str | None:
    """Returns the model that a refused body names, for the log; None if it can't be read."""
    try:
        return msgspec.json.decode(raw, type=_Named).model
    except (msgspec.DecodeError, RecursionError):
        return None


def check_length(card: ModelCard, source: Input, sampling: SamplingParams) -> None:
    """Refuses a chat or prompt that is too long for the context with any possible tokenization.

    Of a chat, only the text of user messages counts, without spaces at its ends: a chat template may drop the
    rest.

    Raises:
        ContextLengthExceeded: the chat or a prompt is too long for any tokenization.
    """
    if source.messages:
        size = sum(_user_bytes(message) for message in source.messages if message.get("role") == "user")
        _check_bytes(card, size, "messages", sampling)
    for prompt in source.prompts:
        if isinstance(prompt, str):
            _check_bytes(card, num_ordinary_bytes(prompt.strip()), "prompt", sampling)
        else:
            _check_tokens(card, len(prompt), f"{len(prompt)} tokens were given in the prompt", sampling)


def _check_bytes(card: ModelCard, size: int, place: str, sampling: SamplingParams) -> None:
    if card.max_token_bytes:
        num_tokens = -(-size // card.max_token_bytes)
        given = f"{size} bytes of text, which are {num_tokens} tokens or more, were given in the {place}"
        _check_tokens(card, num_tokens, given, sampling)


def _check_tokens(card: ModelCard, num_tokens: int, given: str, sampling: SamplingParams) -> None:
    asked = sampling.max_tokens or sampling.min_tokens
    if num_tokens + (asked or 1) > card.max_model_len:
        completion = f" and {asked} tokens for the completion" if asked else ""
        raise ContextLengthExceeded(
            f"This model's maximum context length is {card.max_model_len} tokens, but {given}{completion}."
        )


def _user_bytes(message: dict[str, Any]) -> int:
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
    return sum(num_ordinary_bytes(text.strip()) for text in texts if isinstance(text, str))


def heading_of(request: GenerationRequest) -> Heading:
    """Returns the fields that are the same in all chunks of an answer."""
    return Heading(request.request_id, request.created, request.model)


def wants_detach(request: Request) -> bool:
    """True if the header `DETACH` asks for a request that continues without its client.

    Raises:
        InvalidRequest: the header is neither `true` nor `false`.
    """
    value = request.headers.get(DETACH, "false").lower()
    if value not in ("true", "false"):
        raise InvalidRequest(f"The header {DETACH} is 'true' or 'false', not {value!r}.", param=DETACH)
    return value == "true"


def resume_position(request: Request, request_id: str) -> int:
    """Returns the number of the first event to send: the one after `LAST_EVENT_ID`, or 0 without the header.

    Raises:
        InvalidRequest: the header is not the id of an event of this request.
    """
    last = request.headers.get(LAST_EVENT_ID)
    if last is None:
        return 0
    of_request, _, event_no = last.rpartition(":")
    if of_request != request_id or not re.fullmatch("[0-9]{1,9}", event_no):
        raise InvalidRequest(
            f"The header {LAST_EVENT_ID} is '{request_id}:' and a number, not {last!r}.", param=LAST_EVENT_ID
        )
    return int(event_no) + 1


def check_resumable(found: FoundRequest, first_event_no: int) -> None:
    """Checks that a request's stream can be resumed at an event.

    Raises:
        InvalidRequest: the request is not detached, or the event is still to come.
    """
    if not found.request.detached:
        raise InvalidRequest(f"The request was sent without {DETACH}: true, so it can't be resumed.")
    if first_event_no > found.num_events:
        raise InvalidRequest(
            f"The header {LAST_EVENT_ID} names an event that is still to come.", param=LAST_EVENT_ID
        )


async def find_begun(queue: QueueClient, request: GenerationRequest, first_event_no: int) -> set[int]:
    """Returns the choices with an event before `first_event_no`, whose role the client has already.

    Raises:
        QueueUnavailable: Redis can't be read.
    """
    if request.num_sequences == 1:
        return {0} if first_event_no else set()
    begun: set[int] = set()
    position = 0
    while position < first_event_no and len(begun) < request.num_sequences:
        # Choices run side by side, so the first page usually has them all.
        page = min(LOG_PAGE, first_event_no - position)
        (events,) = await queue.read_logs([(request.request_id, position)], page)
        if not events:
            break
        begun.update(event.index for event in events)
        position += len(events)
    return begun

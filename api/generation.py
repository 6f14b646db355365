"""Functions for all routes that generate text: they build requests, and read headers about detaching."""

import re
import time
import uuid
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request

from api.relay.queue_client import QueueClient
from shared.errors import ContextLengthExceeded, InvalidRequest
from shared.messages import GenerationRequest, ModelCard, SamplingParams, TemplateInputs
from shared.queue.api_streams import FoundRequest
from shared.settings import ApiSettings
from shared.text_size import num_ordinary_bytes

DETACH = "X-Lorelay-Detach"
LAST_EVENT_ID = "Last-Event-ID"
LOG_PAGE = 256
"""Number of events that `find_begun` reads at once."""


class Chat(NamedTuple):
    """The parts of a request that the chat template gets."""

    messages: list[dict[str, Any]]
    inputs: TemplateInputs


def new_request(
    id_prefix: str,
    card: ModelCard,
    settings: ApiSettings,
    *,
    sampling: SamplingParams,
    chat: Chat,
    tenant: str,
    cache_salt: str | None,
    detached: bool,
) -> GenerationRequest:
    """Returns a request for the model of `card`, with a new id and the time limits of the settings.

    Raises:
        ContextLengthExceeded: the chat can't fit into the context; see `check_length`.
    """
    check_length(card, chat, sampling)
    return GenerationRequest(
        request_id=f"{id_prefix}-{uuid.uuid4().hex}",
        model=card.name,
        base=card.base,
        messages=chat.messages,
        template_inputs=chat.inputs,
        sampling=sampling,
        adapter_name=card.adapter_name,
        adapter_version=card.version if card.adapter_name is not None else None,
        base_version=(card.version if card.adapter_name is None else card.base_version) or None,
        created=int(time.time()),
        tenant=tenant,
        cache_salt=cache_salt or "",
        wait_limit_s=settings.queue_time_limit_s,
        generation_limit_s=settings.generation_limit_s,
        detached=detached,
    )


def check_num_sequences(request: GenerationRequest, settings: ApiSettings) -> None:
    """Refuses a request that would keep a batch busy for too long.

    Raises:
        InvalidRequest: prompts times `n` are more sequences than the settings allow.
    """
    limit = settings.max_sequences_per_request
    if request.num_sequences > limit:
        raise InvalidRequest(
            f"Invalid value for 'n': at most {limit} answers to all prompts together are allowed here, "
            f"not {request.num_sequences}.",
            param="n",
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


def check_length(card: ModelCard, chat: Chat, sampling: SamplingParams) -> None:
    """Refuses a chat that is too long for the context with any possible tokenization.

    Only the text of user messages counts, without spaces at its ends: a chat template may drop the rest.

    Raises:
        ContextLengthExceeded: the chat is too long for any tokenization.
    """
    if not card.max_token_bytes:
        return
    size = sum(_user_bytes(message) for message in chat.messages if message.get("role") == "user")
    num_tokens = -(-size // card.max_token_bytes)
    asked = sampling.max_tokens or sampling.min_tokens
    if num_tokens + (asked or 1) > card.max_model_len:
        completion = f" and {asked} tokens for the completion" if asked else ""
        raise ContextLengthExceeded(
            f"This model's maximum context length is {card.max_model_len} tokens, but {size} bytes of text, "
            f"which are {num_tokens} tokens or more, were given in the messages{completion}."
        )


def _user_bytes(message: dict[str, Any]) -> int:
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
    return sum(num_ordinary_bytes(text.strip()) for text in texts if isinstance(text, str))


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
    """Returns the choices with an event before `first_event_no`: their clients have got the role already.

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

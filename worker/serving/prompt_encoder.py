"""Applies chat template and tokenizer outside the engine's thread, since a long prompt takes seconds."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

from shared.errors import GenerationFailed, LorelayError
from shared.logs import fields
from shared.messages import GenerationRequest
from shared.queue.records import Claim, Held
from worker.engine.records import Prompts
from worker.serving.commands import Arrival, Commands, Inbox

logger = logging.getLogger(__name__)

Encode = Callable[[GenerationRequest], list[list[int]]]
"""Type of `Engine.encode`: returns the token ids of each prompt of a request."""


class Encoding(NamedTuple):
    """A request that is being encoded, and the time (s) that this has taken so far."""

    held: Held
    model: str
    age_s: float


LONG_PROMPT_CHARS = 32_768
TEXT_FIELDS = ("content", "reasoning_content", "tool_calls")
"""Fields of a message that can be long."""


class PromptEncoder:
    """Encodes short and long prompts in two threads, so that short prompts don't wait for long ones."""

    def __init__(
        self,
        encode: Encode,
        inbox: Inbox,
        held: Container[Held],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`inbox`: receives each claim with its encoded prompts.

        `held`: claims that are not in this container are skipped.
        """
        self._encode = encode
        self._inbox = inbox
        self._held = held
        self._clock = clock
        self._is_stopped = False
        self._begun: dict[int, tuple[float, Claim]] = {}
        """The claim that each thread is encoding, and the time at which it began, by the thread's id."""
        self._num_long_taken = self._num_long_done = 0
        self._short: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()

    @property
    def num_long(self) -> int:
        """Number of long prompts that are not encoded yet."""
        return self._num_long_taken - self._num_long_done

    def take(self, claims: Iterable[Claim]) -> None:
        """Queues claims to be encoded. Claims may reach the inbox in another order."""
        for claim in claims:
            is_long = _num_chars(claim.request) > LONG_PROMPT_CHARS
            self._num_long_taken += is_long
            (self._long if is_long else self._short).put(claim)

    def run_short(self) -> None:
        """Encodes short prompts until `stop`."""
        self._run(self._short)

    def run_long(self) -> None:
        """Encodes long prompts until `stop`."""
        self._run(self._long)

    def longest(self) -> Encoding | None:
        """Returns the request that has been encoded longest at present, or None. Callable from any thread."""
        begun = list(self._begun.copy().values())
        if not begun:
            return None
        begun_at_s, claim = min(begun, key=lambda entry: entry[0])
        return Encoding(claim.held, claim.request.model, self._clock() - begun_at_s)

    def stop(self) -> None:
        """Tells both threads to end after the request that each is encoding."""
        self._is_stopped = True
        self._short.put(None)
        self._long.put(None)

    def _run(self, lane: queue.SimpleQueue[Claim | None]) -> None:
        while (claim := lane.get()) is not None and not self._is_stopped:
            if claim.held in self._held:
                prompts = self._encode_all(claim)
                encode_s = time.monotonic() - claim.claimed_at_s
                self._inbox.put(Commands(add=[Arrival(claim, prompts, encode_s)]))
            self._num_long_done += lane is self._long

    def _encode_all(self, claim: Claim) -> Prompts:
        self._begun[threading.get_ident()] = self._clock(), claim
        try:
            return self._encode(claim.request)
        except LorelayError as error:
            return error
        # The error concerns only the request that is encoded here. If raised, it would end the worker.
        except Exception:
            request_id = claim.held.request_id
            logger.exception(
                "request %s can't be encoded", request_id, extra=fields("encode", request_id=request_id)
            )
            return GenerationFailed()
        finally:
            del self._begun[threading.get_ident()]


def _num_chars(request: GenerationRequest) -> int:
    parts = [message.get(name) for message in request.messages for name in TEXT_FIELDS]
    chat = sum(len(str(part)) for part in [*parts, *request.template_inputs.tools] if part)
    texts = sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str))
    return chat + texts + len(request.sampling.grammar)

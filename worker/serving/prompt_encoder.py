"""Encodes prompts beside the engine's thread, because a long prompt takes seconds."""

import queue
from collections.abc import Callable, Container, Iterable

from shared.errors import LorelayError
from shared.messages import GenerationRequest
from shared.queue.records import Claim, Held
from worker.engine.records import Prompts
from worker.serving.commands import Arrival, Commands, Inbox

Encode = Callable[[GenerationRequest], list[list[int]]]
"""`Engine.encode`."""

LONG_PROMPT_CHARS = 32_768


class PromptEncoder:
    """Two queues of prompts, each for a thread of its own, so that short prompts don't wait for long ones."""

    def __init__(self, encode: Encode, inbox: Inbox, held: Container[Held]) -> None:
        """`inbox` gets each claim with its prompts; claims that are not `held` any more are skipped."""
        self._encode = encode
        self._inbox = inbox
        self._held = held
        self._is_stopped = False
        self._short: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()

    def take(self, claims: Iterable[Claim]) -> None:
        """Queues claims. They arrive in the engine's inbox later, not always in this order."""
        for claim in claims:
            lane = self._long if _num_chars(claim.request) > LONG_PROMPT_CHARS else self._short
            lane.put(claim)

    def run_short(self) -> None:
        """Encodes short prompts until `stop`."""
        self._run(self._short)

    def run_long(self) -> None:
        """Encodes long prompts until `stop`."""
        self._run(self._long)

    def stop(self) -> None:
        """Ends both threads after the prompts that they encode now."""
        self._is_stopped = True
        self._short.put(None)
        self._long.put(None)

    def _run(self, lane: queue.SimpleQueue[Claim | None]) -> None:
        while (claim := lane.get()) is not None and not self._is_stopped:
            if claim.held in self._held:
                self._inbox.put(Commands(add=[Arrival(claim, self._encode_all(claim.request))]))

    def _encode_all(self, request: GenerationRequest) -> Prompts:
        try:
            return self._encode(request)
        except LorelayError as error:
            return error


def _num_chars(request: GenerationRequest) -> int:
    chat = sum(len(str(message.get("content") or "")) for message in request.messages)
    return chat + sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str))

"""Prompts to tokens beside the engine's thread: a long one takes seconds, in which all others go on."""

import queue
from collections.abc import Callable, Iterable
from typing import Any

from shared.errors import LorelayError
from shared.messages import GenerationRequest
from shared.queue.records import Claim
from worker.engine.records import Prompt

Encode = Callable[[list[dict[str, Any]]], list[int]]
Deliver = Callable[[Claim, Prompt], None]

LONG_PROMPT_CHARS = 32_768


class PromptEncoder:
    """Two lanes, each for a thread of its own, so that short prompts don't wait for long ones."""

    def __init__(
        self, encode: Encode, deliver: Deliver, is_wanted: Callable[[Claim], bool] = lambda claim: True
    ) -> None:
        """`deliver` gets each claim with its prompt.

        Claims that are not wanted any more when their turn comes are skipped.
        """
        self._encode = encode
        self._deliver = deliver
        self._is_wanted = is_wanted
        self._is_stopped = False
        self._short: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()

    def take(self, claims: Iterable[Claim]) -> None:
        """Queues claims; each is delivered from a lane's thread, not always in this order."""
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
        """Ends both lanes after what they encode now."""
        self._is_stopped = True
        self._short.put(None)
        self._long.put(None)

    def _run(self, lane: queue.SimpleQueue[Claim | None]) -> None:
        while (claim := lane.get()) is not None and not self._is_stopped:
            if not self._is_wanted(claim):
                continue
            self._deliver(claim, self._encode_one(claim.request))

    def _encode_one(self, request: GenerationRequest) -> Prompt:
        try:
            return self._encode(request.messages)
        except LorelayError as error:
            return error


def _num_chars(request: GenerationRequest) -> int:
    return sum(len(str(message.get("content") or "")) for message in request.messages)

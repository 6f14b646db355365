"""Remembers for a moment which models have a live worker, so that many requests cause few calls of Redis."""

import asyncio
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from shared.errors import QueueUnavailable
from shared.messages import GenerationRequest

MAX_NUM_KNOWN = 1000
"""Number of models after which all answers are forgotten, so that the memory for them is bounded."""

Model = tuple[str, str | None, str]
"""Base, adapter and weights version."""


class LiveWorkers:
    """Answers whether a live worker serves the model of a waiting request."""

    def __init__(self, ask: Callable[[GenerationRequest], Awaitable[bool]], max_age_s: float) -> None:
        """`ask` asks Redis. Each answer, or `QueueUnavailable`, is reused for `max_age_s`."""
        self._ask = ask
        self._max_age_s = max_age_s
        self._locks: WeakValueDictionary[Model, asyncio.Lock] = WeakValueDictionary()
        """Lets one request at a time ask for each model; a lock is gone once no request waits for it."""
        self._known: dict[Model, tuple[float, bool | QueueUnavailable]] = {}

    async def serve(self, request: GenerationRequest) -> bool:
        """Returns True if a live worker serves the weights that the request names.

        Raises:
            QueueUnavailable: Redis did not answer.
        """
        model = (request.base, request.adapter_name, request.weights_version)
        async with self._locks.setdefault(model, asyncio.Lock()):
            asked_at, answer = self._known.get(model, (float("-inf"), False))
            if asyncio.get_running_loop().time() - asked_at > self._max_age_s:
                answer = await self._fetch(request)
                if len(self._known) >= MAX_NUM_KNOWN:
                    self._known.clear()
                self._known[model] = (asyncio.get_running_loop().time(), answer)
        if isinstance(answer, QueueUnavailable):
            raise QueueUnavailable from answer
        return answer

    async def _fetch(self, request: GenerationRequest) -> bool | QueueUnavailable:
        try:
            return await self._ask(request)
        except QueueUnavailable as error:
            return error

"""Ends the worker's process if a step, or the encoding of a prompt, never ends."""

import logging
import os
from collections.abc import Callable

import redis

from shared.queue.records import Held
from shared.queue.refusals import explain
from worker.serving.prompt_encoder import Encoding

logger = logging.getLogger("rq.worker")

HUNG_EXIT_CODE = 70


class HangWatch:
    """Ends the process without clean-up if a part of it hangs: other workers then take over its requests.

    A thread that encodes can't be stopped, so a chat template that never ends would block other prompts.
    """

    def __init__(
        self,
        worker_name: str,
        limit_s: float,
        *,
        step_age_s: Callable[[], float],
        longest_encode: Callable[[], Encoding | None],
        blame: Callable[[Held], object],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """`blame`: records in Redis that only this request is suspected of having crashed the worker."""
        self._worker_name = worker_name
        self._limit_s = limit_s
        self._step_age_s = step_age_s
        self._longest_encode = longest_encode
        self._blame = blame
        self._end = end

    def check(self) -> None:
        """Ends the process if a step or the encoding of a request has taken too long. Called periodically."""
        if self._step_age_s() > self._limit_s:
            self._log(f"a step has taken over {self._limit_s:g} s")
            self._end(HUNG_EXIT_CODE)
            return
        encoding = self._longest_encode()
        if encoding is not None and encoding.age_s > self._limit_s:
            self._log(
                f"the chat template or tokenizer of {encoding.model} has taken over {self._limit_s:g} s to "
                f"encode request {encoding.held.request_id}"
            )
            self._blame_only(encoding.held)
            self._end(HUNG_EXIT_CODE)

    def _blame_only(self, held: Held) -> None:
        """Counts the crash against one request, so that the worker's other requests don't become suspects."""
        try:
            self._blame(held)
        except redis.RedisError as error:
            logger.warning("Worker %s: no request was blamed: %s", self._worker_name, explain(error))

    def _log(self, hung: str) -> None:
        logger.critical("Worker %s: %s, ending", self._worker_name, hung)

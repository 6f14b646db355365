"""Steps and encodings that never end."""

import logging

import pytest
import redis

from shared.queue.records import Held
from worker.serving.hang_watch import HUNG_EXIT_CODE, HangWatch
from worker.serving.prompt_encoder import Encoding

HELD = Held("chatcmpl-1", "claim")


class Bench:
    """A watch with a limit of 60 s, and what it did, in order."""

    def __init__(self, step_age_s: float = 0, encode_age_s: float | None = None, *, can_blame: bool = True):
        self.done: list[object] = []
        self._can_blame = can_blame
        encoding = None if encode_age_s is None else Encoding(HELD, "tiny", encode_age_s)
        HangWatch(
            "w1",
            60,
            step_age_s=lambda: step_age_s,
            longest_encode=lambda: encoding,
            blame=self._blame,
            end=self.done.append,
        ).check()

    def _blame(self, held: Held) -> None:
        if not self._can_blame:
            raise redis.ConnectionError
        self.done.append(held)


def test_nothing_ends_at_the_limit() -> None:
    assert Bench(60, 60).done == []
    assert Bench(60).done == []


def test_a_step_that_hangs_ends_the_worker_and_blames_nobody(caplog: pytest.LogCaptureFixture) -> None:
    assert Bench(61, 61).done == [HUNG_EXIT_CODE]
    assert "a step has taken over 60 s" in caplog.text


def test_a_request_whose_encoding_hangs_is_named_and_blamed_before_the_worker_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert Bench(1, 61).done == [HELD, HUNG_EXIT_CODE]
    assert "the chat template or tokenizer of tiny" in caplog.text
    assert HELD.request_id in caplog.text


def test_a_worker_that_hangs_ends_even_if_redis_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="rq.worker")
    assert Bench(1, 61, can_blame=False).done == [HUNG_EXIT_CODE]
    assert "no request was blamed" in caplog.text

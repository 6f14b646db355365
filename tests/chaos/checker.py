"""Compares clients' answers with those of a run without faults, and finds keys left over in Redis.

C1: every stream has one end. C2: its text and tokens are those of the run without faults. C3: event numbers
have no gap and no repetition. C4: every key of a request expires. C5: nothing waits, runs or is owned.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import redis
from rq.defaults import RQ_KEY_PREFIX

from shared.queue import keys
from shared.queue.names import slug
from tests.chaos.recorder import Answer, Ask
from tests.waiting import wait_until

QUIET_LIMIT_S = 10
CANCELED_TTL_S = 60
"""Life of an aborted request's job in RQ."""


class Expected(NamedTuple):
    """The answer of a request without faults."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


class Reference:
    """The fault-free answers; each request runs once for them, in `prepare`."""

    def __init__(self, run: Callable[[Sequence[Ask]], list[Answer]]) -> None:
        self._run = run
        self._known: dict[Ask, Expected] = {}

    def prepare(self, asks: Iterable[Ask]) -> None:
        """Runs the requests whose answers are not known yet; call it while nothing else runs."""
        if not (unknown := list(dict.fromkeys(ask for ask in asks if ask not in self._known))):
            return
        for answer in self._run(unknown):
            assert answer.is_complete, f"the fault-free run failed: {answer}"
            assert answer.log is not None
            assert not (faults := find_log_faults(answer)), faults
            self._known[answer.ask] = Expected(answer.text, _token_ids(answer), answer.finish_reasons[0])

    def of(self, ask: Ask) -> Expected:
        """The fault-free answer of a request that was prepared."""
        return self._known[ask]


def find_faults(answer: Answer, expected: Expected) -> list[str]:
    """Mistakes in the answer of a request that should have completed (C1, C2)."""
    faults = []
    if not answer.is_complete:
        faults.append(f"status {answer.status}, errors {answer.errors}, {answer.failure or 'not broken'}")
    if answer.num_ends != 1:
        faults.append(f"{answer.num_ends} ends")
    if answer.ask.stream and answer.status == 200 and answer.num_done != 1:
        faults.append(f"{answer.num_done} times [DONE]")
    if answer.is_complete and answer.finish_reasons != [expected.finish_reason]:
        faults.append(f"ended with {answer.finish_reasons} instead of {expected.finish_reason}")
    if answer.is_complete and answer.text != expected.text:
        faults.append(f"text {answer.text!r} instead of {expected.text!r}")
    if answer.is_complete and answer.log is None:
        faults.append("no log")
    elif answer.is_complete:
        faults += find_log_faults(answer)
        if _token_ids(answer) != expected.token_ids:
            faults.append(f"token ids {_token_ids(answer)} instead of {expected.token_ids}")
    return faults


def find_partial_faults(answer: Answer, expected: Expected) -> list[str]:
    """Mistakes in an answer that may have ended early: it needs one end, and a right beginning before it."""
    if answer.is_complete:
        return find_faults(answer, expected)
    faults = [] if answer.num_ends == 1 else [f"{answer.num_ends} ends, {answer.failure}"]
    if not expected.text.startswith(answer.text):
        faults.append(f"text {answer.text!r} is no beginning of {expected.text!r}")
    return faults


def find_log_faults(answer: Answer) -> list[str]:
    """Mistakes in a token log that has ended: numbers, ends, text (C2, C3)."""
    log = answer.log or []
    faults = []
    if [event.event_no for event in log] != list(range(len(log))):
        faults.append(f"event numbers {[event.event_no for event in log]}")
    if [event.is_terminal for event in log] != [False] * (len(log) - 1) + [True]:
        faults.append(f"terminal events at {[i for i, event in enumerate(log) if event.is_terminal]}")
    if (text := "".join(event.text for event in log)) != answer.text:
        faults.append(f"the client has {answer.text!r}, the log {text!r}")
    return faults


def check_complete(answers: Iterable[Answer], reference: Reference) -> None:
    """Checks C1 and C2 for requests that must all have completed."""
    _report(answers, reference, find_faults)


def check_partial(answers: Iterable[Answer], reference: Reference) -> None:
    """Checks C1, and C2 for completed requests; the others must have one error after a right beginning."""
    _report(answers, reference, find_partial_faults)


def check_quiet(connection: redis.Redis, base: str) -> None:
    """Checks C5: soon nothing waits, runs, or is owned by anybody."""
    try:
        wait_until(lambda: not find_remains(connection, base), QUIET_LIMIT_S)
    except AssertionError:
        raise AssertionError(f"left after {QUIET_LIMIT_S} s: {find_remains(connection, base)}") from None


def find_remains(connection: redis.Redis, base: str) -> list[str]:
    """Queues, leases, owners and executions that are not empty."""
    patterns = (
        keys.waiting(slug(base)),
        keys.order("*"),
        keys.leases(slug(base)),
        keys.owner("*"),
        f"{RQ_KEY_PREFIX}:queue:*",
        f"{RQ_KEY_PREFIX}:execution:*",
        f"{RQ_KEY_PREFIX}:executions:*",
        f"{RQ_KEY_PREFIX}:worker:*:executions",
        f"{RQ_KEY_PREFIX}:wip:*",
    )
    return [key.decode() for pattern in patterns for key in connection.scan_iter(pattern, count=1000)]


def request_keys(connection: redis.Redis) -> dict[str, float]:
    """Every key that names a request, and the seconds until it expires (-1: never), for C4."""
    names = list(connection.scan_iter("*chatcmpl*", count=1000))
    return {name.decode(): life for name in names if (life := connection.pttl(name) / 1000) != -0.002}


def lasting_keys(connection: redis.Redis) -> list[str]:
    """The keys that name a request, without the jobs of aborted ones, for which `check_expiry` is enough."""
    return [name for name in request_keys(connection) if not _is_canceled_job(connection, name)]


def check_expiry(connection: redis.Redis, max_ttl_s: float) -> None:
    """Checks C4 without waiting: every key that names a request expires within its time."""

    def limit_s(name: str) -> float:
        return CANCELED_TTL_S if _is_canceled_job(connection, name) else max_ttl_s

    late = {name: life for name, life in request_keys(connection).items() if not 0 <= life <= limit_s(name)}
    assert not late, f"keys that stay longer than {max_ttl_s} s: {late}"


def _is_canceled_job(connection: redis.Redis, name: str) -> bool:
    return name.startswith(f"{RQ_KEY_PREFIX}:job:") and connection.hget(name, "status") == b"canceled"


def _report(
    answers: Iterable[Answer], reference: Reference, find: Callable[[Answer, Expected], list[str]]
) -> None:
    answers = list(answers)
    faults = {i: find(answer, reference.of(answer.ask)) for i, answer in enumerate(answers)}
    lines = [f"{i} ({answers[i].request_id}): {'; '.join(found)}" for i, found in faults.items() if found]
    assert not lines, f"{len(lines)} of {len(answers)} went wrong:\n" + "\n".join(lines)


def _token_ids(answer: Answer) -> tuple[int, ...]:
    return tuple(token_id for event in answer.log or () for token_id in event.token_ids)

"""Commands that the other threads put into the engine loop's inbox."""

import queue
from collections.abc import Sequence
from typing import NamedTuple

from shared.queue.records import Claim
from worker.engine.records import Prompts


class Arrival(NamedTuple):
    """A claimed request on its way to the engine."""

    claim: Claim
    prompts: Prompts


class Commands(NamedTuple):
    """Work for the engine loop before its next step."""

    add: Sequence[Arrival] = ()
    abort: Sequence[str] = ()
    stop: Sequence[str] = ()
    drop: Sequence[str] = ()
    run_alone: bool = False
    """True if Redis knows by now that the isolated request runs alone."""
    allow_company: bool = False
    """True if the isolated request is cleared."""


Inbox = queue.SimpleQueue[Commands]

"""Commands from other threads to the engine loop."""

import queue
from collections.abc import Sequence
from typing import NamedTuple

from shared.queue.records import Claim
from worker.engine.records import Prompts


class Arrival(NamedTuple):
    """A claimed request with its encoded prompts, for the engine."""

    claim: Claim
    prompts: Prompts
    encode_s: float = 0
    """Seconds from the claim until the prompts were encoded."""


class Commands(NamedTuple):
    """Commands that the engine loop carries out before its next step."""

    add: Sequence[Arrival] = ()
    abort: Sequence[str] = ()
    """Ids of requests that their clients aborted, or whose clients disconnected."""
    stop: Sequence[str] = ()
    """Ids of requests that an operator stopped."""
    drop: Sequence[str] = ()
    """Ids of requests that this worker does not own any more; they end without an event."""
    run_isolated: bool = False
    """True if Redis has recorded that the isolated request runs alone, so that its steps may begin."""
    end_isolation: bool = False
    """True if the isolated request ran enough steps without a crash, so that others may run again, too."""


Inbox = queue.SimpleQueue[Commands]

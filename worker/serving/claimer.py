"""Claims requests for a worker: reads waiting requests, chooses some by the order rule, and claims these."""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from uuid import uuid4

from shared.queue.names import queue_name
from shared.queue.order import Pick, Running, WaitingOrder
from shared.queue.places import place_of
from shared.queue.records import Claim
from shared.queue.slot_plan import AdapterSlots
from shared.queue.worker_streams import WorkerStreams

MAX_NUM_NAMED = 64
"""A worker that serves at most this number of queues passes all their names to `look`."""
MAX_NUM_QUEUES = 32
NUM_SPARE = 4
"""Number of queues that are read in addition to one queue per sequence that the worker could still hold."""


class _Attempt(NamedTuple):
    """A claim that was sent, but whose reply has not arrived."""

    claim_ids: list[str]
    picks: list[Pick]
    num_long: int
    """Maximum number of long requests among them."""


class Claimer:
    """Claims requests for the I/O thread. If a reply is lost, the same claim is sent again."""

    def __init__(
        self,
        streams: WorkerStreams,
        order: WaitingOrder,
        *,
        slots: Callable[[], AdapterSlots],
        names_if_few: Callable[[int], Sequence[str]],
    ) -> None:
        """`slots` returns the current adapter slots; `names_if_few` is `ServedQueues.names_if_few`."""
        self._streams = streams
        self._order = order
        self._slots = slots
        self._names_if_few = names_if_few
        self._attempt: _Attempt | None = None
        self.lost_race = False
        """True if the last claim found nothing, but more requests may wait: other workers took all that it
        chose, or its look ended early."""

    @property
    def awaits_reply(self) -> bool:
        """True if a claim was sent and its reply was lost; Redis may have executed the claim."""
        return self._attempt is not None

    def claim(self, running: Running) -> list[Claim]:
        """Claims requests until the worker's free capacity is used, or no suitable request waits."""
        self._attempt = self._attempt or self._choose(running)
        claims = self._streams.claim(*self._attempt) if self._attempt.picks else []
        self.lost_race = not claims and (bool(self._attempt.picks) or self._streams.is_look_cut)
        self._attempt = None
        for claim in claims:
            request = claim.request
            self._order.charge(queue_name(request.base, request.adapter_name), place_of(request))
        return claims

    def nothing_waits(self) -> None:
        """Reopens closed adapters, because no request of the base waits."""
        self._order.forget_closed()

    def _choose(self, running: Running) -> _Attempt:
        slots = self._slots()
        served = self._names_if_few(MAX_NUM_NAMED)
        waiting, now_ms = self._streams.look(
            self._order.rank_by_share(running, slots.resident),
            served,
            num_queues=min(MAX_NUM_QUEUES, running.num_free + NUM_SPARE),
            num_requests=running.num_free,
            num_long=running.num_long_free,
        )
        picks = self._order.choose(waiting, running, slots, now_ms)
        return _Attempt([uuid4().hex for _ in picks], picks, running.num_long_free)

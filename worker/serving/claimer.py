"""The claims of one worker: look at what waits, choose by the order rule, take what is still there."""

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
"""Up to this number of queues, a worker asks for all of its queues by name."""
MAX_NUM_QUEUES = 32
NUM_SPARE = 4
"""Queues to look at beyond one per free place: as many that need no free slot, and as many others."""


class _Attempt(NamedTuple):
    """A claim whose reply has not come yet."""

    claim_ids: list[str]
    picks: list[Pick]


class Claimer:
    """Claims requests for the I/O thread. It keeps a claim whose reply was lost, to repeat it."""

    def __init__(
        self,
        streams: WorkerStreams,
        order: WaitingOrder,
        *,
        slots: Callable[[], AdapterSlots],
        names_if_few: Callable[[int], Sequence[str]],
    ) -> None:
        """`slots`: the adapters' slots on the device now. `names_if_few`: see `ServedQueues`."""
        self._streams = streams
        self._order = order
        self._slots = slots
        self._names_if_few = names_if_few
        self._attempt: _Attempt | None = None
        self.lost_race = False
        """True if the last claim chose requests and got none: others took them, and more may wait."""

    @property
    def awaits_reply(self) -> bool:
        """True if a claim was sent and not answered: it may have taken requests."""
        return self._attempt is not None

    def claim(self, running: Running) -> list[Claim]:
        """Claims requests until the worker's room is used."""
        self._attempt = self._attempt or self._choose(running)
        claims = self._streams.claim(*self._attempt) if self._attempt.picks else []
        self.lost_race = bool(self._attempt.picks) and not claims
        self._attempt = None
        for claim in claims:
            request = claim.request
            self._order.charge(queue_name(request.base, request.adapter_name), place_of(request))
        return claims

    def nothing_waits(self) -> None:
        """Notes that no queue of the base waits, so no adapter has to give up its slot."""
        self._order.forget_closed()

    def _choose(self, running: Running) -> _Attempt:
        slots = self._slots()
        served = self._names_if_few(MAX_NUM_NAMED)
        waiting, now_ms = self._streams.look(
            self._order.rank_by_share(running, slots.resident),
            served,
            num_queues=min(MAX_NUM_QUEUES, running.num_free + NUM_SPARE),
            num_requests=running.num_free,
        )
        picks = self._order.choose(waiting, running, slots, now_ms)
        return _Attempt([uuid4().hex for _ in picks], picks)

"""The order of waiting requests: the rule by which a worker chooses what to claim, without Redis or a clock.

A line is all waiting requests with the same queue, class, weights version and tenant. The worker reads the
first requests of some lines (`Waiting`), `WaitingOrder.choose` chooses lines, and the worker claims the first
request of each chosen line. Capacity is counted in sequences. A request can be chosen if the worker could
hold at least one of its sequences: the engine starts the other sequences once its batch has room.

Lines are compared by these keys, in this order:

* Key 1, the class: requests that ran before and lost their worker come first, because their clients watch a
  stalled stream. Interactive requests come second, batch requests last. But while requests of other classes
  wait, one in `BATCH_ONE_IN` of the claimed sequences is still a batch sequence. A batch request counts as
  interactive if its deadline is less than `BATCH_URGENT_S` away.
* Key 2, the residency: adapters that are resident, or find an empty slot, come before adapters that would
  evict another adapter. An adapter is overdue, and ranks like a resident one, once its oldest request has
  waited for `max_wait_s` (a batch request: `BATCH_PATIENCE` times as long). If all slots are in use when an
  adapter becomes overdue, the running adapter with the fewest sequences is closed: no more of its requests
  are chosen until its running requests have ended and its slot is free. A request thus waits for a slot at
  most `max_wait_s` plus the longest run of one adapter.
* Key 3, fairness between adapters: the adapter with the fewest sequences on this worker, divided by the
  adapter's weight, comes first. If two are equal, the one with the earlier virtual start time (`Shares`)
  comes first. Each claim adds its number of sequences, divided by the weight, to the adapter's virtual time.
  Thus even a worker that holds one sequence at a time serves two waiting adapters in proportion to their
  weights. The virtual times of the two never differ by more than the cost of one request of each.
* Key 4, the age: the queue whose first request has waited longest comes first.
* Key 5, fairness between the tenants of an adapter: tenants are compared like adapters in keys 3 and 4, but
  without weights.
* Key 6, the order inside a line: the request with the lower priority number comes first, then the older
  request. Redis keeps each line in this order.

`look.lua` reads lines from a limited number of queues. First, `look.lua` reads queues whose adapters run or
are resident, in the order of key 3. Then `look.lua` reads the same number of other queues. Half of these are
the queues whose first requests have waited longest, and half are drawn at random. From each queue, `look.lua`
reads the line of the oldest request, and lines of a few tenants drawn at random. Because half of the other
queues are drawn at random, a queue with only young requests is also read soon, however many queues have older
requests.

A new rule for tenants, such as weights, could compare only the tenants that were read. From each queue,
`look.lua` reads lines of at most 8 tenants for each class and version (`some_lines`), and the line that has
the oldest request.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from shared.queue.places import BATCH, INTERACTIVE, Place
from shared.queue.shares import Shares
from shared.queue.slot_plan import AdapterSlots, SlotPlan

BATCH_ONE_IN = 16
BATCH_URGENT_S = 60.0
BATCH_PATIENCE = 16
MAX_NUM_TENANT_SHARES = 256
"""Maximum number of queues for which the shares of the tenants are remembered."""


class Waiting(NamedTuple):
    """The first requests of a line, in the order in which they run; at least one request."""

    queue: str
    places: Sequence[Place]
    deadline_ms: float | None = None
    """The time (ms) by which the first request must have begun; None if it has no such limit."""


class Pick(NamedTuple):
    """A line that was chosen; the worker claims its first request."""

    queue: str
    line: str


NO_LIMIT = 1 << 30
"""Number of long requests that a worker can take if nothing limits them."""


class Running(NamedTuple):
    """The numbers of sequences that a worker holds, and the number that it could hold in addition."""

    num_free: int
    per_queue: Mapping[str, int]
    per_tenant: Mapping[tuple[str, str], int]
    """Number of sequences held, by (queue, tenant key)."""
    num_long_free: int = NO_LIMIT
    """Number of long requests that the worker can take; see `lines.lua`."""


class WaitingOrder:
    """Applies the order rule on one worker; remembers shares, closed adapters, and what batch is owed."""

    def __init__(self, base: str, *, max_wait_s: float, weights: Mapping[str, float] | None = None) -> None:
        """`base`: the base model's queue, which needs no slot. `weights`: weights by queue, by default 1."""
        self._base = base
        self._max_wait_ms = max_wait_s * 1000
        self._weights = dict(weights or {})
        self._shares: Shares[str] = Shares()
        self._tenant_shares: OrderedDict[str, Shares[str]] = OrderedDict()
        self._batch = _BatchAccount()
        self._closed: list[str] = []

    def choose(
        self, waiting: Iterable[Waiting], running: Running, slots: AdapterSlots, now_ms: float
    ) -> list[Pick]:
        """Returns lines to claim from, best first, until the free capacity is used.

        Shares don't change yet: the caller must call `charge` for each request that it has claimed.
        """
        lines = [_Line(entry, now_ms) for entry in waiting]
        self._batch.note(lines)
        draft = _Draft(running, SlotPlan(self._base, running.per_queue, slots), replace(self._batch))
        self._closed = self._close(lines, draft, now_ms)
        picks: list[Pick] = []
        while draft.num_free > 0:
            lines = [line for line in lines if line.places and self._may_run(line.queue, draft.slots)]
            if not lines:
                break
            line = self._best(draft.batch.first_class(lines), draft, now_ms)
            picks.append(Pick(line.queue, line.first.line))
            draft.take(line)
        return picks

    def charge(self, queue: str, place: Place) -> None:
        """Charges a claimed request's number of sequences to the shares of its adapter, tenant and class."""
        self._shares.charge(queue, place.num_sequences / self._weight(queue))
        self._tenant_shares.setdefault(queue, Shares()).charge(place.tenant, place.num_sequences)
        self._tenant_shares.move_to_end(queue)
        if len(self._tenant_shares) > MAX_NUM_TENANT_SHARES:
            self._tenant_shares.popitem(last=False)
        self._batch.charge(place)

    def forget_closed(self) -> None:
        """Reopens all closed adapters; called when no requests wait."""
        self._closed = []

    @property
    def num_remembered(self) -> int:
        """The number of adapters and tenants whose shares this object remembers."""
        return len(self._shares) + sum(map(len, self._tenant_shares.values()))

    def rank_by_share(self, running: Running, queues: Iterable[str]) -> list[str]:
        """Returns `queues`, the base's queue and the running adapters' queues, sorted by key 3 (fairness)."""
        queues = {self._base, *queues, *running.per_queue}

        def key(queue: str) -> tuple[float, float, str]:
            num_running = running.per_queue.get(queue, 0)
            return num_running / self._weight(queue), self._shares.start(queue), queue

        return sorted(queues, key=key)

    def _weight(self, queue: str) -> float:
        return self._weights.get(queue, 1.0)

    def _may_run(self, queue: str, slots: SlotPlan) -> bool:
        return queue not in self._closed and (queue in slots.used or slots.num_free > 0)

    def _is_overdue(self, line: "_Line", now_ms: float) -> bool:
        """True if the first request of a line has waited so long that it may evict another adapter."""
        patience = BATCH_PATIENCE if line.request_class == BATCH else 1
        return now_ms - line.first.since_ms >= patience * self._max_wait_ms

    def _close(self, lines: Iterable["_Line"], draft: "_Draft", now_ms: float) -> list[str]:
        """Returns the running adapters to close, one for each overdue adapter that lacks a slot.

        Adapters that are closed already are preferred, so that a closed adapter stays closed.
        """
        overdue = {line.queue for line in lines if self._is_overdue(line, now_ms)} - draft.slots.used
        num_missing = max(0, len(overdue) - draft.slots.num_free)
        candidates = draft.slots.used - {self._base}

        def key(queue: str) -> tuple[bool, int, str]:
            return queue not in self._closed, draft.per_queue[queue], queue

        return sorted(candidates, key=key)[:num_missing]

    def _best(self, lines: Iterable["_Line"], draft: "_Draft", now_ms: float) -> "_Line":
        """Returns the first line by keys 2 to 5; all `lines` have the same class."""
        queues: dict[str, list[_Line]] = {}
        for line in lines:
            queues.setdefault(line.queue, []).append(line)
        queue = min(queues, key=lambda name: self._queue_key(name, queues[name], draft, now_ms))
        return min(queues[queue], key=lambda line: self._line_key(line, draft))

    def _queue_key(
        self, queue: str, lines: Sequence["_Line"], draft: "_Draft", now_ms: float
    ) -> tuple[bool, float, float, float]:
        evicts = queue not in draft.slots.resident and draft.slots.num_empty <= 0
        return (
            evicts and not any(self._is_overdue(line, now_ms) for line in lines),
            draft.per_queue[queue] / self._weight(queue),
            self._shares.start(queue) + draft.chosen[queue] / self._weight(queue),
            min(line.first.since_ms for line in lines),
        )

    def _line_key(self, line: "_Line", draft: "_Draft") -> tuple[float, float, float]:
        name = line.queue, line.first.tenant
        shares = self._tenant_shares.get(line.queue)
        start = shares.start(line.first.tenant) if shares else 0.0
        return draft.per_tenant[name], start + draft.chosen_of[name], line.first.since_ms


class _Line:
    """A line, and its requests that are not chosen yet."""

    def __init__(self, waiting: Waiting, now_ms: float) -> None:
        self.queue = waiting.queue
        self.places = deque(waiting.places)
        is_urgent = waiting.deadline_ms is not None and waiting.deadline_ms - now_ms < BATCH_URGENT_S * 1000
        request_class = self.first.request_class
        self.request_class = min(request_class, INTERACTIVE) if is_urgent else request_class

    @property
    def first(self) -> Place:
        return self.places[0]


@dataclass
class _BatchAccount:
    """Counts the sequences that batch requests are owed because requests of other classes went first."""

    num_due: float = 0.0
    """Number of batch sequences that may run now; negative after a batch request of many sequences."""
    has_rival: bool = False
    """True while batch requests and requests of another class wait."""

    def note(self, lines: Iterable[_Line]) -> None:
        """Updates `has_rival` from the waiting lines."""
        classes = {line.request_class for line in lines}
        self.has_rival = BATCH in classes and len(classes) > 1
        if not self.has_rival:
            self.num_due = 0.0

    def first_class(self, lines: Sequence[_Line]) -> list[_Line]:
        """Returns the lines of the class whose turn it is."""
        classes = {line.request_class for line in lines}
        turn = BATCH if BATCH in classes and self.num_due >= 1 else min(classes)
        return [line for line in lines if line.request_class == turn]

    def charge(self, place: Place) -> None:
        """Adds a part of a chosen request's sequences to `num_due`; subtracts a batch request's sequences."""
        if self.has_rival:
            self.num_due = min(BATCH_ONE_IN, self.num_due + place.num_sequences / BATCH_ONE_IN)
            if place.request_class == BATCH:
                self.num_due -= place.num_sequences


class _Draft:
    """The state that the worker will have after it has claimed the requests chosen so far."""

    def __init__(self, running: Running, slots: SlotPlan, batch: _BatchAccount) -> None:
        self.slots = slots
        self.batch = batch
        self.num_free = running.num_free
        self.per_queue = Counter(running.per_queue)
        self.per_tenant = Counter(running.per_tenant)
        self.chosen: Counter[str] = Counter()
        """Number of sequences chosen so far, by queue; sequences that run already are not included."""
        self.chosen_of: Counter[tuple[str, str]] = Counter()
        """Number of sequences chosen so far, by (queue, tenant key)."""

    def take(self, line: _Line) -> None:
        """Chooses the first request of a line."""
        place = line.places.popleft()
        self.slots.use(line.queue)
        self.batch.charge(place)
        self.num_free -= place.num_sequences
        for per_queue in (self.per_queue, self.chosen):
            per_queue[line.queue] += place.num_sequences
        for per_tenant in (self.per_tenant, self.chosen_of):
            per_tenant[line.queue, place.tenant] += place.num_sequences

"""A simulation of queues and workers in memory, with a clock of its own, for tests of the order rule."""

from bisect import insort
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from shared.messages import GenerationRequest, RequestClass, SamplingParams
from shared.queue.names import queue_name
from shared.queue.order import Pick, Running, Waiting, WaitingOrder
from shared.queue.places import BEGAN, order_field, place_of, read_place, tenant_key
from shared.queue.slot_plan import AdapterSlots

BASE = "tiny"
MANY_SLOTS = 1000


@dataclass(frozen=True)
class Ask:
    """One waiting or running request."""

    request: GenerationRequest
    place: str
    """The place in the form of the index."""
    deadline_ms: float | None = None

    @property
    def queue(self) -> str:
        return queue_name(self.request.base, self.request.adapter_name)

    @property
    def line(self) -> Pick:
        """Its queue and line."""
        return Pick(self.queue, read_place(self.place).line)

    @property
    def name(self) -> str:
        """The adapter's name, or that of the base."""
        return self.request.adapter_name or BASE


class WaitingRoom:
    """The queues of a base, and the clock `now_s` of the simulation."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._lines: dict[Pick, list[Ask]] = {}
        self._numbers = count()

    def ask(
        self,
        adapter_name: str | None = None,
        *,
        waited_s: float = 0.0,
        tenant: str = "",
        batch: bool = False,
        began: bool = False,
        priority: int = 0,
        n: int = 1,
        due_in_s: float | None = None,
    ) -> Ask:
        """Puts a request on its queue, as if it had waited for `waited_s` already."""
        request = GenerationRequest(
            f"r{next(self._numbers):06d}",
            adapter_name or BASE,
            BASE,
            SamplingParams(),
            messages=[{}],
            n=n,
            adapter_name=adapter_name,
            tenant=tenant,
            priority=priority,
            request_class=RequestClass.BATCH if batch else RequestClass.INTERACTIVE,
        )
        request_class, tenant_part, priority_part, num_part = order_field(request).split("|")
        since_us = (self.now_s - waited_s) * 1e6
        parts = [
            str(BEGAN) if began else request_class,
            "0" * 8,
            tenant_part,
            priority_part,
            f"{since_us:016.0f}",
            num_part,
            request.request_id,
        ]
        deadline_ms = None if due_in_s is None else (self.now_s + due_in_s) * 1000
        ask = Ask(request, "|".join(parts), deadline_ms)
        insort(self._lines.setdefault(ask.line, []), ask, key=lambda entry: entry.place)
        return ask

    def look(self, most: int) -> list[Waiting]:
        """All lines, each with at most `most` requests."""
        return [
            Waiting(pick.queue, [read_place(ask.place) for ask in asks[:most]], asks[0].deadline_ms)
            for pick, asks in self._lines.items()
        ]

    def take(self, pick: Pick) -> Ask:
        """Removes the first request of a line."""
        ask = self._lines[pick][0]
        self.remove(ask)
        return ask

    def remove(self, ask: Ask) -> None:
        """Takes a request off its queue."""
        self._lines[ask.line].remove(ask)
        if not self._lines[ask.line]:
            del self._lines[ask.line]

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._lines.values()))


@dataclass
class Run:
    """A running request, and the number of turns that it has left."""

    ask: Ask
    num_turns: int


@dataclass
class SimulatedWorker:
    """A worker that holds requests for some turns of a second, with LRU slots for its adapters."""

    room: WaitingRoom
    num_places: int
    num_slots: int = MANY_SLOTS
    max_wait_s: float = 10.0
    weights: Mapping[str, float] = field(default_factory=dict)
    resident: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    num_loads: int = 0

    def __post_init__(self) -> None:
        weights = {queue_name(BASE, name): weight for name, weight in self.weights.items()}
        self.order = WaitingOrder(BASE, max_wait_s=self.max_wait_s, weights=weights)

    def turn(self, num_turns: int = 1, *, seconds: float = 1.0) -> list[str]:
        """Ends requests whose turns are over, claims, and lets a second pass; returns the claimed names."""
        claimed = self.claim(num_turns)
        self.room.now_s += seconds
        return [ask.name for ask in claimed]

    def claim(self, num_turns: int = 1) -> list[Ask]:
        """One claim. Each request runs for `num_turns` further claims."""
        self.runs = [Run(run.ask, run.num_turns - 1) for run in self.runs if run.num_turns > 0]
        running = self._running()
        if running.num_free <= 0:
            return []
        slots = AdapterSlots(self.num_slots, [queue_name(BASE, name) for name in self.resident])
        picks = self.order.choose(self.room.look(running.num_free), running, slots, self.room.now_s * 1000)
        claimed = [self.room.take(pick) for pick in picks]
        for ask in claimed:
            self.order.charge(ask.queue, place_of(ask.request))
            self.runs.append(Run(ask, num_turns))
            self._use_slot(ask.request.adapter_name)
        adapters = {run.ask.request.adapter_name for run in self.runs} - {None}
        assert len(adapters) <= self.num_slots
        return claimed

    def hold(self, adapter_name: str, num_requests: int = 1, num_turns: int = 1000) -> None:
        """Makes requests run, as if they had been claimed before."""
        for _ in range(num_requests):
            ask = self.room.ask(adapter_name)
            self.room.remove(ask)
            self.runs.append(Run(ask, num_turns))

    def _running(self) -> Running:
        per_queue: Counter[str] = Counter()
        per_tenant: Counter[tuple[str, str]] = Counter()
        for run in self.runs:
            request = run.ask.request
            per_queue[run.ask.queue] += request.num_sequences
            per_tenant[run.ask.queue, tenant_key(request.tenant)] += request.num_sequences
        return Running(self.num_places - per_queue.total(), per_queue, per_tenant)

    def _use_slot(self, name: str | None) -> None:
        if name is None:
            return
        if name in self.resident:
            self.resident.remove(name)
        else:
            self.num_loads += 1
            in_use = {run.ask.request.adapter_name for run in self.runs}
            if len(self.resident) >= self.num_slots:
                self.resident.remove(next(other for other in self.resident if other not in in_use))
        self.resident.append(name)

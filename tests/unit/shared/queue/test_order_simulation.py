"""The order rule in the long run: several workers, thousands of requests, greedy tenants, few slots."""

import random
from collections import Counter, defaultdict

from shared.queue.order import BATCH_ONE_IN
from tests.unit.shared.queue.waiting_room import SimulatedWorker, WaitingRoom

MAX_WAIT_S = 10.0


class Waits:
    """Longest waits of the requests of each (adapter, tenant), and the number of sequences served."""

    def __init__(self, room: WaitingRoom) -> None:
        self._room = room
        self._began_s: dict[str, float] = {}
        self.longest_s: dict[tuple[str, str], float] = defaultdict(float)
        self.served: Counter[str] = Counter()
        self.served_of: Counter[tuple[str, str]] = Counter()

    def ask(self, name: str, tenant: str = "", **options: bool | int) -> None:
        """Lets a request wait from now on."""
        ask = self._room.ask(name, tenant=tenant, **options)  # type: ignore[arg-type]
        self._began_s[ask.request.request_id] = self._room.now_s

    def claim(self, worker: SimulatedWorker, num_turns: int = 1) -> None:
        """One claim of a worker."""
        for ask in worker.claim(num_turns):
            waited_s = self._room.now_s - self._began_s.pop(ask.request.request_id)
            name = ask.name, ask.request.tenant
            self.longest_s[name] = max(self.longest_s[name], waited_s)
            self.served[ask.name] += ask.request.num_sequences
            self.served_of[name] += ask.request.num_sequences


def test_each_adapter_gets_its_weighted_share_of_each_worker_whatever_others_ask_for() -> None:
    rng, room = random.Random(0), WaitingRoom()
    weights = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 1.0}
    workers = [SimulatedWorker(room, 8, weights=weights) for _ in range(3)]
    waits = Waits(room)
    for name, num_requests in {"a": 5000, "b": 1200, "c": 2400, "d": 700}.items():
        for _ in range(num_requests):
            waits.ask(name, n=rng.choice((1, 1, 1, 2, 4)) if name == "a" else 1)
    for _ in range(150):
        for worker in workers:
            waits.claim(worker, num_turns=rng.randrange(3))
        room.now_s += 1
    total, heavy = sum(waits.served.values()), sum(weights.values())
    for name, weight in weights.items():
        assert 0.85 <= waits.served[name] / total / (weight / heavy) <= 1.15, waits.served


def test_a_modest_tenant_waits_no_longer_for_a_greedy_one_than_for_a_turn_of_each_tenant() -> None:
    room = WaitingRoom()
    worker, waits = SimulatedWorker(room, 2), Waits(room)
    for _ in range(4000):
        waits.ask("a", tenant="greedy")
    for turn in range(1500):
        for number in range(4):
            if turn % 20 == number:
                waits.ask("a", tenant=f"modest-{number}")
        waits.claim(worker, num_turns=0)
        room.now_s += 1
    assert all(waits.longest_s["a", f"modest-{number}"] <= 3 for number in range(4)), waits.longest_s
    assert waits.served_of["a", "greedy"] >= 2 * 1500 - 4 * 75


def test_nobody_starves_where_three_times_as_many_adapters_wait_as_there_are_slots() -> None:
    rng, room = random.Random(1), WaitingRoom()
    workers = [SimulatedWorker(room, 8, num_slots=4, max_wait_s=MAX_WAIT_S) for _ in range(2)]
    waits = Waits(room)
    names = [f"adapter-{number}" for number in range(24)]
    for _ in range(600):
        for name in names[:4]:
            waits.ask(name)
            waits.ask(name)
        for name in names[4:]:
            if rng.random() < 0.05:
                waits.ask(name, tenant=rng.choice("xyz"))
        for worker in workers:
            waits.claim(worker, num_turns=2)
        room.now_s += 1
    for _ in range(200):
        for worker in workers:
            waits.claim(worker, num_turns=2)
        room.now_s += 1
    rare = {name: longest_s for (name, _), longest_s in waits.longest_s.items() if name in names[4:]}
    assert len(rare) == 20
    assert max(rare.values()) <= 4 * MAX_WAIT_S, rare
    assert room.num_waiting < 600 * 8
    num_served = sum(waits.served.values())
    assert sum(worker.num_loads for worker in workers) < num_served / 3


def test_batch_gets_no_less_than_its_share_and_little_more_while_interactive_requests_wait() -> None:
    rng, room = random.Random(2), WaitingRoom()
    workers = [SimulatedWorker(room, 4) for _ in range(2)]
    waits = Waits(room)
    for _ in range(1500):
        waits.ask("interactive", tenant=rng.choice("abc"))
        waits.ask("batch", batch=True, n=rng.choice((1, 8)))
    for _ in range(150):
        for worker in workers:
            waits.claim(worker, num_turns=rng.randrange(2))
        room.now_s += 1
    share = waits.served["batch"] / sum(waits.served.values())
    assert 0.9 / BATCH_ONE_IN <= share <= 2 / BATCH_ONE_IN, waits.served


def test_all_that_waits_is_served_once_when_nothing_more_comes() -> None:
    rng, room = random.Random(3), WaitingRoom()
    workers = [SimulatedWorker(room, 4, num_slots=2, max_wait_s=MAX_WAIT_S) for _ in range(3)]
    waits = Waits(room)
    for _ in range(800):
        waits.ask(
            f"adapter-{rng.randrange(10)}",
            tenant=f"tenant-{rng.randrange(20)}",
            batch=rng.random() < 0.3,
            began=rng.random() < 0.05,
            priority=rng.randrange(-3, 4),
            n=rng.choice((1, 1, 1, 16)),
        )
    for _ in range(8000):
        for worker in workers:
            waits.claim(worker, num_turns=rng.randrange(3))
        room.now_s += 1
        if not room.num_waiting:
            break
    assert room.num_waiting == 0

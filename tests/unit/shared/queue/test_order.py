"""The order rule, one key after the other."""

from collections import Counter

import pytest

from shared.queue.order import BATCH_ONE_IN, BATCH_PATIENCE, MAX_NUM_TENANT_SHARES, WaitingOrder
from shared.queue.places import order_field, place_of, read_place, tenant_key
from shared.queue.shares import MAX_NUM_NAMES, Shares
from tests.unit.shared.queue.waiting_room import BASE, SimulatedWorker, WaitingRoom

MAX_WAIT_S = 10.0


@pytest.fixture
def room() -> WaitingRoom:
    return WaitingRoom()


def test_the_adapter_with_the_fewest_running_comes_first_then_the_one_that_waits_longest(
    room: WaitingRoom,
) -> None:
    for waited_s in (9, 8, 7):
        room.ask("a", waited_s=waited_s)
    room.ask("b", waited_s=1)
    assert SimulatedWorker(room, 3).turn() == ["a", "b", "a"]


def test_requests_that_run_already_count(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 4)
    worker.hold("a", 2)
    worker.hold("b")
    room.ask("a", waited_s=9)
    room.ask("b", waited_s=1)
    assert worker.turn() == ["b"]


def test_running_sequences_count_and_not_requests(room: WaitingRoom) -> None:
    room.ask("a", waited_s=5, n=2)
    for _ in range(3):
        room.ask("a")
        room.ask("b")
    assert SimulatedWorker(room, 6).turn() == ["a", "b", "b", "a", "b"]


def test_a_weight_of_two_gives_twice_the_sequences(room: WaitingRoom) -> None:
    for _ in range(20):
        room.ask("a")
        room.ask("b")
    assert Counter(SimulatedWorker(room, 12, weights={"a": 2.0}).turn()) == {"a": 8, "b": 4}


@pytest.mark.parametrize(("weight", "num_served"), [(1.0, 50), (3.0, 75), (0.25, 20)])
def test_one_place_alone_is_shared_by_weight(room: WaitingRoom, weight: float, num_served: int) -> None:
    worker = SimulatedWorker(room, 1, weights={"a": weight})
    for _ in range(100):
        room.ask("a")
        room.ask("b")
    served = Counter(name for _ in range(100) for name in worker.turn(0))
    assert abs(served["a"] - num_served) <= 1


def test_an_adapter_that_was_idle_has_saved_nothing_up(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 1)
    for _ in range(200):
        room.ask("a")
    for _ in range(100):
        worker.turn(0)
    for _ in range(20):
        room.ask("b")
    served = [name for _ in range(10) for name in worker.turn(0)]
    assert served.count("b") == 5


def test_a_request_of_many_sequences_is_claimed_while_one_place_is_free(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 4)
    worker.hold("a", 3)
    room.ask("b", n=8)
    room.ask("c")
    assert worker.turn() == ["b"]
    assert worker.turn() == []


def test_tenants_of_an_adapter_share_it_however_many_requests_one_has(room: WaitingRoom) -> None:
    for _ in range(1000):
        room.ask("a", tenant="greedy", waited_s=5)
    for _ in range(2):
        room.ask("a", tenant="modest")
    worker = SimulatedWorker(room, 1)
    claimed = [worker.claim(0)[0].request.tenant for _ in range(4)]
    assert sorted(claimed) == ["greedy", "greedy", "modest", "modest"]


def test_a_tenant_with_fewer_running_comes_first(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 4)
    room.ask("a", tenant="one", n=2)
    worker.claim(10)
    room.ask("a", tenant="one", waited_s=5)
    room.ask("a", tenant="other")
    assert [ask.request.tenant for ask in worker.claim(10)] == ["other", "one"]


def test_the_lower_priority_of_one_tenant_runs_earlier_and_no_other_tenant_is_held_up(
    room: WaitingRoom,
) -> None:
    room.ask("a", tenant="one", priority=1, waited_s=9)
    room.ask("a", tenant="one", priority=-1, waited_s=1)
    room.ask("a", tenant="other", priority=5, waited_s=0.5)
    claimed = SimulatedWorker(room, 3).claim()
    assert [(ask.request.tenant, ask.request.priority) for ask in claimed] == [
        ("one", -1),
        ("other", 5),
        ("one", 1),
    ]


def test_requests_that_began_come_first_then_interactive_ones_then_batch(room: WaitingRoom) -> None:
    room.ask("batch", batch=True, waited_s=9)
    room.ask("interactive", waited_s=5)
    room.ask("began", began=True)
    assert SimulatedWorker(room, 3).turn() == ["began", "interactive", "batch"]


def test_batch_gets_its_share_beside_interactive_requests_and_all_without_them(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 1)
    for _ in range(10 * BATCH_ONE_IN):
        room.ask("a")
        room.ask("b", batch=True)
    served = [name for _ in range(8 * BATCH_ONE_IN) for name in worker.turn(0)]
    assert 7 <= served.count("b") <= 8
    for _ in range(3 * BATCH_ONE_IN):
        worker.turn(0)
    assert [worker.turn(0) for _ in range(3)] == [["b"]] * 3


def test_a_batch_request_near_its_deadline_counts_as_interactive(room: WaitingRoom) -> None:
    room.ask("a", waited_s=1)
    room.ask("b", batch=True, waited_s=2, due_in_s=30)
    room.ask("c", batch=True, waited_s=3, due_in_s=3000)
    assert SimulatedWorker(room, 3).turn() == ["b", "a", "c"]


def test_batch_waits_longer_before_it_evicts_an_adapter(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 1, num_slots=1, max_wait_s=MAX_WAIT_S, resident=["a"])
    room.ask("a", batch=True)
    room.ask("b", batch=True, waited_s=MAX_WAIT_S * BATCH_PATIENCE - 1)
    assert worker.turn(0) == ["a"]
    room.ask("a", batch=True)
    assert worker.turn(0) == ["b"]


def test_no_more_adapters_run_than_there_are_slots_and_the_base_needs_none(room: WaitingRoom) -> None:
    for name in ("a", "b", "c", None):
        room.ask(name)
    assert sorted(SimulatedWorker(room, 8, num_slots=2).turn()) == ["a", "b", BASE]


def test_a_resident_adapter_comes_before_one_that_would_evict_it(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 1, num_slots=1, resident=["a"])
    room.ask("b", waited_s=5)
    room.ask("a")
    assert worker.turn(0) == ["a"]
    assert worker.turn(0) == ["b"]


def test_an_empty_slot_is_taken_at_once(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 2, num_slots=2, resident=["a"])
    for name in ("a", "a", "b"):
        room.ask(name)
    assert worker.turn() == ["a", "b"]


def test_an_overdue_request_gets_a_slot_when_the_longest_run_of_another_is_over(room: WaitingRoom) -> None:
    longest_run = 4
    worker = SimulatedWorker(room, 8, num_slots=2, max_wait_s=MAX_WAIT_S)
    for name in ("a", "b", "a"):
        room.ask(name)
    worker.turn(longest_run)
    room.ask("c")
    for turn in range(40):
        room.ask("a")
        room.ask("b")
        if "c" in worker.turn(longest_run):
            assert MAX_WAIT_S <= turn <= MAX_WAIT_S + longest_run + 2
            return
    pytest.fail("the third adapter starved")


def test_twice_as_many_adapters_as_slots_do_not_evict_each_other_all_the_time(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 16, num_slots=8, max_wait_s=MAX_WAIT_S)
    names = "abcdefghijklmnop"
    last_turn = dict.fromkeys(names, 0)
    num_served = 0
    for name in names:
        room.ask(name)
        room.ask(name)
    for turn in range(60):
        for name in worker.turn():
            num_served += 1
            assert turn - last_turn[name] <= 2 * MAX_WAIT_S + 4
            last_turn[name] = turn
            room.ask(name)
    assert min(last_turn.values()) > 0
    assert worker.num_loads < num_served / 4


def test_an_adapter_that_a_choice_evicts_is_not_resident_for_the_rest_of_it(room: WaitingRoom) -> None:
    for name, waited_s in (("c", MAX_WAIT_S + 1), ("a", 3), ("b", 2)):
        room.ask(name, waited_s=waited_s)
    worker = SimulatedWorker(room, 2, num_slots=2, max_wait_s=MAX_WAIT_S, resident=["a", "b"])
    assert worker.turn() == ["c", "b"]


def test_an_adapter_that_one_on_its_way_evicts_is_not_resident(room: WaitingRoom) -> None:
    for name, waited_s in (("a", 3), ("b", 2)):
        room.ask(name, waited_s=waited_s)
    worker = SimulatedWorker(room, 2, num_slots=2, max_wait_s=MAX_WAIT_S, resident=["a", "b"])
    worker.hold("c")
    assert worker.turn() == ["b"]


def test_the_request_behind_an_overdue_one_is_not_overdue(room: WaitingRoom) -> None:
    worker = SimulatedWorker(room, 2, num_slots=1, max_wait_s=MAX_WAIT_S, resident=["a"])
    for name, waited_s in (("b", MAX_WAIT_S + 1), ("a", 2)):
        room.ask(name, waited_s=waited_s)
    assert worker.turn(0) == ["b"]
    room.ask("c", waited_s=3)
    room.ask("b", waited_s=1)
    assert worker.turn(0) == ["b"]


def test_an_adapter_closed_in_an_earlier_wait_is_not_preferred_when_another_wait_begins(
    room: WaitingRoom,
) -> None:
    worker = SimulatedWorker(room, 6, num_slots=2, max_wait_s=MAX_WAIT_S, resident=["a", "b"])

    def claim_beside_an_overdue_one(num_of_a: int, num_of_b: int) -> list[str]:
        worker.runs = []
        worker.hold("a", num_of_a)
        worker.hold("b", num_of_b)
        asks = [room.ask("c", waited_s=MAX_WAIT_S + 1), room.ask("a"), room.ask("b")]
        names = worker.turn()
        for ask in asks:
            if ask.name not in names:
                room.remove(ask)
        return names

    assert claim_beside_an_overdue_one(1, 2) == ["b"]
    assert claim_beside_an_overdue_one(2, 1) == ["b"]
    worker.order.forget_closed()
    assert claim_beside_an_overdue_one(2, 1) == ["a"]


def test_places_sort_by_priority_and_then_by_time_and_tell_what_the_rule_needs(room: WaitingRoom) -> None:
    late, early = room.ask("a", waited_s=1), room.ask("a", waited_s=2)
    urgent = room.ask("a", priority=-(2**31) + 1, tenant="t", n=3)
    assert sorted([late.place, early.place]) == [early.place, late.place]
    place = read_place(urgent.place)
    assert (place.tenant, place.num_sequences) == (tenant_key("t"), 3)
    assert place.since_ms == pytest.approx(room.now_s * 1000)
    assert order_field(urgent.request).split("|")[2] == "0000000001"


def test_the_memory_of_shares_is_bounded() -> None:
    shares: Shares[int] = Shares()
    for name in range(10 * MAX_NUM_NAMES):
        shares.charge(name, 5.0)
    assert len(shares) <= MAX_NUM_NAMES
    order = WaitingOrder(BASE, max_wait_s=1.0)
    for number in range(2 * MAX_NUM_TENANT_SHARES):
        order.charge(f"q{number}", place_of(WaitingRoom().ask().request))
    assert order.num_remembered <= MAX_NUM_NAMES + MAX_NUM_TENANT_SHARES

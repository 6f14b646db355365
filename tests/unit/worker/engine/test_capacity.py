"""Tests of the number of sequences that a worker holds after memory was short."""

from worker.engine.capacity import NUM_STEPS_TO_GROW, Capacity


def count_steps(capacity: Capacity, num_steps: int) -> None:
    for _ in range(num_steps):
        capacity.count_step()


def test_one_fewer_than_did_not_fit_is_held_but_at_least_one() -> None:
    capacity = Capacity(8)
    capacity.shrink(num_running=6)
    assert capacity.num_sequences == 5
    for _ in range(6):
        capacity.shrink(num_running=6)
    assert capacity.num_sequences == 1


def test_it_grows_by_one_after_many_good_steps_up_to_what_was_configured() -> None:
    capacity = Capacity(4)
    capacity.shrink(num_running=3)
    count_steps(capacity, NUM_STEPS_TO_GROW - 1)
    assert capacity.num_sequences == 2
    count_steps(capacity, 1)
    assert capacity.num_sequences == 3
    count_steps(capacity, 5 * NUM_STEPS_TO_GROW)
    assert capacity.num_sequences == 4


def test_the_good_steps_begin_anew_after_one_that_did_not_fit() -> None:
    capacity = Capacity(4)
    capacity.shrink(num_running=4)
    count_steps(capacity, NUM_STEPS_TO_GROW - 1)
    capacity.shrink(num_running=4)
    count_steps(capacity, NUM_STEPS_TO_GROW - 1)
    assert capacity.num_sequences == 2

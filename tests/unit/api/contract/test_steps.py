"""Long computations of requests: they pause often, one of them at a time."""

import asyncio

from api.contract.steps import STEP_S, StepRunner, Steps, each, run_at_once


class SteppedClock:
    """A clock that advances with each step of a computation."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def counting(clock: SteppedClock, name: str, num_steps: int, log: list[str]) -> Steps[str]:
    """A computation whose steps take a third of `STEP_S` each."""
    for _ in range(num_steps):
        clock.now += STEP_S / 3
        log.append(name)
        yield
    return name


async def watch(log: list[str]) -> None:
    """Writes a mark whenever the event loop serves others."""
    while True:
        log.append("|")
        await asyncio.sleep(0)


async def run_all(*runs: tuple[str, int, bool]) -> tuple[list[str], str]:
    """Runs computations (name, steps, is_long) at once; returns their values, and the log of all steps."""
    clock, log = SteppedClock(), list[str]()
    runner = StepRunner(clock)
    watcher = asyncio.create_task(watch(log))
    values = await asyncio.gather(
        *(runner.run(counting(clock, name, steps, log), is_long=long) for name, steps, long in runs)
    )
    watcher.cancel()
    return values, "".join(log)


async def test_a_long_computation_lets_others_run_after_each_few_steps() -> None:
    values, log = await run_all(("a", 12, True))
    assert values == ["a"]
    assert log.count("a") == 12
    assert max(map(len, log.split("|"))) <= 4


async def test_a_short_one_runs_at_once_while_a_long_one_is_under_way() -> None:
    values, log = await run_all(("a", 30, True), ("b", 2, False))
    assert values == ["a", "b"]
    assert log.index("bb") < log.rindex("a")


async def test_of_long_ones_one_runs_at_a_time_whether_or_not_they_were_known_to_be_long() -> None:
    values, log = await run_all(("a", 30, True), ("b", 30, True), ("c", 30, False))
    assert values == ["a", "b", "c"]
    turns = [set(turn) for turn in log.split("|")[1:] if turn]
    assert all(len(turn) == 1 for turn in turns[1:]), log
    assert log.rindex("a") < log.index("b")


async def test_an_error_ends_a_computation_and_its_turn() -> None:
    def failing() -> Steps[None]:
        yield
        raise ValueError

    runner = StepRunner()
    failed = await asyncio.gather(runner.run(failing(), is_long=True), return_exceptions=True)
    assert isinstance(failed[0], ValueError)
    assert await runner.run(each(str, [1, 2]), is_long=True) == ["1", "2"]


def test_a_computation_without_an_event_loop_runs_at_once() -> None:
    assert run_at_once(each(str, [1, 2])) == ["1", "2"]

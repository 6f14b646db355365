"""The progress of a worker's requests, by which tests time their faults instead of by the clock."""

from collections.abc import Callable, Sequence
from statistics import median

from tests.chaos.cluster import ChaosWorker
from tests.chaos.recorder import workload
from tests.waiting import wait_until

ASKS = workload()
MAX_TOKENS = ASKS[0].max_tokens
MIN_OWNED = 4
STAGES: dict[str, Callable[[list[int]], bool]] = {
    "before the first token": lambda lengths: lengths.count(0) >= MIN_OWNED,
    "after the first token": lambda lengths: len(lengths) >= MIN_OWNED and lengths[0] >= 1,
    "in the middle": lambda lengths: len(lengths) >= MIN_OWNED and median(lengths) >= MAX_TOKENS // 2,
    "before the last token": lambda lengths: bool(lengths) and lengths[-1] >= MAX_TOKENS - 3,
}


def pick_victim(workers: Sequence[ChaosWorker], stage: str = "in the middle") -> ChaosWorker:
    """The first worker whose requests have reached this stage."""

    def find() -> ChaosWorker | None:
        return next((worker for worker in workers if STAGES[stage](worker.owned_log_lengths())), None)

    victim = wait_until(find, 30, f"a worker {stage}")
    assert victim is not None
    return victim

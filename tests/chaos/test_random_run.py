"""Less than a minute of `scripts/chaos`."""

import random

import pytest

from tests.chaos.random_run import run
from tests.forked import Nursery

SEED = 20261124
SECONDS = 40


@pytest.mark.timeout(300)
def test_random_faults_lose_no_request_and_change_no_token(models: dict[str, str], nursery: Nursery) -> None:
    is_right, report = run(models, SECONDS, random.Random(SEED), num_streams=32, nursery=nursery)
    assert is_right, "\n".join(report)

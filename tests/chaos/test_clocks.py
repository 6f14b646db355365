"""Clocks that are wrong: only the server's counts."""

import subprocess
import sys

import pytest

from tests.chaos.checker import Reference, check_complete
from tests.chaos.cluster import Cluster
from tests.chaos.recorder import Recorder
from tests.chaos.stages import ASKS, pick_victim
from tests.deployment import ROOT

SKEWED_RQ = """
import datetime, sys, time
real, real_time = datetime.datetime, time.time
hour = datetime.timedelta(seconds={seconds})

class Anything(type):
    def __instancecheck__(cls, value):
        return isinstance(value, real)

class Skewed(real, metaclass=Anything):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + hour

datetime.datetime = Skewed
time.time = lambda: real_time() + {seconds}
sys.argv[0] = "rq"
from rq.cli import main
main()
"""


@pytest.mark.long
@pytest.mark.parametrize("seconds", [3600, -3600], ids=["fast", "slow"])
def test_a_worker_and_an_operator_whose_clocks_are_an_hour_wrong_move_and_lose_nothing(
    cluster: Cluster, recorder: Recorder, reference: Reference, seconds: int
) -> None:
    right = cluster.start_companion()
    skewed = cluster.start_worker(program=[sys.executable, "-c", SKEWED_RQ.format(seconds=seconds)])
    run = recorder.start(cluster.api.url, ASKS)
    pick_victim([skewed])
    info = [sys.executable, "-c", SKEWED_RQ.format(seconds=seconds), "info", "-u", cluster.server.url]
    for _ in range(3):
        subprocess.run(info, cwd=ROOT, check=True, capture_output=True)
    check_complete(run.wait(), reference)
    for worker in (right, skewed):
        assert worker.is_running
        assert "lost its worker" not in worker.process.output
        assert "moved to another worker" not in worker.process.output

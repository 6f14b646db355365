"""A rolling upgrade under load, there and back: workers and APIs of two releases share the queues."""

import io
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from shared.queue import keys
from tests.chaos.checker import Reference, check_complete, check_quiet
from tests.chaos.cluster import BASE, ChaosApi, ChaosWorker, Cluster
from tests.chaos.recorder import Load, Recorder, workload
from tests.deployment import ROOT
from tests.forked import Nursery
from tests.waiting import wait_until

RELEASE_BEFORE = "788464908c408078ad9d9f6270f3400987920750"
NUM_CLIENTS = 12
"""More than the workers of a release have places, so that requests always wait."""
NUM_ANSWERS = 24
"""Answers at each stage: enough for every client, model and worker to take part."""
ASKS = workload(24, max_tokens=24, tag="upgrade ")
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def release_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the release before, from this repository's history."""
    tree = tmp_path_factory.mktemp("release-before")
    command = ["git", "archive", RELEASE_BEFORE]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(tree, filter="data")
    return tree


class Fleet:
    """Two workers and one API of one release, with clients that keep the API busy."""

    def __init__(self, cluster: Cluster, recorder: Recorder, tree: Path) -> None:
        self._cluster = cluster
        self._recorder = recorder
        self._tree = tree
        self.workers: list[ChaosWorker] = []
        self.loads: list[Load] = []
        self._api: ChaosApi | None = None

    def start(self) -> None:
        """Starts the API and the workers, and when all of them serve, the clients."""
        self._api = self._cluster.start_api(tree=self._tree)
        self.workers = [self._cluster.start_worker(wait=False, tree=self._tree) for _ in range(2)]
        for worker in self.workers:
            worker.wait_until_serving()
        self.loads.append(self._recorder.keep_busy(self._api.url, ASKS, NUM_CLIENTS, lambda answer: None))

    def wait_for_answers(self) -> None:
        """Returns when the clients have more answers, and each worker has had a request."""
        num_before = len(self.loads[-1].answers)
        wait_until(lambda: len(self.loads[-1].answers) >= num_before + NUM_ANSWERS, 120, "answers")
        for worker in self.workers:
            wait_until(worker.owned_ids, 60, f"a request at {worker.name}")

    def leave(self) -> None:
        """Sends SIGTERM to the workers while the clients go on, then ends the clients and the API."""
        for worker in self.workers:
            worker.terminate()
        self.loads[-1].stop()
        for worker in self.workers:
            assert worker.process.wait(60) == 0
        assert self._api is not None
        assert self._api.process.stop() == -signal.SIGTERM  # uvicorn raises the signal again


def test_requests_of_two_releases_are_served_by_both_while_one_replaces_the_other_and_back(
    models: dict[str, str],
    nursery: Nursery,
    reference: Reference,
    release_before: Path,
) -> None:
    reference.prepare(ASKS)
    with (
        Cluster(models, nursery, max_batch_size="4") as cluster,
        Recorder(cluster.server.url) as recorder,
    ):
        old, new = (Fleet(cluster, recorder, tree) for tree in (release_before, ROOT))
        old.start()
        old.wait_for_answers()
        for coming, leaving in ((new, old), (old, new)):
            wait_until(cluster.queued_ids, 60, "requests of the one release that wait for the other")
            coming.start()
            coming.wait_for_answers()
            leaving.wait_for_answers()
            leaving.leave()
            coming.wait_for_answers()
        old.loads[-1].stop()
        answers = [answer for fleet in (old, new) for load in fleet.loads for answer in load.answers]
        check_complete(answers, reference)
        # Workers of the release before leave the index of a queue behind, until it expires.
        for index in cluster.connection.scan_iter(keys.order("*")):
            assert cluster.connection.ttl(index) > 0
            cluster.connection.delete(index)
        check_quiet(cluster.connection, BASE)
        assert not cluster.take_complaints()

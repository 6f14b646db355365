"""An adapter is replaced under its name under load: no request is answered by other weights than its own."""

import threading
import time
from collections.abc import Sequence

import pytest
from rq.job import Job

from shared.model_cards import decode_card
from shared.queue import keys
from tests.chaos.checker import Reference, check_quiet, find_faults
from tests.chaos.cluster import BASE, UNHURRIED, ChaosWorker, Cluster
from tests.chaos.conftest import Measure
from tests.chaos.recorder import Answer, Ask, Recorder, workload
from tests.forked import Nursery
from tests.tiny_models import build_adapter
from tests.waiting import wait_until

NUM_CLIENTS = 16
GONE = "adapter_version_gone"
GONE_LIMIT_S = 2.0
REFUSED = ("model_not_found", "not_served_yet")
"""The error codes while the adapter is not registered: the request was not accepted."""
ASKS = workload(24, max_tokens=16, tag="swap ")


class Book:
    """The answers, each with the weights that its request was accepted for."""

    def __init__(self, cluster: Cluster) -> None:
        self._connection = cluster.connection
        self._lock = threading.Lock()
        self.entries: list[tuple[Answer, str]] = []

    def enter(self, answer: Answer) -> None:
        """Takes an answer while its job is still kept."""
        version = self._connection.hget(Job.key_for(answer.request_id), "version") or b""
        with self._lock:
            self.entries.append((answer, version.decode()))

    def num_complete(self, model: str, version: str) -> int:
        """Requests for these weights that came to their end."""
        return sum(
            answer.is_complete for answer, its in self.entries if (answer.ask.model, its) == (model, version)
        )


def fault_free(models: dict[str, str], nursery: Nursery) -> Reference:
    """The answers of these models, from a quiet deployment."""

    def run(asks: Sequence[Ask]) -> list[Answer]:
        with Cluster(models, nursery, **UNHURRIED) as cluster, Recorder(cluster.server.url) as recorder:
            cluster.start_worker()
            return recorder.start(cluster.start_api().url, asks).wait()

    reference = Reference(run)
    reference.prepare(ASKS)
    return reference


def card_version(cluster: Cluster, name: str) -> str:
    """The weights that the registry names for a model."""
    return decode_card(cluster.connection.hget(keys.MODELS, name) or b"").weights_version


@pytest.fixture(scope="module")
def new_models(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The models with other weights under the name `a`."""
    replaced = build_adapter(tmp_path_factory.mktemp("new") / "a", models["model"], rank=8, seed=7)
    return models | {"adapters": f"a={replaced} {models['adapters'].split()[1]}"}


@pytest.mark.timeout(240)
def test_no_answer_comes_from_other_weights_while_an_adapter_is_replaced_and_workers_die(
    models: dict[str, str], new_models: dict[str, str], nursery: Nursery, reference: Reference
) -> None:
    reference.prepare(ASKS)
    references = [reference, fault_free(new_models, nursery)]
    assert all(references[0].of(ask) != references[1].of(ask) for ask in ASKS if ask.model == "a")
    with (
        Cluster(models, nursery, max_batch_size="6") as cluster,
        Recorder(cluster.server.url) as recorder,
    ):
        api = cluster.start_api()
        old = [cluster.start_worker(), cluster.start_worker()]
        versions = [card_version(cluster, "a")]
        book = Book(cluster)
        load = recorder.keep_busy(api.url, ASKS, NUM_CLIENTS, book.enter)
        wait_until(lambda: book.num_complete("a", versions[0]) > 5, 60, "answers of the old weights")
        new = replace(cluster, new_models, num_workers=2)
        versions.append(card_version(cluster, "a"))
        for worker in (old[0], new[0]):
            wait_until(worker.owned_ids, 30, "requests of the victim")
            worker.kill()
        wait_until(lambda: book.num_complete("a", versions[1]) > 10, 60, "answers of the new weights")
        load.stop()
        check_quiet(cluster.connection, BASE)
        assert not cluster.take_complaints()
    for answer, version in book.entries:
        if answer.error_code not in REFUSED:
            is_new = answer.ask.model == "a" and version == versions[1]
            faults = find_faults(answer, references[is_new].of(answer.ask))
            assert not faults, f"{answer.ask} of version {version}: {faults}"


def test_requests_for_weights_whose_last_worker_died_end_soon_with_an_error_of_their_own(
    models: dict[str, str], new_models: dict[str, str], nursery: Nursery, measure: Measure
) -> None:
    with (
        Cluster(models, nursery, max_batch_size="2") as cluster,
        Recorder(cluster.server.url) as recorder,
    ):
        api = cluster.start_api()
        # Slow enough that nothing ends before the new worker has started, however busy the machine is.
        old = cluster.start_worker(step_delay_s="0.2")
        running = recorder.start(api.url, [Ask("a", f"runs {number}", max_tokens=400) for number in range(2)])
        wait_until(lambda: running.num_started == 2, 30, "both streams")
        waiting = recorder.start(
            api.url, [Ask("a", f"{number}", max_tokens=400, stream=number % 2 == 0) for number in range(4)]
        )
        wait_until(lambda: len(cluster.known_ids()) == 6, 30, "all requests")
        replace(cluster, new_models, num_workers=1)
        answered = recorder.start(api.url, [Ask("a", "new", max_tokens=4), Ask("tiny", "base", max_tokens=4)])
        assert all(answer.is_complete for answer in answered.wait())
        old.kill()
        cluster.wait_until_leased(1)
        left_at = time.monotonic()
        late = [*running.wait(), *waiting.wait()]
        measure("until all had their error", time.monotonic() - left_at, GONE_LIMIT_S)
        assert [answer.error_code for answer in late] == [GONE] * 6
        assert all(answer.num_ends == 1 for answer in late)
        assert [bool(answer.chunks) for answer in late] == [True] * 2 + [False] * 4
        assert {answer.status for answer in late[2:]} == {503}
        check_quiet(cluster.connection, BASE)


def replace(cluster: Cluster, new_models: dict[str, str], num_workers: int) -> list[ChaosWorker]:
    """Replaces `a` as docs/operations.md says, while the old workers go on; the new ones serve."""
    cluster.connection.hdel(keys.MODELS, "a")
    new = [cluster.start_worker(wait=False, adapters=new_models["adapters"]) for _ in range(num_workers)]
    return [worker.wait_until_serving() for worker in new]

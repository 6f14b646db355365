"""Requests that crash their worker or do not fit, among innocent ones; the test restarts what dies."""

import pytest
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from tests.chaos.checker import Reference, check_complete
from tests.chaos.cluster import BASE, Cluster
from tests.chaos.recorder import Ask, Recorder, workload
from tests.chaos.stages import ASKS
from tests.waiting import wait_until

HUNG_EXIT_CODE = 70
WORD = "poisonous"
INNOCENT = workload(15, max_tokens=24, tag="innocent")
NUM_WORKERS = 2


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", ["poison", "raise"])
def test_a_request_that_crashes_its_worker_alone_three_times_fails_and_its_neighbours_complete(
    cluster: Cluster, recorder: Recorder, reference: Reference, fault: str
) -> None:
    reference.prepare(INNOCENT)
    cluster.ensure_workers(1)
    cluster.ensure_workers(0)
    poison = Ask("a", f"a {WORD} prompt", max_tokens=24, stream=False)
    settings = {"faults": f"{fault}={WORD}"}
    num_started = 0
    registry = FailedJobRegistry(f"{BASE}-a", cluster.connection, serializer=JSONSerializer)
    reasons: list[str] = []
    """The last results of failed jobs; Redis keeps them for a few seconds only."""

    def supervise() -> bool:
        """Restarts what died, as a supervisor would, and reads why jobs failed."""
        nonlocal num_started
        ids = registry.get_job_ids(cleanup=False)
        for job in Job.fetch_many(ids, cluster.connection, JSONSerializer):
            if job is not None and (result := job.latest_result()) is not None:
                reasons.append(result.exc_string)
        while len(cluster.live_workers()) < NUM_WORKERS:
            cluster.start_worker(wait=False, **settings)
            num_started += 1
        return run.num_ended == len(run.answers)

    run = recorder.start(cluster.api.url, [*INNOCENT[:8], poison, *INNOCENT[8:]])
    wait_until(supervise, 150, "the end of all requests")
    *_, last = (answer for answer in run.wait() if answer.ask is poison)
    assert (last.status, last.error_code) == (500, "generation_failed")
    assert "crashed its worker 3 times" in last.errors[0]["message"]
    check_complete((answer for answer in run.answers if answer.ask is not poison), reference)
    assert any("crashed its worker" in reason for reason in reasons)
    assert num_started >= NUM_WORKERS + 3
    cluster.ensure_workers(0)
    if fault == "raise":
        assert all("a fault on purpose" in complaint for complaint in cluster.take_complaints())


@pytest.mark.parametrize("fault", ["poison", "raise"])
def test_a_request_that_was_alone_from_the_beginning_fails_with_its_third_worker(
    cluster: Cluster, recorder: Recorder, fault: str
) -> None:
    cluster.ensure_workers(0)
    settings = {"faults": f"{fault}={WORD}"}
    num_started = 0

    def supervise() -> bool:
        nonlocal num_started
        if not cluster.live_workers():
            cluster.start_worker(wait=False, **settings)
            num_started += 1
        return run.num_ended == 1

    run = recorder.start(cluster.api.url, [Ask("a", f"a {WORD} prompt", max_tokens=24, stream=False)])
    wait_until(supervise, 60, "the end of the request")
    (answer,) = run.wait()
    assert (answer.status, answer.error_code) == (500, "generation_failed")
    # The fourth one reaps it; it does not run it.
    assert num_started == 4
    cluster.ensure_workers(0)
    assert all("a fault on purpose" in complaint for complaint in cluster.take_complaints())


def test_a_request_whose_template_never_ends_is_blamed_by_its_worker_and_its_neighbours_complete(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    cluster.ensure_workers(0)
    settings = {"faults": f"stuck={WORD}", "step_limit_s": "1", "max_crashes_alone": "1"}
    first = cluster.start_worker(**settings)
    stuck = Ask("a", f"a {WORD} prompt", max_tokens=24, stream=False)
    run = recorder.start(cluster.api.url, [*ASKS[:8], stuck])
    assert first.process.wait() == HUNG_EXIT_CODE
    cluster.start_worker(**settings)
    *_, last = (answer for answer in run.wait() if answer.ask is stuck)
    assert (last.status, last.error_code) == (500, "generation_failed")
    assert "crashed its worker" in last.errors[0]["message"]
    check_complete((answer for answer in run.answers if answer.ask is not stuck), reference)


def test_a_thread_that_fails_beside_the_engine_counts_as_a_crash_too(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    ask = Ask("a", "hi", max_tokens=24)
    reference.prepare([ask])
    cluster.ensure_workers(0)
    worker = cluster.start_worker(faults="fail=appended:4")
    run = recorder.start(cluster.api.url, [ask])
    assert worker.process.wait() == 1
    (request_id,) = wait_until(cluster.known_ids, what="the request")
    cluster.start_worker()
    job = f"rq:job:{request_id}"
    wait_until(lambda: cluster.connection.hget(job, "crashes_alone") == b"1", what="the crash to be counted")
    check_complete(run.wait(), reference)
    cluster.ensure_workers(0)
    assert all("a fault on purpose" in complaint for complaint in cluster.take_complaints())


def test_a_step_that_runs_out_of_memory_hands_the_newest_back_and_the_worker_lives(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    reference.prepare(INNOCENT)
    cluster.ensure_workers(0)
    worker = cluster.start_worker(faults="oom=4")
    check_complete(recorder.start(cluster.api.url, INNOCENT[:10]).wait(), reference)
    assert worker.is_running
    assert "handed back: out of memory" in worker.process.output
    assert len(cluster.connection.smembers("rq:workers")) >= 1
    worker.kill()

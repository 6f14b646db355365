"""Floods, time limits, and operators at work: clear answers at once, and nobody else is touched."""

import subprocess
import time

from rq.command import send_stop_job_command
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from shared.messages import decode_event
from shared.queue import keys, registry
from tests.chaos.checker import Reference, check_complete, request_keys
from tests.chaos.cluster import BASE, TTL_S, Cluster
from tests.chaos.conftest import Measure
from tests.chaos.recorder import Ask, Recorder, workload
from tests.chaos.stages import ASKS, pick_victim
from tests.deployment import BIN, ROOT
from tests.waiting import wait_until

MAX_DEPTH = 8
SHORT_ASKS = workload(12, max_tokens=8, tag="short")


def test_a_flood_is_refused_at_once_with_a_time_to_come_back_and_what_was_accepted_completes(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure
) -> None:
    asks = [Ask("tiny", f"flood {i}", max_tokens=8, seed=i) for i in range(3 * MAX_DEPTH)]
    reference.prepare(asks)
    cluster.ensure_workers(2)
    api = cluster.start_api(max_queue_depth=str(MAX_DEPTH))
    with cluster.suspended():
        run = recorder.start(api.url, asks)
        wait_until(lambda: run.num_ended == 2 * MAX_DEPTH, what="the refusals")
        refused = [answer for answer in run.answers if answer.ended_at]
        assert len(cluster.queued_ids()) == MAX_DEPTH
    check_complete((answer for answer in run.wait() if answer not in refused), reference)
    for answer in refused:
        assert (answer.status, answer.error_code) == (429, "queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    measure("slowest refusal", max(answer.ended_at - answer.sent_at for answer in refused), 1.0)
    api.process.kill()


def test_a_request_over_the_queue_time_limit_is_told_so_and_never_runs(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure
) -> None:
    reference.prepare(SHORT_ASKS)
    cluster.ensure_workers(2)
    api = cluster.start_api(queue_time_limit_s="1")
    with cluster.suspended():
        run = recorder.start(api.url, SHORT_ASKS)
        ids = wait_until(lambda: _all_of(cluster.queued_ids(), len(SHORT_ASKS)), what="the requests")
        answers = run.wait()
    assert {(answer.status, answer.error_code) for answer in answers} == {(503, "queue_timeout")}
    measure("slowest 503", max(answer.ended_at - answer.sent_at for answer in answers), 1.5)
    check_complete(recorder.start(api.url, SHORT_ASKS).wait(), reference)
    # A worker or an API that ends an overdue request writes the error to its log, but no token.
    logs = [cluster.connection.lrange(keys.log(request_id), 0, -1) for request_id in ids]
    assert not any(decode_event(entry).token_ids for log in logs for entry in log)
    api.process.kill()


def test_suspended_workers_finish_what_they_run_and_claim_again_when_resumed(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    workers = cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, ASKS)
    pick_victim(workers)
    with cluster.suspended():
        late = recorder.start(cluster.api.url, ASKS[:8])
        check_complete(run.wait(), reference)
        assert late.num_started == 0
    check_complete(late.wait(), reference)


def test_nothing_that_names_a_request_is_left_when_its_time_is_over(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, ASKS[:8])
    check_complete(run.wait(), reference)
    ids = run.request_ids

    def left() -> list[str]:
        return [name for name in request_keys(cluster.connection) if any(i in name for i in ids)]

    assert left()
    wait_until(lambda: not left(), TTL_S + 2, "the end of their time")


def test_a_stop_command_ends_one_of_many_running_requests(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    workers = cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, ASKS)
    victim = pick_victim(workers).owned_ids()[0]
    send_stop_job_command(cluster.connection, victim, serializer=JSONSerializer)
    (stopped,) = [answer for answer in run.wait() if answer.request_id == victim]
    assert (stopped.error_code, stopped.num_ends) == ("generation_stopped", 1)
    assert reference.of(stopped.ask).text.startswith(stopped.text)
    check_complete((answer for answer in run.answers if answer is not stopped), reference)
    job = Job.fetch(victim, cluster.connection, JSONSerializer)
    assert job.get_status() == "stopped"
    assert victim in FailedJobRegistry(job.origin, cluster.connection).get_job_ids(cleanup=False)


def test_an_adapter_dropped_from_the_registry_takes_no_new_requests_and_finishes_those_that_wait(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    asks = [Ask("a", f"adapter {i}", max_tokens=8) for i in range(6)]
    reference.prepare(asks)
    cluster.ensure_workers(2)
    card = cluster.connection.hget(keys.MODELS, "a")
    assert card is not None
    with cluster.suspended():
        run = recorder.start(cluster.api.url, asks)
        wait_until(lambda: cluster.connection.llen(f"rq:queue:{BASE}-a") == len(asks), what="the queue")
        registry.drop(cluster.connection, ["a"])
    check_complete(run.wait(), reference)
    (refused,) = recorder.start(cluster.api.url, asks[:1]).wait()
    assert (refused.status, refused.error_code) == (404, "model_not_found")
    cluster.connection.hset(keys.MODELS, "a", card)


def test_a_running_job_deleted_by_an_operator_ends_with_an_error_and_a_queued_one_too(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure
) -> None:
    workers = cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, ASKS)
    victim = pick_victim(workers).owned_ids()[0]
    deleted_at = time.monotonic()
    Job.fetch(victim, cluster.connection, JSONSerializer).delete()
    (deleted,) = [answer for answer in run.wait() if answer.request_id == victim]
    assert (deleted.error_code, deleted.num_ends) == ("generation_failed", 1)
    measure("until its client knew", deleted.ended_at - deleted_at, 5)
    check_complete((answer for answer in run.answers if answer is not deleted), reference)
    cluster.connection.delete(keys.log(victim), keys.reader(victim))
    with cluster.suspended():
        waiting = recorder.start(cluster.api.url, [Ask("tiny", "queued", max_tokens=8)])
        (queued,) = wait_until(cluster.queued_ids, what="the queued request")
        deleted_at = time.monotonic()
        Job.fetch(queued, cluster.connection, JSONSerializer).delete()
        (told,) = waiting.wait()
    assert (told.status, told.error_code) == (500, "generation_failed")
    measure("until the client of the queued one knew", told.ended_at - deleted_at, 5)
    cluster.connection.delete(keys.log(queued), keys.reader(queued))


def rq(cluster: Cluster, *arguments: str) -> str:
    """The output of an `rq` command."""
    command = [BIN / "rq", *arguments, "-u", cluster.server.url]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_a_queue_emptied_by_an_operator_fails_what_waits_there_and_nothing_else(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure
) -> None:
    workers = cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, ASKS)
    pick_victim(workers)
    with cluster.suspended():
        waiting = recorder.start(cluster.api.url, [Ask("a", f"waiting {i}", max_tokens=8) for i in range(3)])
        ids = wait_until(lambda: _all_of(cluster.queued_ids(), 3), what="the waiting requests")
        rq(cluster, "empty", f"{BASE}-a")
        emptied_at = time.monotonic()
        answers = waiting.wait()
    assert [(answer.status, answer.error_code) for answer in answers] == [(500, "generation_failed")] * 3
    measure("until their clients knew", max(answer.ended_at for answer in answers) - emptied_at, 5)
    check_complete(run.wait(), reference)
    cluster.connection.delete(*(keys.reader(request_id) for request_id in ids))


def test_rq_info_in_a_loop_and_a_requeue_touch_nobody_else_and_the_requeued_one_runs_detached(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    workers = cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, ASKS)
    victim = pick_victim(workers).owned_ids()[0]
    send_stop_job_command(cluster.connection, victim, serializer=JSONSerializer)
    job = Job.fetch(victim, cluster.connection, JSONSerializer)
    wait_until(lambda: job.get_status() == "stopped", what="the end of the stopped one")
    rq(cluster, "requeue", "--queue", job.origin, "-S", "rq.serializers.JSONSerializer", victim)
    for _ in range(3):
        assert workers[0].name in rq(cluster, "info")
    (stopped,) = [answer for answer in run.wait() if answer.request_id == victim]
    check_complete((answer for answer in run.answers if answer is not stopped), reference)
    wait_until(lambda: job.get_status() == "finished", 30, "the end of the requeued one")
    log = [decode_event(entry) for entry in cluster.connection.lrange(keys.log(victim), 0, -1)]
    assert "".join(event.text for event in log) == reference.of(stopped.ask).text


def _all_of(ids: set[str], num_ids: int) -> set[str] | None:
    """The ids, if they are this many; None before, for `wait_until`."""
    return ids if len(ids) == num_ids else None

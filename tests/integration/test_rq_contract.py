"""Tests of RQ's behaviour that the scripts rely on: a newer RQ that breaks it fails here, by name."""

import json
from collections.abc import Callable

import pytest
import redis
import rq
from rq import Queue, Worker
from rq.defaults import RQ_KEY_PREFIX as RQ
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job, JobStatus
from rq.registry import CanceledJobRegistry, FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.suspension import suspend
from rq.worker.base import BaseWorker, WorkerStatus

Check = Callable[[redis.Redis], bool]


def make_job(connection: redis.Redis) -> Job:
    options = {"id": "x", "origin": "q", "connection": connection, "serializer": JSONSerializer}
    return Job.create("worker.jobs.generate", **options)


def enqueued_through_rq(connection: redis.Redis) -> bool:
    Queue("q", connection=connection, serializer=JSONSerializer).enqueue_job(make_job(connection))
    return (
        connection.lrange(f"{RQ}:queue:q", 0, -1) == [b"x"]
        and connection.sismember(f"{RQ}:queues", f"{RQ}:queue:q") == 1
        and connection.hmget(f"{RQ}:job:x", "status", "origin") == [b"queued", b"q"]
    )


def keeps_foreign_fields(connection: redis.Redis) -> bool:
    connection.hset(f"{RQ}:job:x", "request", "ours")
    job = make_job(connection)
    job.save()
    return connection.hget(f"{RQ}:job:x", "request") == b"ours"


def reads_dates_of_scripts(connection: redis.Redis) -> bool:
    make_job(connection).save()
    connection.hset(f"{RQ}:job:x", "ended_at", "2026-01-02T03:04:05.678901Z")
    ended_at = Job.fetch("x", connection, JSONSerializer).ended_at
    return ended_at is not None and ended_at.isoformat() == "2026-01-02T03:04:05.678901+00:00"


def writes_executions_where_scripts_do(connection: redis.Redis) -> bool:
    job = make_job(connection)
    job.save()
    with connection.pipeline() as pipeline:
        execution = Execution.create(job, ttl=60, pipeline=pipeline, worker_name="w")
        pipeline.execute()
    composite = f"x:{execution.id}"
    fields = set(connection.hgetall(f"{RQ}:execution:{composite}"))
    return (
        {b"id", b"created_at", b"last_heartbeat"} <= fields
        and connection.zrange(f"{RQ}:executions:x", 0, -1) == [execution.id.encode()]
        and connection.smembers(f"{RQ}:worker:w:executions") == {composite.encode()}
        and connection.zrange(f"{RQ}:wip:q", 0, -1) == [composite.encode()]
    )


def writes_results_where_scripts_do(connection: redis.Redis) -> bool:
    job = make_job(connection)
    job.save()
    Result.create(job, Result.Type.SUCCESSFUL, ttl=60, return_value={"a": 1})
    ((_, fields),) = connection.xrange(f"{RQ}:results:x")
    return {b"type", b"return_value"} <= set(fields) and Result.Type.FAILED.value == 2


ASSUMPTIONS: dict[str, Check] = {
    "an enqueued job stands in the list <prefix>:queue:<name>, the set <prefix>:queues, and a hash with "
    "status and origin": enqueued_through_rq,
    "Job.save() leaves fields of the job hash that RQ does not know": keeps_foreign_fields,
    "dates are ISO 8601 with microseconds and Z": reads_dates_of_scripts,
    "an execution is a hash <prefix>:execution:<job>:<id>, listed in <prefix>:executions:<job>, "
    "<prefix>:worker:<name>:executions and <prefix>:wip:<queue>": writes_executions_where_scripts_do,
    "results are a stream <prefix>:results:<job> with type and return_value": writes_results_where_scripts_do,
    "the JSON serializer writes job.data as [function, instance, args, kwargs]": lambda connection: (
        json.loads(make_job(connection).data) == ["worker.jobs.generate", None, [], {}]
    ),
    "ended jobs stand in <prefix>:finished, :failed and :canceled of their queue": lambda connection: (
        [
            registry("q", connection).key
            for registry in (FinishedJobRegistry, FailedJobRegistry, CanceledJobRegistry, StartedJobRegistry)
        ]
        == [f"{RQ}:finished:q", f"{RQ}:failed:q", f"{RQ}:canceled:q", f"{RQ}:wip:q"]
    ),
    "a job's executions are listed at <prefix>:executions:<job>": lambda connection: (
        ExecutionRegistry("x", connection).key == f"{RQ}:executions:x"
    ),
    "a worker is a hash <prefix>:worker:<name>": lambda connection: (
        Worker(["q"], name="w", connection=connection).key == f"{RQ}:worker:w"
    ),
    "a suspended RQ is the key <prefix>:suspended": lambda connection: (
        suspend(connection) is None and connection.exists(f"{RQ}:suspended") == 1
    ),
    "job states are called queued, started, finished, failed, stopped, canceled": lambda _: (
        {"queued", "started", "finished", "failed", "stopped", "canceled"} <= {s.value for s in JobStatus}
    ),
    "worker states are called busy and idle": lambda _: (
        (WorkerStatus.BUSY.value, WorkerStatus.IDLE.value) == ("busy", "idle")
    ),
    "a worker class overrides work, request_stop, handle_payload and teardown of BaseWorker": lambda _: all(
        callable(getattr(BaseWorker, name, None))
        for name in ("work", "request_stop", "handle_payload", "teardown", "register_birth", "heartbeat")
    ),
}


@pytest.mark.parametrize("sentence", ASSUMPTIONS)
def test_rq_keeps_to_what_the_scripts_rest_on(connection: redis.Redis, sentence: str) -> None:
    assert ASSUMPTIONS[sentence](connection), f"RQ {rq.VERSION} breaks an assumption of ours: {sentence}"

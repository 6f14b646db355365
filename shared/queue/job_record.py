"""Builds RQ's job hash for a generation request."""

import math
from functools import lru_cache
from typing import Any

from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from shared.messages import GenerationRequest
from shared.queue.places import order_field

FUNCTION = "worker.jobs.generate"
"""The function named in `job.data`. The prompt is in a separate field, which no RQ command or log shows."""


def job_fields(
    request: GenerationRequest,
    queue: str,
    client: str,
    *,
    result_ttl_s: int,
    failure_ttl_s: int,
    stream_ttl_s: float,
) -> dict[str, bytes | str | int | float]:
    """Returns the fields of a request's job hash: RQ's own fields, and those that Lorelay adds.

    `stream_ttl_s`: the longest time for which the client may wait. If a stock `rq worker` fails the job, RQ's
    `failure_ttl` must not let it expire sooner, because the request then goes back to its queue.
    """
    rqs_failure_ttl_s = max(failure_ttl_s, math.ceil(stream_ttl_s))
    limit_s = int(request.generation_limit_s) if request.generation_limit_s else None
    encoded = request.encode()
    return (
        _rq_fields(request.model, queue, limit_s, result_ttl_s, rqs_failure_ttl_s)
        | {
            "created_at": utcformat(now()),
            "request": encoded,
            "bytes": len(encoded),
            "client": client,
            "schema_version": request.schema_version,
            "model": request.model,
            "version": request.weights_version,
            "detached": int(request.detached),
            "order": order_field(request),
            "keep_failed_s": failure_ttl_s,
        }
        | ({"outline": outline(request)} if request.detached else {})
    )


@lru_cache(maxsize=1024)
def _rq_fields(
    model: str, queue: str, limit_s: int | None, result_ttl_s: int, failure_ttl_s: int
) -> dict[str, Any]:
    """Returns RQ's fields, which are equal for all requests to a model; the caller replaces `created_at`."""
    job = Job.create(
        FUNCTION,
        origin=queue,
        connection=Redis(),
        serializer=JSONSerializer,
        description=f"request to {model}",
        timeout=limit_s,
        result_ttl=result_ttl_s,
        failure_ttl=failure_ttl_s,
    )
    return {name: value for name, value in job.to_dict().items() if value is not None}


def outline(request: GenerationRequest) -> bytes:
    """Returns the encoded request without its prompt. An API needs only this to resume the request."""
    return request.without_prompt().encode()

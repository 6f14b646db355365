"""Builds RQ's job hash for a generation request."""

from functools import cache

from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer

from shared.messages import GenerationRequest
from shared.queue.places import order_field

FUNCTION = "worker.jobs.generate"
"""The function named in `job.data`. The prompt is in a separate field, which no RQ command or log shows."""


@cache
def _unconnected() -> Redis:
    return Redis()


def job_fields(
    request: GenerationRequest, queue: str, client: str, result_ttl_s: int, failure_ttl_s: int
) -> dict[str, bytes | str | int | float]:
    """Returns the fields of a request's job hash: RQ's own fields, and those that Lorelay adds."""
    job = Job.create(
        FUNCTION,
        id=request.request_id,
        origin=queue,
        connection=_unconnected(),
        serializer=JSONSerializer,
        description=f"request to {request.model}",
        timeout=int(request.generation_limit_s) if request.generation_limit_s else None,
        result_ttl=result_ttl_s,
        failure_ttl=failure_ttl_s,
    )
    fields = {name: value for name, value in job.to_dict().items() if value is not None}
    encoded = request.encode()
    return (
        fields
        | {
            "request": encoded,
            "bytes": len(encoded),
            "client": client,
            "schema_version": request.schema_version,
            "model": request.model,
            "version": request.weights_version,
            "detached": int(request.detached),
            "order": order_field(request),
        }
        | ({"outline": outline(request)} if request.detached else {})
    )


def outline(request: GenerationRequest) -> bytes:
    """Returns the encoded request without its prompt. An API needs only this to resume the request."""
    return request.without_prompt().encode()

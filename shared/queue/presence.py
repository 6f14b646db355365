"""Finds out which models are served by a live worker. Requests for other models can't get an answer now.

A worker is live until its lease expires, by the clock of Redis. A live worker serves the queues in its
`served` hash, each with the weights version in the hash. A worker that drains serves no queue.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import redis.asyncio

from shared.queue import keys
from shared.queue.connections import is_wrong_type
from shared.queue.names import queue_name, slug


class Weights(Protocol):
    """One version of a base model or an adapter, which a `ModelCard` or a `GenerationRequest` names."""

    @property
    def base(self) -> str: ...
    @property
    def adapter_name(self) -> str | None: ...
    @property
    def weights_version(self) -> str:
        """The version of the weights; empty if any version will do."""


async def find_served(connection: redis.asyncio.Redis, models: Sequence[Weights]) -> list[bool]:
    """Returns for each of `models`, in the same order, whether a live worker serves it in this version."""
    seconds, _ = await connection.time()
    queues: dict[str, set[str]] = {}
    for model in models:
        queues.setdefault(slug(model.base), set()).add(_queue(model))
    pipeline = connection.pipeline(transaction=False)
    for base in queues:
        pipeline.zrangebyscore(keys.workers(base), seconds * 1000, "+inf")
    live = dict(zip(queues, _readable(await pipeline.execute(raise_on_error=False)), strict=True))
    asked = [(worker, sorted(queues[base])) for base, workers in live.items() for worker in workers]
    for worker, names in asked:
        pipeline.hmget(keys.served(worker.decode()), names)
    replies = _readable(await pipeline.execute(raise_on_error=False)) if asked else []
    versions: dict[str, set[str]] = {}
    for (_, names), reply in zip(asked, replies, strict=True):
        for name, version in zip(names, reply, strict=False):
            if version is not None:
                versions.setdefault(name, set()).add(version.decode())
    return [_is_served(model, versions.get(_queue(model), set())) for model in models]


def _is_served(model: Weights, versions: set[str]) -> bool:
    """True if the model's version is one of the live workers' `versions`; an empty version matches any."""
    if not model.weights_version:
        return bool(versions)
    return not versions.isdisjoint(("", model.weights_version))


def _queue(model: Weights) -> str:
    return queue_name(model.base, model.adapter_name)


def _readable(replies: list[Any]) -> list[list[bytes]]:
    """Returns the replies, with an empty reply for each key of a wrong type; raises the first other error."""
    for reply in replies:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    return [[] if isinstance(reply, Exception) else cast("list[bytes]", reply) for reply in replies]

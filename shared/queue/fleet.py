"""Reads the facts that live workers of a base publish, and computes the context length that all accept."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import msgspec
import redis
from rq.defaults import RQ_KEY_PREFIX

from shared.model_cards import ModelCard, WorkerFacts, decode_facts
from shared.queue import keys
from shared.queue.connections import is_wrong_type
from shared.queue.names import queue_name, slug
from shared.queue.scripts import mend


class Peer(NamedTuple):
    """A live worker of a base."""

    facts: WorkerFacts | None
    """None for a worker of the release before, which writes none."""
    queues: frozenset[str]
    """The queues from which the worker claims, as far as they were asked for."""


class Live(NamedTuple):
    """A live worker of a base, without the list of the queues from which it claims."""

    facts: WorkerFacts | None
    """None for a worker of the release before, which writes none."""
    has_probe: bool
    """True if the worker claims from the queue that was asked for."""


def read_live(
    connection: redis.Redis, base: str, own_name: str, own: WorkerFacts, probes: Mapping[str, str]
) -> dict[str, Live]:
    """Returns a base's live workers by name; the caller's own name and facts are `own_name` and `own`.

    `probes` may name a queue for a worker. `Live.has_probe` then tells whether the worker claims from this
    queue.
    """
    names = _live_names(connection, keys.workers(slug(base)))
    pipeline = connection.pipeline(transaction=False)
    for name in names:
        pipeline.hget(f"{RQ_KEY_PREFIX}:worker:{name}", keys.FACTS_FIELD)
        pipeline.hget(keys.served(name), probes.get(name, ""))
    replies = _execute(pipeline) if names else []
    return {
        name: Live(own if name == own_name else read_facts(facts), isinstance(version, bytes))
        for name, facts, version in zip(names, replies[::2], replies[1::2], strict=True)
    }


def read_peers(
    connection: redis.Redis, base: str, queues: Sequence[str], own_name: str, own: WorkerFacts
) -> dict[str, Peer]:
    """Returns a base's live workers by name, each with the part of `queues` from which it claims."""
    live = read_live(connection, base, own_name, own, {})
    pipeline = connection.pipeline(transaction=False)
    for name in live:
        pipeline.hmget(keys.served(name), queues)
    replies = _execute(pipeline) if live else []
    return {
        name: Peer(worker.facts, _found(queues, served))
        for (name, worker), served in zip(live.items(), replies, strict=True)
    }


def _live_names(connection: redis.Redis, key: str) -> list[str]:
    """Returns the workers whose leases have not expired. If the key has a wrong type, renames the key."""
    seconds, _ = connection.time()
    try:
        live = cast("list[bytes]", connection.zrangebyscore(key, seconds * 1000, "+inf"))
    except redis.ResponseError as error:
        if not is_wrong_type(error):
            raise
        mend(connection, {key: "zset"})
        return []
    return [name.decode(errors="replace") for name in live]


def _execute(pipeline: "redis.client.Pipeline") -> list[object]:
    """Returns the replies of a pipeline, `WRONGTYPE` errors included; raises the first other error."""
    replies = cast("list[object]", pipeline.execute(raise_on_error=False))
    for reply in replies:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    return replies


def read_facts(encoded: object) -> WorkerFacts | None:
    """Decodes a worker's facts; returns None if they are missing or can't be read."""
    try:
        return decode_facts(encoded) if isinstance(encoded, bytes) else None
    except (msgspec.DecodeError, RecursionError):
        return None


def common_length(peers: Iterable[Peer], stored: ModelCard) -> int:
    """Returns the shortest context length of the live workers of a model.

    A worker of the previous release does not publish its length, so the length of the registered card is used
    for this worker. The result is also the card's length if no live worker serves the model.
    """
    queue = queue_name(stored.base, stored.adapter_name)
    serving = [peer.facts for peer in peers if queue in peer.queues]
    lengths = [stored.max_model_len if facts is None else facts.max_model_len for facts in serving]
    return min(lengths, default=stored.max_model_len)


def describe_differences(peers: Mapping[str, Peer], own_name: str, own: WorkerFacts) -> list[str]:
    """Returns a sentence for each live worker whose context length or number type differs from `own`."""
    return [
        f"worker {name} of the same base has {field} {theirs}, this one {ours}"
        for name, peer in peers.items()
        if name != own_name and peer.facts is not None
        for field, theirs, ours in (
            ("max_model_len", peer.facts.max_model_len, own.max_model_len),
            ("dtype", peer.facts.dtype, own.dtype),
        )
        if theirs != ours
    ]


def _found(queues: Sequence[str], served: object) -> frozenset[str]:
    """Returns the queues whose values in the reply of HMGET are not nil."""
    versions = cast("list[bytes | None]", served) if isinstance(served, list) else [None] * len(queues)
    return frozenset(queue for queue, version in zip(queues, versions, strict=True) if version is not None)

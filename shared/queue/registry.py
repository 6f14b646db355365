"""The registry of models in Redis, which workers write when they start, and APIs read.

The registry keeps a card (`ModelCard`) after the worker that wrote it has ended. Requests for a model can
therefore wait in its queue while no worker of the model is running. `presence.py` tells which models live
workers serve.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec
import redis
import redis.asyncio
from rq.defaults import RQ_KEY_PREFIX

from shared.errors import LorelayError, ModelNotFound, NotServedYet, RegistryConflict
from shared.logs import fields
from shared.model_cards import ModelCard, WorkerFacts, decode_card
from shared.queue import keys
from shared.queue.connections import is_wrong_type
from shared.queue.fleet import Peer, common_length, read_live, read_peers
from shared.queue.names import queue_name
from shared.queue.scripts import mend, script_source

logger = logging.getLogger(__name__)

MAX_SHOWN_LENGTH = 100
LOADING_TTL_S = 3600
"""Time to live of the notes about models that are being loaded, after the last one was written."""
FOLLOW_S = 30.0
"""Maximum time between two calls of `follow_workers`, for changes that `WorkerFollower` does not notice."""
UNREADABLE_TTL_MS = 86_400_000
"""Time to live of a key that was renamed because it had a wrong type; `prelude.lua` has the same number."""


def register(connection: redis.Redis, cards: Iterable[ModelCard]) -> None:
    """Adds cards. A registered card with the same base and version stays; see `follow_workers`.

    Entries that can't be read are replaced, and so are entries of an earlier release, which lack fields.

    Raises:
        RegistryConflict: a name is registered with another base or version, or two names have the same queue.
    """
    cards = list(cards)
    mend(connection, {keys.MODELS: "hash"})
    _refuse_shared_queues([*list_cards(connection), *cards])
    with connection.pipeline() as pipeline:
        for card in cards:
            pipeline.hsetnx(keys.MODELS, card.name, card.encode())
        for card in cards:
            pipeline.hget(keys.MODELS, card.name)
        replies = pipeline.execute()
    for card, encoded in zip(cards, replies[len(cards) :], strict=True):
        stored = _read(card.name, encoded)
        if stored is not None:
            _refuse_other_version(card, stored)
        if stored is None or (card.base_version and not stored.base_version):
            connection.hset(keys.MODELS, card.name, card.encode())
        elif card.max_token_bytes != stored.max_token_bytes:
            # An earlier release wrote the card without this bound.
            bounded = msgspec.structs.replace(stored, max_token_bytes=card.max_token_bytes)
            connection.hset(keys.MODELS, card.name, bounded.encode())


def follow_workers(
    connection: redis.Redis, cards: Sequence[ModelCard], worker_name: str, facts: WorkerFacts
) -> dict[str, Peer]:
    """Sets the context length in these cards' entries to the shortest length of each model's live workers.

    `worker_name`, `facts`: the name and the facts of the calling worker. Entries of other weights stay as
    they are, and so do entries that can't be read. Returns the live workers of the base by name.
    """
    queues = list(dict.fromkeys(map(_queue, cards)))
    peers = read_peers(connection, cards[0].base, queues, worker_name, facts)
    stored = connection.hmget(keys.MODELS, [card.name for card in cards])
    swap = connection.register_script(script_source("swap_card"))
    for card, encoded in zip(cards, stored, strict=True):
        known = _read(card.name, encoded) if encoded is not None else None
        if encoded is None or known is None:
            continue
        if (known.base, known.weights_version) != (card.base, card.weights_version):
            continue
        length = common_length(peers.values(), known)
        if length != known.max_model_len:
            changed = msgspec.structs.replace(known, max_model_len=length)
            swap(args=[card.name, encoded, changed.encode()])
    return peers


class WorkerFollower:
    """Calls `follow_workers` for a worker's heartbeats only when the result may have changed.

    Each call reads what every live worker serves. If every worker did this at every heartbeat, the load on
    Redis would grow with the square of the number of workers, times the number of adapters.
    """

    def __init__(self, worker_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._worker_name = worker_name
        self._clock = clock
        self._followed: object = None
        """The own cards and the context lengths of the live workers at the last call."""
        self._probes: dict[str, str] = {}
        """For each live worker that shares queues with this one, such a queue: it is gone when it drains."""
        self._next_at = 0.0

    def follow(
        self, connection: redis.Redis, cards: Sequence[ModelCard], facts: WorkerFacts, *, is_forced: bool
    ) -> None:
        """Calls `follow_workers` if cards or workers changed, a worker drains, or `FOLLOW_S` have passed."""
        live = read_live(connection, cards[0].base, self._worker_name, facts, self._probes)
        lengths = {name: worker.facts and worker.facts.max_model_len for name, worker in live.items()}
        present = {(card.name, card.weights_version) for card in cards}, lengths
        has_left = any(name in self._probes and not worker.has_probe for name, worker in live.items())
        is_due = is_forced or self._clock() >= self._next_at
        if is_due or has_left or present != self._followed:
            peers = follow_workers(connection, cards, self._worker_name, facts)
            self._followed, self._next_at = present, self._clock() + FOLLOW_S
            self._probes = {name: min(peer.queues) for name, peer in peers.items() if peer.queues}


def repair(connection: redis.Redis, cards: Iterable[ModelCard], *, fill: bool) -> None:
    """Repairs a damaged registry with the cards of a running worker.

    Entries that can't be read are replaced. Missing entries are added only if the whole registry was lost
    (`fill`) or had a wrong type, because an operator may have removed single entries on purpose. If `fill` is
    true and an entry exists, the newer card stays.
    """
    mend(connection, {keys.MODELS: "hash"})
    # If some worker renamed a registry of a wrong type within the last minute, all workers add their cards.
    fill |= connection.pttl(keys.unreadable(keys.MODELS)) > UNREADABLE_TTL_MS - 60_000
    stored = connection.hgetall(keys.MODELS)
    for card in cards:
        encoded = stored.get(card.name.encode())
        known = _read(card.name, encoded) if encoded is not None else None
        is_lost = known is None and (fill or encoded is not None)
        is_older = fill and known is not None and known.created < card.created
        if is_lost or is_older:
            connection.hset(keys.MODELS, card.name, card.encode())


def drop(connection: redis.Redis, names: Iterable[str]) -> None:
    """Removes cards by name; names without a card are ignored."""
    names = list(names)
    if names:
        connection.hdel(keys.MODELS, *names)


def clear(connection: redis.Redis) -> None:
    """Removes all cards, including those that can't be read; also removes a registry of a wrong type."""
    connection.delete(keys.MODELS)


def list_cards(connection: redis.Redis) -> list[ModelCard]:
    """Returns all readable cards: each base, followed by its adapters from the oldest to the newest."""
    return _sorted(connection.hgetall(keys.MODELS))


async def fetch_cards(connection: redis.asyncio.Redis) -> list[ModelCard]:
    """Returns all readable cards, in the order of `list_cards`."""
    return _sorted(await connection.hgetall(keys.MODELS))


async def fetch_card(connection: redis.asyncio.Redis, name: str) -> ModelCard:
    """Returns the card of one model.

    Raises:
        ModelNotFound: no model has this name.
        NotServedYet: no model has this name yet, and the registry is empty or a worker is loading the model.
        LorelayError: the registry's entry for this name can't be read.
    """
    value = await connection.hget(keys.MODELS, name)
    if value is None:
        shown = name if len(name) <= MAX_SHOWN_LENGTH else f"{name[:MAX_SHOWN_LENGTH]}…"
        if not await connection.exists(keys.MODELS):
            raise NotServedYet("No worker has registered a model yet; try again later.")
        if await _is_loading(connection, name):
            raise NotServedYet(f"A worker is loading the model '{shown}'; try again later.")
        raise ModelNotFound(f"The model '{shown}' does not exist.")
    if (card := _read(name, value)) is None:
        raise LorelayError("The registry's entry of this model can't be read; a worker's start replaces it.")
    return card


def begin_loading(connection: redis.Redis, names: Iterable[str], worker_name: str) -> None:
    """Records that a worker loads these models, so that requests for them are answered with `NotServedYet`.

    The record is ignored once the worker has ended; see `_is_loading`.
    """
    mend(connection, {keys.LOADING: "hash"})
    connection.hset(keys.LOADING, mapping=dict.fromkeys(names, worker_name))
    connection.expire(keys.LOADING, LOADING_TTL_S)


def end_loading(connection: redis.Redis, names: Iterable[str]) -> None:
    """Removes the records of `begin_loading`."""
    mend(connection, {keys.LOADING: "hash"})
    connection.hdel(keys.LOADING, *names)


async def _is_loading(connection: redis.asyncio.Redis, name: str) -> bool:
    """True if the worker that last began to load this model still runs and has a record in RQ.

    The result is False if the key has a wrong type. The next worker that starts renames this key.
    """
    try:
        worker = cast("bytes | None", await connection.hget(keys.LOADING, name))
    except redis.ResponseError as error:
        if not is_wrong_type(error):
            raise
        return False
    if worker is None:
        return False
    record = f"{RQ_KEY_PREFIX}:worker:{worker.decode(errors='replace')}"
    birth, death = await connection.hmget(record, ["birth", "death"])
    return birth is not None and death is None


def _read(name: str, encoded: bytes | str) -> ModelCard | None:
    """Decodes a card; returns None if the card can't be read or belongs to another model."""
    try:
        card = decode_card(encoded)
    except (msgspec.DecodeError, RecursionError) as error:
        logger.error("registry entry %r can't be read: %s", name, error, extra=fields("unreadable"))
        return None
    if card.name != name:
        logger.error("registry entry %r is that of %r", name, card.name, extra=fields("unreadable"))
        return None
    if card.adapter_name != name and (card.adapter_name is not None or card.base != name):
        logger.error("registry entry %r names another adapter or base", name, extra=fields("unreadable"))
        return None
    return card


def _sorted(entries: Mapping[Any, bytes | str]) -> list[ModelCard]:
    read = (_read(name.decode(errors="replace"), encoded) for name, encoded in entries.items())
    cards = (card for card in read if card is not None)
    return sorted(cards, key=lambda card: (card.base, card.adapter_name is not None, card.created, card.name))


def _refuse_other_version(card: ModelCard, stored: ModelCard) -> None:
    """Raises `RegistryConflict` if the base or the weights of `card` differ from those of `stored`.

    A base's version is not compared if an earlier release wrote the entry and computed the version in another
    way.
    """
    is_known = bool(card.base_version and stored.base_version)
    is_same = stored.base == card.base
    if is_known or card.adapter_name is not None:
        is_same &= stored.version == card.version
    if is_known:
        is_same &= stored.base_version == card.base_version
    if not is_same:
        raise RegistryConflict(
            f"model {card.name!r} is registered as {_describe(stored)}, this worker has {_describe(card)}; "
            f"give one of them another name, or remove the registered one: "
            f"redis-cli HDEL {keys.MODELS} {card.name!r}"
        )


def _refuse_shared_queues(cards: Iterable[ModelCard]) -> None:
    owners: dict[str, str] = {}
    for card in cards:
        owner = owners.setdefault(_queue(card), card.name)
        if owner != card.name:
            raise RegistryConflict(
                f"models {card.name!r} and {owner!r} would share the queue {_queue(card)!r}; "
                f"give one of them another name"
            )


def _queue(card: ModelCard) -> str:
    return queue_name(card.base, card.adapter_name)


def _describe(card: ModelCard) -> str:
    base_version = f" in version {card.base_version[:12]}" if card.base_version else ""
    return f"version {card.version[:12]} of base {card.base!r}{base_version} from {card.source}"

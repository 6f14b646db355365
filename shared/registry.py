"""Which models exist: written by starting workers, read by every API.

Cards outlive the workers that wrote them: a request for a model whose workers are away waits in its queue.
"""

import time
from collections.abc import Iterable
from typing import cast

import redis
import redis.asyncio
from rq.defaults import RQ_KEY_PREFIX

from shared import keys
from shared.errors import ModelNotFound, RegistryConflict
from shared.messages import ModelCard, decode_card
from shared.queues import queue_name, slug

MAX_SHOWN_LENGTH = 100


def register(connection: redis.Redis, cards: Iterable[ModelCard]) -> None:
    """Adds cards; one that stands there already with the same base and version stays as it is.

    Raises:
        RegistryConflict: a name is known with another base or version, or two names share a queue.
    """
    cards = list(cards)
    _refuse_shared_queues([*list_cards(connection), *cards])
    with connection.pipeline() as pipeline:
        for card in cards:
            pipeline.hsetnx(keys.MODELS, card.name, card.encode())
        for card in cards:
            pipeline.hget(keys.MODELS, card.name)
        replies = pipeline.execute()
    for card, stored in zip(cards, replies[len(cards) :], strict=True):
        _refuse_other_version(card, decode_card(stored))


def drop(connection: redis.Redis, names: Iterable[str]) -> None:
    """Removes cards by name; a name that is not there is no error."""
    names = list(names)
    if names:
        connection.hdel(keys.MODELS, *names)


def list_cards(connection: redis.Redis) -> list[ModelCard]:
    """All cards, oldest first, a base before its adapters."""
    return _sorted(connection.hvals(keys.MODELS))


async def fetch_cards(connection: redis.asyncio.Redis) -> list[ModelCard]:
    """All cards, oldest first, a base before its adapters."""
    return _sorted(await connection.hvals(keys.MODELS))


async def fetch_card(connection: redis.asyncio.Redis, name: str) -> ModelCard:
    """The card of one model.

    Raises:
        ModelNotFound: no model has this name.
    """
    value = await connection.hget(keys.MODELS, name)
    if value is None:
        shown = name if len(name) <= MAX_SHOWN_LENGTH else f"{name[:MAX_SHOWN_LENGTH]}…"
        raise ModelNotFound(f"The model '{shown}' does not exist.")
    return decode_card(value)


async def has_live_worker(connection: redis.asyncio.Redis, base: str, adapter_name: str | None) -> bool:
    """Whether a worker that serves this model renewed its lease lately (by the server's clock)."""
    seconds, _ = await connection.time()
    live = cast(
        "list[bytes]", await connection.zrangebyscore(keys.workers(slug(base)), seconds * 1000, "+inf")
    )
    # By RQ's record, since a worker may have other adapters than the next one, or only some of its queues.
    serving = f"{RQ_KEY_PREFIX}:workers:{queue_name(base, adapter_name)}"
    names = [f"{RQ_KEY_PREFIX}:worker:{name.decode()}" for name in live]
    return bool(names) and any(await connection.smismember(serving, names))


def created_now() -> int:
    """The `created` of a new card: Unix seconds."""
    return int(time.time())


def _sorted(values: Iterable[bytes | str]) -> list[ModelCard]:
    cards = (decode_card(value) for value in values)
    return sorted(cards, key=lambda card: (card.base, card.adapter_name is not None, card.created, card.name))


def _refuse_other_version(card: ModelCard, stored: ModelCard) -> None:
    if (stored.base, stored.version) != (card.base, card.version):
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
    return f"version {card.version[:12]} of base {card.base!r} from {card.source}"

"""The registry on a real server."""

from collections.abc import Callable, Sequence

import msgspec
import pytest
import redis
import redis.asyncio

from lorelay.status import read_status
from lorelay.status_text import to_text
from shared.errors import ConfigurationError, ModelNotFound, NotServedYet, RegistryConflict
from shared.model_cards import ModelCard, WorkerFacts
from shared.queue import keys, presence, registry
from shared.queue.connections import check_server, connect_like, same_server
from shared.queue.fleet import describe_differences
from shared.queue.names import queue_name
from tests.redis_server import RedisServer
from tests.streams import worker_streams

BASE = ModelCard("tiny", "tiny", "/models/tiny", "v1", 100, 512)


def adapter(name: str, base: str = "tiny", version: str = "v1") -> ModelCard:
    return ModelCard(name, base, f"/adapters/{name}", version, 200, 512, name)


def test_cards_are_listed_base_first_and_registering_twice_changes_nothing(connection: redis.Redis) -> None:
    registry.register(connection, [adapter("b"), adapter("a"), BASE])
    registry.register(connection, [BASE, adapter("a")])
    assert [card.name for card in registry.list_cards(connection)] == ["tiny", "a", "b"]


def test_a_name_known_with_another_version_is_refused_and_both_are_shown(connection: redis.Redis) -> None:
    registry.register(connection, [BASE, adapter("a", version="old")])
    with pytest.raises(RegistryConflict, match=r"'a' is registered as version old.*has version new"):
        registry.register(connection, [adapter("a", version="new")])


def test_two_models_that_would_share_a_queue_are_refused(connection: redis.Redis) -> None:
    registry.register(connection, [BASE, adapter("a")])
    with pytest.raises(RegistryConflict, match="share the queue 'tiny-a'"):
        registry.register(connection, [ModelCard("tiny-a", "tiny-a", "/m", "v", 1, 512)])


def test_damaged_entries_are_repaired_and_removed_ones_are_left_alone(connection: redis.Redis) -> None:
    cards = [BASE, adapter("a"), adapter("b")]
    registry.register(connection, cards)
    connection.hset(keys.MODELS, "a", "garbage")
    connection.hdel(keys.MODELS, "b")
    registry.repair(connection, cards, fill=False)
    assert [card.name for card in registry.list_cards(connection)] == ["tiny", "a"]


def test_a_registry_of_another_type_is_filled_by_every_worker_that_sees_it(connection: redis.Redis) -> None:
    connection.set(keys.MODELS, "garbage")
    registry.repair(connection, [BASE], fill=False)
    registry.repair(connection, [adapter("a")], fill=False)
    assert [card.name for card in registry.list_cards(connection)] == ["tiny", "a"]


def test_of_two_versions_that_fill_an_empty_registry_the_newer_stays(connection: redis.Redis) -> None:
    old, new = adapter("a", version="old"), adapter("a", version="new")
    new = msgspec.structs.replace(new, created=old.created + 1)
    for order in ((old, new), (new, old)):
        connection.delete(keys.MODELS)
        for card in order:
            registry.repair(connection, [card], fill=True)
        assert [card.version for card in registry.list_cards(connection)] == ["new"]


@pytest.mark.parametrize("change", [{"adapter_name": None}, {"adapter_name": "b"}, {"name": "b"}])
def test_a_card_that_names_another_model_is_not_read(
    connection: redis.Redis, change: dict[str, str | None]
) -> None:
    registry.register(connection, [BASE])
    connection.hset(keys.MODELS, "a", msgspec.structs.replace(adapter("a"), **change).encode())
    assert registry.list_cards(connection) == [BASE]
    registry.register(connection, [adapter("a")])


def test_entries_of_an_earlier_release_are_replaced_unless_the_adapter_differs(
    connection: redis.Redis,
) -> None:
    registry.register(connection, [BASE, adapter("a")])
    base = msgspec.structs.replace(BASE, version="by other rules", base_version="by other rules")
    mine = msgspec.structs.replace(adapter("a"), base_version=base.version)
    registry.register(connection, [base, mine])
    assert registry.list_cards(connection) == [base, mine]
    connection.hset(keys.MODELS, "a", adapter("a", version="another").encode())
    with pytest.raises(RegistryConflict, match="another"):
        registry.register(connection, [base, mine])


def test_a_base_of_another_version_is_refused(connection: redis.Redis) -> None:
    registry.register(connection, [msgspec.structs.replace(BASE, base_version="v1")])
    with pytest.raises(RegistryConflict, match="'tiny' is registered as version v1"):
        registry.register(connection, [msgspec.structs.replace(BASE, version="v2", base_version="v2")])


def test_a_dropped_card_is_gone(connection: redis.Redis) -> None:
    registry.register(connection, [BASE, adapter("a")])
    registry.drop(connection, ["a", "never-there"])
    assert [card.name for card in registry.list_cards(connection)] == ["tiny"]


async def test_the_api_reads_what_workers_wrote(redis_server: RedisServer, connection: redis.Redis) -> None:
    registry.register(connection, [BASE, adapter("a")])
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        assert await registry.fetch_cards(client) == [BASE, adapter("a")]
        assert await registry.fetch_card(client, "a") == adapter("a")
        with pytest.raises(ModelNotFound, match=r"The model 'x' does not exist."):
            await registry.fetch_card(client, "x")
        with pytest.raises(ModelNotFound, match=r"^The model 'x{100}…' does not exist.$"):
            await registry.fetch_card(client, "x" * 101)


MODELS = [BASE, adapter("a"), adapter("b"), adapter("c", base="other")]


async def served(client: redis.asyncio.Redis, models: Sequence[ModelCard] = MODELS) -> list[str]:
    """The names of the models that live workers serve."""
    found = await presence.find_served(client, models)
    return [model.name for model, is_served in zip(models, found, strict=True) if is_served]


async def test_a_model_is_served_while_a_live_worker_has_its_queue(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    workers = {
        name: worker_streams(connection, name, served=queues)
        for name, queues in {"w1": ("tiny", "tiny-a"), "w2": ("tiny-b",)}.items()
    }
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        assert await served(client) == []
        workers["w1"].renew([])
        assert await served(client) == ["tiny", "a"]
        workers["w2"].renew([])
        assert await served(client) == ["tiny", "a", "b"]
        workers["w2"].serve({})
        assert await served(client) == ["tiny", "a"]
        worker_streams(connection, "w1", lease_s=-1, served=("tiny",)).renew([])
        assert await served(client) == []


async def test_a_model_is_served_only_in_the_version_that_a_live_worker_has(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    old, new = (msgspec.structs.replace(BASE, version=version) for version in ("v1", "v2"))
    worker_streams(connection, "w1", served={"tiny": "v1"}).renew([])
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        assert await presence.find_served(client, [old, new]) == [True, False]
        worker_streams(connection, "w2", served={"tiny": ""}).renew([])
        assert await presence.find_served(client, [old, new]) == [True, True]


async def test_keys_of_a_wrong_type_count_as_no_worker(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    worker_streams(connection, "w1", served=("tiny",)).renew([])
    connection.set(keys.workers("other"), "garbage")
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        assert await served(client) == ["tiny"]
        connection.set(keys.served("w1"), "garbage")
        assert await served(client) == []


async def test_a_model_that_a_worker_loads_is_not_refused_as_unknown(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        with pytest.raises(NotServedYet, match="No worker has registered a model yet"):
            await registry.fetch_card(client, "tiny")
        registry.register(connection, [BASE])
        registry.begin_loading(connection, ["other", "a"], "w1")
        connection.hset("rq:worker:w1", "birth", "now")
        for name in ("other", "a"):
            with pytest.raises(NotServedYet, match=f"A worker is loading the model '{name}'"):
                await registry.fetch_card(client, name)
        assert await registry.fetch_card(client, "tiny") == BASE
        registry.end_loading(connection, ["other"])
        with pytest.raises(ModelNotFound):
            await registry.fetch_card(client, "other")
        connection.hset("rq:worker:w1", "death", "now")
        with pytest.raises(ModelNotFound):
            await registry.fetch_card(client, "a")


def register_worker(
    connection: redis.Redis, name: str, cards: Sequence[ModelCard], facts: WorkerFacts | None
) -> Callable[[], object]:
    """Starts a worker as `LoraWorker` does; returns the part of its heartbeat that concerns the registry.

    Without facts, it is a worker of the release before.
    """
    queues = [queue_name(card.base, card.adapter_name) for card in cards]
    worker_streams(connection, name, served=queues).renew([])
    registry.register(connection, cards)
    if facts is None:
        return lambda: None
    connection.hset(f"rq:worker:{name}", "facts", facts.encode())
    registry.follow_workers(connection, cards, name, facts)
    return lambda: registry.follow_workers(connection, cards, name, facts)


def leave(connection: redis.Redis, name: str) -> None:
    """Ends a worker's lease."""
    worker_streams(connection, name, lease_s=-1).renew([])


def lengths(connection: redis.Redis) -> dict[str, int]:
    return {card.name: card.max_model_len for card in registry.list_cards(connection)}


def with_length(length: int, *cards: ModelCard) -> list[ModelCard]:
    return [msgspec.structs.replace(card, max_model_len=length) for card in cards]


@pytest.mark.parametrize(("old", "new"), [(4096, 8192), (8192, 4096)])
def test_the_registered_length_is_that_of_the_worker_that_replaced_another(
    connection: redis.Redis, old: int, new: int
) -> None:
    register_worker(connection, "old", with_length(old, BASE, adapter("a")), WorkerFacts(old))
    leave(connection, "old")
    register_worker(connection, "new", with_length(new, BASE, adapter("a")), WorkerFacts(new))
    assert lengths(connection) == {"tiny": new, "a": new}


@pytest.mark.parametrize("ends_by", [leave, lambda c, name: worker_streams(c, name, served={})])
def test_the_registered_length_is_the_shortest_of_the_live_workers_of_each_model(
    connection: redis.Redis, ends_by: Callable[[redis.Redis, str], object]
) -> None:
    register_worker(connection, "short", with_length(4096, BASE), WorkerFacts(4096))
    beat = register_worker(connection, "long", with_length(8192, BASE, adapter("a")), WorkerFacts(8192))
    assert lengths(connection) == {"tiny": 4096, "a": 8192}
    ends_by(connection, "short")
    beat()
    assert lengths(connection) == {"tiny": 8192, "a": 8192}


def test_a_worker_of_the_release_before_keeps_the_length_that_it_registered(connection: redis.Redis) -> None:
    register_worker(connection, "old", with_length(4096, BASE), None)
    beat = register_worker(connection, "new", with_length(8192, BASE), WorkerFacts(8192))
    assert lengths(connection) == {"tiny": 4096}
    leave(connection, "old")
    beat()
    assert lengths(connection) == {"tiny": 8192}


def test_entries_of_other_weights_or_changed_meanwhile_are_left_alone(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat = register_worker(connection, "w", with_length(8192, BASE), WorkerFacts(8192))
    other = msgspec.structs.replace(BASE, version="v2")
    connection.hset(keys.MODELS, "tiny", other.encode())
    beat()
    assert registry.list_cards(connection) == [other]
    stale = with_length(99, BASE)[0].encode()
    monkeypatch.setattr(connection, "hmget", lambda *_: [stale])
    beat()
    assert registry.list_cards(connection) == [other]


def test_a_worker_is_told_in_which_ways_live_workers_of_its_base_differ(connection: redis.Redis) -> None:
    for name, facts in {"w1": WorkerFacts(4096, "float32"), "w2": None}.items():
        register_worker(connection, name, [BASE], facts)
    own = WorkerFacts(8192, "bfloat16")
    peers = registry.follow_workers(connection, [BASE], "own", own)
    assert describe_differences(peers, "own", own) == [
        "worker w1 of the same base has max_model_len 4096, this one 8192",
        "worker w1 of the same base has dtype float32, this one bfloat16",
    ]
    leave(connection, "w1")
    peers = registry.follow_workers(connection, [BASE], "own", own)
    assert describe_differences(peers, "own", own) == []


async def test_keys_of_a_wrong_type_end_no_worker_and_are_mended(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    registry.register(connection, [BASE])
    leases = keys.workers("tiny")
    for key in (leases, keys.served("own"), "rq:worker:own", keys.LOADING):
        connection.set(key, "garbage")
    follower = registry.WorkerFollower("own")
    for _ in range(2):
        follower.follow(connection, [BASE], WorkerFacts(512), is_forced=True)
        # A live worker, so that the follower reads what it serves, too.
        connection.zadd(leases, {"own": "inf"})
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        with pytest.raises(ModelNotFound):
            await registry.fetch_card(client, "other")
    registry.end_loading(connection, ["tiny"])
    assert connection.type(leases) == b"zset"
    assert connection.type(keys.LOADING) == b"none"
    assert registry.list_cards(connection) == [BASE]


def num_reads(connection: redis.Redis, *, by: Callable[[], None]) -> int:
    """The number of reads of what a worker serves, or of several cards, that `by` makes."""
    connection.config_resetstat()
    by()
    stats = connection.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("hmget", "hgetall"))


def test_a_heartbeat_reads_what_others_serve_only_if_the_live_workers_changed_or_after_a_while(
    connection: redis.Redis,
) -> None:
    now, cards = 0.0, with_length(8192, BASE, adapter("a"))
    register_worker(connection, "own", cards, WorkerFacts(8192))
    follower = registry.WorkerFollower("own", clock=lambda: now)

    def beat(*, is_forced: bool = False) -> int:
        facts = WorkerFacts(8192, num_reads=int(now))
        return num_reads(
            connection, by=lambda: follower.follow(connection, cards, facts, is_forced=is_forced)
        )

    assert [beat() > 0 for _ in range(3)] == [True, False, False]
    register_worker(connection, "short", with_length(4096, BASE), WorkerFacts(4096))
    assert [beat() > 0 for _ in range(2)] == [True, False]
    connection.hset("rq:worker:short", "facts", WorkerFacts(2048).encode())
    assert [beat() > 0 for _ in range(2)] == [True, False]
    assert lengths(connection) == {"tiny": 2048, "a": 8192}
    worker_streams(connection, "short", served={})  # it drains
    assert [beat() > 0 for _ in range(2)] == [True, False]
    assert lengths(connection) == {"tiny": 8192, "a": 8192}
    now = registry.FOLLOW_S - 1
    assert beat() == 0
    now = registry.FOLLOW_S
    assert [beat() > 0 for _ in range(2)] == [True, False]
    cards.pop()
    assert [beat() > 0 for _ in range(2)] == [True, False]
    assert beat(is_forced=True) > 0
    leave(connection, "short")
    assert [beat() > 0 for _ in range(2)] == [True, False]


def test_a_server_without_the_commands_of_6_2_is_refused(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_server(connection)
    monkeypatch.setattr(connection, "info", lambda _: {"redis_version": "6.0.16"})
    with pytest.raises(ConfigurationError, match=r"Redis 6\.0\.16 is too old"):
        check_server(connection)


def test_connections_know_whether_they_lead_to_the_same_server(redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_server.url) as client, redis.Redis.from_url("redis://h/1") as tcp:
        assert same_server(redis_server.url, client)
        assert not same_server("redis://localhost:6379", client)
        assert same_server("redis://h:6379/1", tcp)
        assert not same_server("redis://h:6379/2", tcp)
        with connect_like(client, socket_timeout_s=1) as other:
            assert other.ping()
            assert other.connection_pool.connection_kwargs["socket_timeout"] == 1


UNREADABLE = {
    "no JSON": ("broken", b"garbage"),
    "no text": ("broken", b"\xff\xfe"),
    "another shape": ("broken", b'{"name": 7}'),
    "deeply nested": ("broken", b"[" * 9_999),
    "the card of another model": ("broken", BASE.encode()),
    "a name that is no text": (b"\xff", BASE.encode()),
}


@pytest.mark.parametrize(("name", "encoded"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_card_is_skipped_and_logged_by_name_wherever_cards_are_read(
    connection: redis.Redis, caplog: pytest.LogCaptureFixture, name: str | bytes, encoded: bytes
) -> None:
    connection.hset(keys.MODELS, name, encoded)
    registry.register(connection, [BASE, adapter("a")])
    registry.repair(connection, [BASE, adapter("a")], fill=True)
    assert [card.name for card in registry.list_cards(connection)] == ["tiny", "a"]
    status = to_text(read_status(connection))
    assert "tiny" in status
    shown = name if isinstance(name, str) else name.decode(errors="replace")
    assert f"registry entry {shown!r}" in caplog.text
    assert connection.hget(keys.MODELS, name) == encoded


@pytest.mark.parametrize("kind", ["unreadable cards", "a key of another type"])
def test_all_cards_are_cleared_whatever_they_are(connection: redis.Redis, kind: str) -> None:
    if kind == "unreadable cards":
        connection.hset(keys.MODELS, mapping={"a": "garbage", "tiny": BASE.encode()})
    else:
        connection.set(keys.MODELS, "garbage")
    registry.clear(connection)
    assert registry.list_cards(connection) == []


def test_the_card_of_an_earlier_release_gets_the_bound_on_bytes(connection: redis.Redis) -> None:
    card = ModelCard("m", "m", "folder", "v", 1, max_model_len=64, base_version="v")
    registry.register(connection, [card])
    bounded = msgspec.structs.replace(card, max_token_bytes=4)
    registry.register(connection, [msgspec.structs.replace(bounded, created=9)])
    assert registry.list_cards(connection) == [bounded]

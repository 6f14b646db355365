"""Garbles records in Redis: those of one request, which may then fail, or those that all requests share."""

import random

import redis

from shared.queue import keys
from shared.queue.names import slug
from tests.chaos.cluster import BASE, Cluster

_AS_STRING = "redis.call('DEL', KEYS[1]) redis.call('SET', KEYS[1], 'garbage')"
_SET_FIELD = "redis.call('HSET', KEYS[1], ARGV[1], 'garbage')"
# Only while the request waits or runs: nothing removes a record that is written after its end.
_IF_OPEN = """
local status = redis.call('HGET', ARGV[2], 'status')
if status ~= 'queued' and status ~= 'started' then return 0 end
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
%s
return 1
"""
JOB, OWNER, LOG = "rq:job:", keys.owner(""), keys.log("")
OF_A_REQUEST = {
    "a job of another type": (JOB, _AS_STRING, ""),
    "a job of no schema": (JOB, _SET_FIELD, "schema_version"),
    "a job without its request": (JOB, _SET_FIELD, "request"),
    "an owner of another type": (OWNER, _AS_STRING, ""),
    "an owner of another queue": (OWNER, _SET_FIELD, "queue"),
    "a log of another type": (LOG, _AS_STRING, ""),
    "a log with one entry too many": (LOG, "redis.call('RPUSH', KEYS[1], 'garbage')", ""),
    "a log that lost its end": (LOG, "redis.call('RPOP', KEYS[1])", ""),
}
SHARED = (keys.leases, keys.waiting, keys.order, keys.doorbell, keys.workers, keys.judged, keys.backlog)


def garble_request(cluster: Cluster, rng: random.Random, garbled: set[str]) -> None:
    """Garbles one record of a request that waits or runs; adds its id to `garbled` before that."""
    kind, known = rng.choice(sorted(OF_A_REQUEST)), sorted(cluster.known_ids())
    if not known:
        return
    request_id = rng.choice(known)
    prefix, effect, field = OF_A_REQUEST[kind]
    script = cluster.connection.register_script(_IF_OPEN % effect)
    garbled.add(request_id)
    if not script(keys=[f"{prefix}{request_id}"], args=[field, f"{JOB}{request_id}"]):
        garbled.remove(request_id)


def garble_shared(connection: redis.Redis, rng: random.Random) -> None:
    """Replaces a key that all requests share with a string."""
    key = rng.choice(SHARED)(slug(BASE))
    connection.register_script(_AS_STRING)(keys=[key])

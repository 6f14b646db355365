"""Hostile clients with an API key of their own, and stock workers, each beside a deployment for a while."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable

from bench.hostile_inputs import BODIES, HEADS, LONG_PROMPTS, NOT_READ, Crowd, Target
from tests.chaos.cluster import BASE, Cluster

HOSTILE_KEY = "sk-hostile"
NUM_LONG_WORDS = 70
"""Number of words of a prompt that just fits the context of the tiny model."""
NUM_LONG_TOKENS = 100
MIN_STAY_S, MAX_STAY_S = 0.5, 1.5
SERIALIZERS = (("-S", "json"), ())
"""Options of stock workers: with the first they can read our jobs, with the other they can't."""


class Neighbors:
    """Plays one neighbor at a time; each method returns when its neighbor is gone."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self.ways: Counter[str] = Counter()
        """Number of hostile connections by the way in which they ended, as `Crowd.play` counts them."""

    def run_stock_worker(self) -> None:
        """Runs `rq worker --burst` without Lorelay's worker class on our queue, again and again."""
        options, end = self._rng.choice(SERIALIZERS), time.monotonic() + self._stay_s()
        while time.monotonic() < end:
            self._cluster.run_stock_worker(*options)

    def send_hostile_bodies(self) -> None:
        """Sends bodies or heads that are as costly as a client can make them."""
        self._play(BODIES | HEADS, num_connections=2)

    def read_nothing(self) -> None:
        """Asks for answers, and reads none of them, or only their beginning."""
        self._play(NOT_READ, num_connections=4)

    def flood(self) -> None:
        """Sends prompts that fill the context, or exceed it."""
        self._play(LONG_PROMPTS, num_connections=16)

    def _play(self, names: Iterable[str], num_connections: int) -> None:
        target = Target(self._cluster.api.url, BASE, HOSTILE_KEY, NUM_LONG_WORDS, NUM_LONG_TOKENS)
        crowd = Crowd(target, [self._rng.choice(sorted(names))], num_connections)
        self.ways += asyncio.run(crowd.play(asyncio.sleep(self._stay_s())))

    def _stay_s(self) -> float:
        return self._rng.uniform(MIN_STAY_S, MAX_STAY_S)

"""Measurements of Lorelay itself: each stage starts a deployment, measures it, and ends it."""

import asyncio
import itertools
import os
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rq.job import Job
from rq.serializers import JSONSerializer

from bench import served
from bench.adapters import ALL_PROJECTIONS, ATTENTION
from bench.deployment import ROOT, Deployment, Uvicorn
from bench.load import LoadFailed
from bench.scripted import Meter
from bench.served import Server, Sizes, measure, measure_idle
from bench.sink import take_streams
from bench.watched import Watch
from bench.yardstick import Figure
from shared.queue.scripts import script_source

SUBPROCESS_LIMIT_S = 900
LORA_WORKER = "worker.LoraWorker"
SCRIPTED = "bench.scripted.ScriptedWorker"
METERED = "bench.scripted.MeteredWorker"
WATCHED = "bench.watched.WatchedWorker"
STEP_S = 0.02
CPU_TICK_S = 0.01
"""Resolution of a process's CPU time, in seconds."""
NUM_SLOW_LOG_ENTRIES = 10_000
SLOW_US = 10
"""Threshold of the server's slow log, in microseconds: scripts exceed it, the commands inside them do not.

If each command inside a script were logged, too, the scripts would be slower than without the log."""


@dataclass(frozen=True)
class OwnSizes(Sizes):
    """Amount of work in the measurements of Lorelay itself."""

    num_adapters: int = 8
    rank: int = 16
    num_small_adapters: int = 64
    num_registered: int = 1000
    num_asked: int = 100
    num_idle_requests: int = 50
    num_loads: int = 24
    num_load_prompt_words: int = 10
    """Number of words; small, because the prefill of a long prompt would hide the time that a load adds."""
    num_relay_streams: int = 256
    num_relay_tokens: int = 512
    script_batch: int = 32
    num_script_tokens: int = 128
    num_waves: int = 6
    """Number of requests of a measurement, as a multiple of the sum of all scripted workers' batch sizes."""


@dataclass
class Context:
    """Settings and results that the stages share."""

    folder: Path
    """Temporary folder."""
    settings: Mapping[str, str]
    """Settings of all deployments: model, device, dtype."""
    sizes: OwnSizes
    wanted: frozenset[str]
    given_adapters: Mapping[str, str] = field(default_factory=dict)
    """Adapters that the user gave, to be used instead of random adapters."""
    floors: dict[int, list[float]] = field(default_factory=dict)
    """All measured values of F(batch) in tokens/s, by batch size."""
    forward_states: set[str] = field(default_factory=set)
    """Forward states of the workers that were measured."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def device(self) -> str:
        """Device on which F is measured."""
        return self.settings["device"].replace("auto", "cpu")

    def floor(self, batch: int) -> float:
        """Returns F(batch) in tokens/s, which is measured at each call on a CPU, and once on a GPU."""
        if self.device != "cpu" and batch in self.floors:
            return self.floors[batch][-1]
        options = ["--model", self.settings["model"], "--batch", str(batch), "--device", self.device]
        speed = float(self.ask("bench.floor", *options)["tokens_per_s"])
        self.floors.setdefault(batch, []).append(speed)
        return speed

    @contextmanager
    def deploy(
        self, worker_class: str = LORA_WORKER, *, num_workers: int = 1, **settings: str
    ) -> Iterator[Deployment]:
        """Runs a deployment until the context ends."""
        folder = self.folder / f"deployment-{next(self._numbers)}"
        with Deployment(
            folder, {**self.settings, **settings}, num_workers=num_workers, worker_class=worker_class
        ) as deployment:
            yield deployment
            # A compiled forward pass may be dropped during the run, so the states are read at the end.
            self.forward_states |= deployment.forward_states()

    def make_adapters(self, count: int, rank: int, targets: Sequence[str]) -> dict[str, str]:
        """Writes random adapters to disk; returns their folders by name."""
        folder = self.folder / f"adapters-{next(self._numbers)}"
        options = ["--model", self.settings["model"], "--folder", str(folder), "--count", str(count)]
        self.run("bench.adapters", *options, "--rank", str(rank), "--targets", ",".join(targets))
        return {f"a{n}": str(folder / f"a{n}") for n in range(count)}

    def ask(self, module: str, *arguments: str, **settings: str) -> Any:
        """Runs a module in a separate process; returns its output, decoded from JSON."""
        return msgspec.json.decode(self.run(module, *arguments, **settings).splitlines()[-1])

    def run(self, module: str, *arguments: str, **settings: str) -> bytes:
        """Runs a module in a separate process; returns its output."""
        variables = {f"LORELAY_{name.upper()}": value for name, value in settings.items()}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            timeout=SUBPROCESS_LIMIT_S,
            check=True,
        ).stdout


class Stage(NamedTuple):
    """Measurements that share a deployment."""

    keys: frozenset[str]
    measure: Callable[[Context], Iterator[Figure]]


def mixed_batches(context: Context) -> Iterator[Figure]:
    """Measures batches of eight adapters on all projections, and other figures of the same deployment."""
    sizes = context.sizes
    if context.device != "cpu":  # F must come first, because a worker takes nearly all of the GPU's memory
        for keys, batch in ((served.SPEED_KEYS, sizes.concurrency), ({"stream"}, 1)):
            if keys & context.wanted:
                context.floor(batch)
    adapters = context.given_adapters or context.make_adapters(
        sizes.num_adapters, sizes.rank, ALL_PROJECTIONS
    )
    settings = {
        "adapters": adapters_setting(adapters),
        "max_batch_size": str(sizes.concurrency + sizes.num_long_prompts),
    }
    with context.deploy(LORA_WORKER, num_workers=1, **settings) as deployment:
        server = Server(deployment.url, deployment.base_name, tuple(adapters))
        yield from served.figures(server, sizes, context.wanted, context.floor)
        if "pickup" in context.wanted:
            yield _pickup(deployment, server, sizes)
        if "tax" in context.wanted:
            speed = measure(server, server.load(server.adapters, sizes)).tokens_per_s
    if "tax" in context.wanted:
        yield served.ratio("tax", speed, _direct_speed(context, settings, server))


def _pickup(deployment: Deployment, server: Server, sizes: OwnSizes) -> Figure:
    """Measures how much API and Redis add to the time to first token (client's time - engine's time)."""
    answers = asyncio.run(measure_idle(server, [server.base] * sizes.num_idle_requests, sizes))
    streams = [stream for stream in answers if stream.text_at_s]
    with deployment.connect() as connection:
        metas = [Job.fetch(stream.request_id, connection, JSONSerializer).meta for stream in streams]
    added_s = [
        stream.first_text_s - meta["first_token_s"] for stream, meta in zip(streams, metas, strict=True)
    ]
    in_engine_ms = statistics.median(meta["first_token_s"] for meta in metas) * 1e3
    return Figure("pickup", statistics.median(added_s) * 1e3, f"added to {in_engine_ms:.0f} ms in the engine")


def _direct_speed(context: Context, settings: Mapping[str, str], server: Server) -> float:
    """Returns the tokens/s of the same load on the engine alone, without API and Redis."""
    sizes = context.sizes
    options = ["--models", ",".join(server.adapters), "--concurrency", str(sizes.concurrency)]
    options += ["--requests", str(sizes.num_requests), "--max-tokens", str(sizes.max_tokens)]
    options += ["--prompt-words", str(sizes.num_prompt_words)]
    result = context.ask("bench.direct", *options, **{**context.settings, **settings})
    context.forward_states.add(result["forward"])
    return float(result["tokens_per_s"])


def many_adapters(context: Context) -> Iterator[Figure]:
    """Measures batches in which every request uses a different adapter."""
    sizes = context.sizes
    count = sizes.num_small_adapters
    adapters = context.make_adapters(count, 8, ATTENTION)
    wide = replace(sizes, concurrency=count, num_requests=4 * count)
    with context.deploy(adapters=adapters_setting(adapters), max_batch_size=str(count)) as deployment:
        yield _compare("many-base", deployment, list(adapters), [deployment.base_name], wide)


def thousand_adapters(context: Context) -> Iterator[Figure]:
    """Measures a thousand registered adapters, of which a tenth are requested, by Zipf's law."""
    sizes = context.sizes
    adapters = context.make_adapters(sizes.num_registered, 8, ATTENTION)
    asked = list(adapters)[: sizes.num_asked]
    weights = [1 / rank for rank in range(1, len(asked) + 1)]
    models = random.Random(0).choices(asked, weights, k=sizes.num_requests)
    with context.deploy(adapters=adapters_setting(adapters)) as deployment:
        yield _compare("thousand", deployment, models, asked[:1], sizes)


def _compare(
    key: str, deployment: Deployment, models: Sequence[str], others: Sequence[str], sizes: Sizes
) -> Figure:
    """Measures the ratio of the speed on `models` to the speed on `others`."""
    server = Server(deployment.url, deployment.base_name)
    served.warm_up(server, [*others, *models[: sizes.concurrency]], sizes)
    speeds = [measure(server, server.load(chosen, sizes)).tokens_per_s for chosen in (models, others)]
    return served.ratio(key, *speeds)


def adapter_loads(context: Context) -> Iterator[Figure]:
    """Measures the time to first token of adapters that are not on the device."""
    adapters = context.make_adapters(2, context.sizes.rank, ALL_PROJECTIONS)
    if "cached" in context.wanted:
        yield _added_by_loads("cached", context, adapters, num_reads=0)
    if "disk" in context.wanted:
        num_loads = context.sizes.num_loads
        yield _added_by_loads("disk", context, adapters, num_reads=num_loads, max_cached_adapter_bytes="1")


def _added_by_loads(
    key: str, context: Context, adapters: Mapping[str, str], *, num_reads: int, **settings: str
) -> Figure:
    """Measures how much an adapter load adds to the time to first token.

    Two adapters take turns and evict each other from the only slot. In each turn, the base gets one request,
    then the adapter gets two: the first request loads the adapter, and the second one finds it in the slot.

    Raises:
        LoadFailed: a request failed, or the number of adapters read from disk is not `num_reads`.
    """
    sizes = replace(context.sizes, num_prompt_words=context.sizes.num_load_prompt_words)
    watch_file = context.folder / f"{key}.json"
    settings |= {"max_resident_adapters": "1", "bench_watch_file": str(watch_file)}
    with context.deploy(
        WATCHED, num_workers=1, adapters=adapters_setting(adapters), **settings
    ) as deployment:
        server = Server(deployment.url, deployment.base_name)
        served.warm_up(server, [server.base], sizes)
        # At the start, the first adapter was put into the slot, so the turns begin with the second.
        turns = itertools.islice(itertools.cycle(reversed(list(adapters))), sizes.num_loads)
        models = [model for adapter in turns for model in (server.base, adapter, adapter)]
        streams = asyncio.run(measure_idle(server, models, sizes))
    watch = msgspec.json.decode(watch_file.read_bytes(), type=Watch)
    if watch.after.num_reads != num_reads:
        raise LoadFailed(f"{watch.after.num_reads} instead of {num_reads} adapters came from disk")
    base_ms, loaded_ms, resident_ms = (
        statistics.median(stream.first_text_s for stream in streams[place::3] if stream.text_at_s) * 1e3
        for place in range(3)
    )
    detail = f"to {base_ms:.0f} ms without adapter; a resident adapter adds {resident_ms - base_ms:.1f} ms"
    return Figure(key, loaded_ms - base_ms, detail)


def relay(context: Context) -> Iterator[Figure]:
    """Compares the API's CPU time per token with that of an app that only streams."""
    sizes = context.sizes
    num_streams, num_tokens = sizes.num_relay_streams, sizes.num_relay_tokens

    def tokens_per_cpu_s(api: Uvicorn) -> float:
        asyncio.run(take_streams(api.url, model, num_streams, 8))
        started_s = api.cpu_s()
        asyncio.run(take_streams(api.url, model, num_streams, num_tokens))
        return num_streams * num_tokens / max(api.cpu_s() - started_s, CPU_TICK_S)

    with context.deploy(SCRIPTED, max_batch_size=str(num_streams)) as deployment:
        model = deployment.base_name
        own = tokens_per_cpu_s(deployment.api)
    with Uvicorn("bench.bare:create_app", context.folder / "bare.log") as bare_app:
        bare = tokens_per_cpu_s(bare_app)
    yield Figure("relay", own / bare, f"{own:.0f} of {bare:.0f} tokens/CPU-second")


def workers(context: Context) -> Iterator[Figure]:
    """Measures the throughput of the queue, with workers that sleep instead of computing."""
    speeds = []
    for num_workers in (4, 1):
        batch = 4
        sizes = replace(
            context.sizes,
            concurrency=2 * batch * num_workers,
            num_requests=context.sizes.num_waves * batch * num_workers,
        )
        with context.deploy(
            SCRIPTED, num_workers=num_workers, max_batch_size=str(batch), bench_step_s=str(STEP_S)
        ) as deployment:
            server = Server(deployment.url, deployment.base_name)
            served.warm_up(server, [server.base], sizes)
            speeds.append(measure(server, server.load([server.base], sizes)).tokens_per_s)
    yield served.ratio("workers", *speeds)


def redis_costs(context: Context) -> Iterator[Figure]:
    """Measures the CPU time of the engine's thread in Redis code, and Redis's time for `append.lua`."""
    batch, num_tokens = context.sizes.script_batch, context.sizes.num_script_tokens
    meter_file = context.folder / "meter.json"
    with context.deploy(
        METERED, max_batch_size=str(batch), bench_step_s=str(STEP_S), bench_meter_file=str(meter_file)
    ) as deployment:
        with deployment.connect() as connection:
            sha = str(connection.register_script(script_source("append")).sha)
            connection.config_set("slowlog-max-len", NUM_SLOW_LOG_ENTRIES)
            connection.config_set("slowlog-log-slower-than", SLOW_US)
            asyncio.run(take_streams(deployment.url, deployment.base_name, batch, num_tokens))
            entries = connection.slowlog_get(NUM_SLOW_LOG_ENTRIES)
        times_ms = [entry["duration"] / 1e3 for entry in entries if sha.encode() in entry["command"]]
    meter = msgspec.json.decode(meter_file.read_bytes(), type=Meter)
    yield Figure(
        "engine-redis",
        meter.engine_cpu_s / meter.num_steps * 1e3,
        f"{meter.num_engine_calls} calls in {meter.num_steps} steps; all other threads "
        f"{meter.other_cpu_s / meter.num_steps * 1e3:.2f} ms a step in {meter.num_other_calls} calls",
    )
    yield Figure("append", statistics.median(times_ms), f"the server's SLOWLOG, {len(times_ms)} calls")


STAGES = (
    Stage(served.KEYS | {"tax", "pickup"}, mixed_batches),
    Stage(frozenset({"many-base"}), many_adapters),
    Stage(frozenset({"cached", "disk"}), adapter_loads),
    Stage(frozenset({"thousand"}), thousand_adapters),
    Stage(frozenset({"relay"}), relay),
    Stage(frozenset({"workers"}), workers),
    Stage(frozenset({"engine-redis", "append"}), redis_costs),
)


def adapters_setting(adapters: Mapping[str, str]) -> str:
    """Returns the value of `LORELAY_ADAPTERS` for these adapters."""
    return " ".join(shlex.quote(f"{name}={path}") for name, path in adapters.items())

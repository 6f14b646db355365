"""Measurements of any OpenAI-compatible server, made by its clients."""

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

from bench.load import IGNORE_EOS, Client, Load, LoadFailed, LoadResult, Stream, checked, prompts, run
from bench.yardstick import Figure

SPEED_KEYS = frozenset({"base", "mixed", "mixed-base", "ttft"})
KEYS = SPEED_KEYS | {"stream", "gap"}
NUM_GAPS_BEFORE = 20
"""Number of inter-token latencies per stream, before the long prompts arrive, that give the median."""
POLL_S = 0.02
LIMIT_S = 300.0


@dataclass(frozen=True)
class Sizes:
    """Amount of work in the measurements."""

    concurrency: int = 16
    num_requests: int = 64
    max_tokens: int = 64
    num_prompt_words: int = 90
    num_alone: int = 4
    """Number of requests, sent one after the other, that measure the speed of one stream."""
    num_alone_rounds: int = 3
    """Number of measurements of one stream's speed, each between two measurements of F(1); the result is the
    median."""
    num_long_prompts: int = 16
    num_long_prompt_words: int = 960
    """Number of words in a long prompt, which has about 1,000 tokens."""
    max_running_tokens: int = 4000
    """Maximum number of tokens of each stream that runs while long prompts arrive.

    The streams are aborted once the prompts are answered."""


@dataclass(frozen=True)
class Server:
    """A server to measure."""

    url: str
    """URL without `/v1`."""
    base: str
    adapters: Sequence[str] = ()
    api_key: str = "none"
    extra: Mapping[str, Any] = field(default_factory=lambda: IGNORE_EOS)
    _seeds: Iterator[int] = field(default_factory=lambda: itertools.count(10))

    def load(self, models: Sequence[str], sizes: Sizes) -> Load:
        """Returns a benchmark load on these models in turn, with prompts that are in no prefix cache yet."""
        return Load(
            models=models,
            num_requests=sizes.num_requests,
            concurrency=sizes.concurrency,
            max_tokens=sizes.max_tokens,
            num_prompt_words=sizes.num_prompt_words,
            extra=self.extra,
            seed=next(self._seeds),
        )


def figures(
    server: Server, sizes: Sizes, wanted: AbstractSet[str], floor: Callable[[int], float]
) -> Iterator[Figure]:
    """Yields the measurements that work on any server; `floor` measures F(batch), in tokens/s.

    Each speed is divided by the mean of two values of F, measured before and after it. One value is not
    enough, because other processes take memory bandwidth, which changes F(1) by a third within minutes.

    Raises:
        LoadFailed: a request failed.
    """
    warm_up(server, [server.base, *server.adapters], sizes)
    if wanted & SPEED_KEYS:
        before = floor(sizes.concurrency)
        base = measure(server, server.load([server.base], sizes)).tokens_per_s
        after = floor(sizes.concurrency)
        yield ratio("base", base, statistics.mean((before, after)))
        if server.adapters:
            mixed = measure(server, server.load(server.adapters, sizes))
            before, after = after, floor(sizes.concurrency)
            yield ratio("mixed", mixed.tokens_per_s, statistics.mean((before, after)))
            yield ratio("mixed-base", mixed.tokens_per_s, base)
            yield Figure("ttft", mixed.first_text_p50_s, f"then a token every {mixed.gap_p50_s * 1e3:.0f} ms")
    if "stream" in wanted:
        yield _one_stream(server, sizes, floor)
    if "gap" in wanted:
        gaps = measure_gaps(server, sizes)
        detail = f"{gaps.longest_s * 1e3:.0f} ms, {gaps.median_before_s * 1e3:.0f} ms before"
        yield Figure("gap", gaps.longest_s / gaps.median_before_s, detail)


def _one_stream(server: Server, sizes: Sizes, floor: Callable[[int], float]) -> Figure:
    figures = []
    before = floor(1)
    for _ in range(sizes.num_alone_rounds):
        alone = replace(server.load([server.base], sizes), concurrency=1, num_requests=sizes.num_alone)
        speed = measure(server, alone).tokens_per_s
        after = floor(1)
        figures.append(ratio("stream", speed, statistics.mean((before, after))))
        before = after
    return sorted(figures, key=lambda figure: figure.value or 0)[len(figures) // 2]


def ratio(key: str, speed: float, other: float) -> Figure:
    """Returns `speed` ÷ `other`, both in tokens/s, as a figure."""
    return Figure(key, speed / other, f"{speed:.0f} of {other:.0f} tokens/s")


def warm_up(server: Server, models: Sequence[str], sizes: Sizes) -> None:
    """Warms the server up with a request to each model, and with one full batch."""
    brief = replace(sizes, num_requests=max(sizes.concurrency, len(models)), max_tokens=4)
    measure(server, server.load(models, brief))


def measure(server: Server, load: Load) -> LoadResult:
    """Runs a benchmark load on a server.

    Raises:
        LoadFailed: a request failed.
    """
    return checked(asyncio.run(run(server.url, load, api_key=server.api_key)))


@dataclass(frozen=True)
class Gaps:
    """Inter-token latencies of running streams."""

    median_before_s: float
    longest_s: float
    """Maximum inter-token latency while long prompts arrived and were answered."""


def measure_gaps(server: Server, sizes: Sizes) -> Gaps:
    """Measures the inter-token latencies of running streams while many long prompts arrive at once.

    Raises:
        LoadFailed: a request failed, or the streams ended before the prompts were answered.
    """
    return asyncio.run(_measure_gaps(server, sizes))


async def _measure_gaps(server: Server, sizes: Sizes) -> Gaps:
    models = list(server.adapters) or [server.base]
    num_connections = sizes.concurrency + sizes.num_long_prompts
    texts, long_texts = prompts(1, sizes.num_prompt_words), prompts(2, sizes.num_long_prompt_words)
    async with (
        Client(server.url, api_key=server.api_key, max_num_connections=num_connections) as client,
        asyncio.timeout(LIMIT_S),
        contextlib.AsyncExitStack() as stack,
    ):
        streams = [Stream(models[n % len(models)], 0.0) for n in range(sizes.concurrency)]
        for stream in streams:
            extra = without_end_tokens(server.extra, sizes.max_running_tokens)
            task = asyncio.create_task(
                client.stream(stream.model, next(texts), sizes.max_running_tokens, extra, stream)
            )
            stack.push_async_callback(_disconnect, task)
        while min(len(stream.text_at_s) for stream in streams) <= NUM_GAPS_BEFORE:
            _check_running(streams)
            await asyncio.sleep(POLL_S)
        arrived_s = time.perf_counter()
        answers = await asyncio.gather(
            *(
                client.stream(models[n % len(models)], next(long_texts), 1, server.extra)
                for n in range(sizes.num_long_prompts)
            )
        )
        answered_s = time.perf_counter()
        _check_running(streams)
        checked(LoadResult(answers, answered_s - arrived_s))
    all_running_s = max(stream.text_at_s[0] for stream in streams)
    before = [gap for stream in streams for gap in gaps_between(stream, all_running_s, arrived_s)]
    during = [gap for stream in streams for gap in gaps_between(stream, arrived_s, answered_s)]
    return Gaps(statistics.median(before), max(during))


def without_end_tokens(extra: Mapping[str, Any], num_tokens: int) -> Mapping[str, Any]:
    """Returns `extra`, with a `min_tokens` that bans the end-of-text token if `extra` ignores this token.

    The end-of-text token has no text, so a step that samples it would look like a longer inter-token latency.
    """
    return {**extra, "min_tokens": num_tokens} if extra.get("ignore_eos") else extra


def gaps_between(stream: Stream, start_s: float, end_s: float) -> list[float]:
    """Returns the inter-token latencies of a stream that lie, at least in part, in this period."""
    times = stream.text_at_s
    return [
        later - earlier for earlier, later in itertools.pairwise(times) if later > start_s and earlier < end_s
    ]


def _check_running(streams: Sequence[Stream]) -> None:
    for stream in streams:
        if stream.ended_s:
            raise LoadFailed(f"a stream that was to run on ended: {stream.error or 'its length was reached'}")


async def _disconnect(task: asyncio.Task[Stream]) -> None:
    """Aborts a stream by closing its connection."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def measure_idle(server: Server, models: Sequence[str], sizes: Sizes) -> list[Stream]:
    """Sends a short request to each model, one after the other.

    Raises:
        LoadFailed: a request failed.
    """
    texts = prompts(3, sizes.num_prompt_words)
    async with Client(server.url, api_key=server.api_key) as client:
        streams = [await client.stream(model, next(texts), 4, server.extra) for model in models]
    return list(checked(LoadResult(streams, 1.0)).streams)

"""Sends a benchmark load of streaming requests to any OpenAI-compatible server.

`python -m bench.load --base-url URL --models m1,m2 --concurrency 16` prints one JSON line.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

WORDS = (
    *("river", "stone", "market", "window", "garden", "winter", "letter", "music", "bridge", "yellow"),
    *("copper", "planet", "doctor", "engine", "forest", "silver", "morning", "village", "captain", "orange"),
    *("history", "library", "mountain", "island", "teacher", "ocean", "paper", "kitchen", "summer", "travel"),
)
TIMEOUT_S = 600.0
IGNORE_EOS: Mapping[str, Any] = {"ignore_eos": True}


@dataclass(frozen=True)
class Load:
    """The requests of a benchmark run, and the number of requests that run at a time."""

    models: Sequence[str]
    """Models of the requests, used in turn."""
    num_requests: int = 64
    concurrency: int = 16
    max_tokens: int = 64
    num_prompt_words: int = 90
    """Number of random words in a prompt; 90 words and a chat template are about 120 tokens."""
    extra: Mapping[str, Any] = field(default_factory=lambda: IGNORE_EOS)
    """Further fields of each request's body."""
    seed: int = 0


@dataclass
class Stream:
    """A request from the client's view; times are values of `time.perf_counter`."""

    model: str
    started_s: float
    text_at_s: list[float] = field(default_factory=list)
    """Arrival time of each chunk with text."""
    request_id: str = ""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    ended_s: float = 0.0
    error: str = ""

    @property
    def first_text_s(self) -> float:
        """Time (s) from the request to the first text, which must have arrived."""
        return self.text_at_s[0] - self.started_s

    @property
    def gaps_s(self) -> list[float]:
        """Times (s) between successive chunks with text, which usually are the inter-token latencies."""
        return [later - earlier for earlier, later in itertools.pairwise(self.text_at_s)]


@dataclass(frozen=True)
class LoadResult:
    """Results of all requests of a benchmark run."""

    streams: Sequence[Stream]
    wall_s: float

    @property
    def errors(self) -> list[str]:
        """Error messages of the requests that failed."""
        return [stream.error for stream in self.streams if stream.error]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests, divided by the duration of the whole run."""
        return sum(stream.num_tokens for stream in self.streams) / self.wall_s

    @property
    def first_text_p50_s(self) -> float:
        """Median time to the first text."""
        return statistics.median(stream.first_text_s for stream in self.streams if stream.text_at_s)

    @property
    def gap_p50_s(self) -> float:
        """Median of all times between chunks (`gaps_s`)."""
        return statistics.median(gap for stream in self.streams for gap in stream.gaps_s)


class LoadFailed(Exception):
    """A request of a measurement failed; the measurement has no result."""


class Client:
    """Streams chat completions from one server; an async context manager."""

    def __init__(self, base_url: str, *, api_key: str = "none", max_num_connections: int = 64) -> None:
        """`base_url` has no `/v1`."""
        self._url = f"{base_url.rstrip('/')}/v1/chat/completions"
        limits = httpx.Limits(
            max_connections=max_num_connections, max_keepalive_connections=max_num_connections
        )
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, headers=headers, trust_env=False)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def stream(
        self, model: str, prompt: str, max_tokens: int, extra: Mapping[str, Any], into: Stream | None = None
    ) -> Stream:
        """Runs one request to its end. A caller that passes `into` can read it while it is being filled."""
        stream = into or Stream(model, 0.0)
        stream.started_s = time.perf_counter()
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream_options": {"include_usage": True},
        } | dict(extra)
        try:
            await self._read(body, stream)
        except httpx.HTTPError as error:
            stream.error = repr(error)
        stream.ended_s = time.perf_counter()
        return stream

    async def _read(self, body: Mapping[str, Any], stream: Stream) -> None:
        async with self._http.stream("POST", self._url, json=body) as response:
            if response.status_code != httpx.codes.OK:
                stream.error = f"{response.status_code}: {(await response.aread())[:200].decode()}"
                return
            async for line in _lines(response):
                data = line.removeprefix(b"data: ")
                if data == b"[DONE]":
                    break
                if data != line:
                    _note(stream, msgspec.json.decode(data))
        if not stream.num_tokens:
            stream.error = stream.error or "the stream ended without usage"


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yields the body's lines. httpx's `aiter_lines` would take more CPU time, which the server needs."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")


def _note(stream: Stream, chunk: Mapping[str, Any]) -> None:
    if "error" in chunk:
        stream.error = str(chunk["error"])
        return
    stream.request_id = chunk["id"]
    if usage := chunk.get("usage"):
        stream.num_tokens = usage["completion_tokens"]
        stream.num_prompt_tokens = usage["prompt_tokens"]
    if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
        stream.text_at_s.append(time.perf_counter())


def prompts(seed: int, num_words: int) -> Iterator[str]:
    """Yields random prompts without end; the same seed gives the same prompts."""
    rng = random.Random(seed)
    while True:
        yield " ".join(rng.choice(WORDS) for _ in range(num_words))


async def run(base_url: str, load: Load, *, api_key: str = "none") -> LoadResult:
    """Runs a load: keeps `concurrency` requests open until all are answered."""
    texts = prompts(load.seed, load.num_prompt_words)
    jobs = iter([(load.models[n % len(load.models)], next(texts)) for n in range(load.num_requests)])
    streams: list[Stream] = []
    async with Client(base_url, api_key=api_key, max_num_connections=load.concurrency + 4) as client:

        async def work() -> None:
            for model, prompt in jobs:
                streams.append(await client.stream(model, prompt, load.max_tokens, load.extra))

        started_s = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(load.concurrency)))
        return LoadResult(streams, time.perf_counter() - started_s)


def checked(result: LoadResult) -> LoadResult:
    """Returns the result if all requests succeeded.

    Raises:
        LoadFailed: a request failed.
    """
    if result.errors:
        raise LoadFailed(f"{len(result.errors)} of {len(result.streams)} requests failed: {result.errors[0]}")
    return result


def _summary(result: LoadResult) -> dict[str, object]:
    gaps_s = sorted(gap for stream in result.streams for gap in stream.gaps_s) or [0.0]
    ok = [stream for stream in result.streams if not stream.error]
    return {
        "wall_s": round(result.wall_s, 2),
        "ok": len(ok),
        "failed": len(result.errors),
        "tokens_per_s": round(result.tokens_per_s, 1),
        "prompt_tokens": sum(stream.num_prompt_tokens for stream in ok),
        "first_text_p50_ms": round(result.first_text_p50_s * 1e3, 1) if ok else None,
        "gap_p50_ms": round(statistics.median(gaps_s) * 1e3, 1),
        "gap_max_ms": round(gaps_s[-1] * 1e3, 1),
        "errors": result.errors[:3],
    }


def main() -> int:
    defaults = Load(())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base-url", required=True, help="without /v1")
    parser.add_argument("--models", required=True, type=lambda value: value.split(","))
    parser.add_argument("--concurrency", type=int, default=defaults.concurrency)
    parser.add_argument("--requests", type=int, default=defaults.num_requests)
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens)
    parser.add_argument("--prompt-words", type=int, default=defaults.num_prompt_words)
    parser.add_argument("--extra", type=json.loads, default=defaults.extra, metavar="JSON")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--api-key", default="none")
    args = parser.parse_args()
    load = Load(
        models=args.models,
        num_requests=args.requests,
        concurrency=args.concurrency,
        max_tokens=args.max_tokens,
        num_prompt_words=args.prompt_words,
        extra=args.extra,
        seed=args.seed,
    )
    result = asyncio.run(run(args.base_url, load, api_key=args.api_key))
    sys.stdout.write(json.dumps(_summary(result)) + "\n")
    return 1 if result.errors else 0


if __name__ == "__main__":
    sys.exit(main())

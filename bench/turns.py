"""Runs chats of several turns on an engine in this process, with and without its prefix cache.

`LORELAY_MODEL=FOLDER python -m bench.turns` reads the `LORELAY_*` variables of a worker.
The command prints one JSON line: the median time to the first token of a chat's last turn, with and without
the cache, and the ratio of the two.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator

import msgspec

from bench.load import LoadFailed, prompts
from shared.messages import GenerationRequest, SamplingParams, StreamEvent, Usage
from shared.settings import WorkerSettings
from worker.engine.ports import Engine
from worker.serving.faults import Faults
from worker.serving.service import build_engine


class Turn(msgspec.Struct, frozen=True):
    """Result of the last turn of a chat."""

    first_token_s: float
    usage: Usage


def load_engine(settings: WorkerSettings) -> Engine:
    """Loads an engine, with a separate model and KV cache."""
    from worker.model.startup import load_model_runner

    return build_engine(load_model_runner(settings), settings, Faults())


def chat(engine: Engine, base: str, texts: Iterator[str], num_turns: int, max_tokens: int) -> Turn:
    """Runs a chat. Each turn sends the whole conversation so far.

    Raises:
        LoadFailed: a turn of the chat failed.
    """
    messages: list[dict[str, str]] = []
    first_token_s, usage = 0.0, Usage(0, 0)
    for number in range(num_turns):
        events: list[StreamEvent] = []
        messages.append({"role": "user", "content": next(texts)})
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = GenerationRequest(
            request_id=f"turn-{number}", model=base, base=base, messages=list(messages), sampling=sampling
        )
        started_s, first_token_s = time.perf_counter(), 0.0
        engine.add_request(request, engine.encode(request))
        while engine.has_work:
            events += [append.event for append in engine.step()]
            if events and not first_token_s:
                first_token_s = time.perf_counter() - started_s
        messages.append({"role": "assistant", "content": "".join(event.text for event in events)})
        if events[-1].usage is None:
            raise LoadFailed("a turn of the chat failed")
        usage = events[-1].usage
    return Turn(first_token_s, usage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--chats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt-words", type=int, default=90)
    args = parser.parse_args()
    engines = {cached: load_engine(WorkerSettings.load(prefix_cache=cached)) for cached in (True, False)}
    base = WorkerSettings.load().base_name
    seeds = itertools.count()
    turns: dict[bool, list[Turn]] = {True: [], False: []}
    for _ in range(args.chats):
        for cached, engine in engines.items():
            texts = prompts(next(seeds), args.prompt_words)
            turns[cached].append(chat(engine, base, texts, args.turns, args.max_tokens))
    with_s, without_s = (
        statistics.median(turn.first_token_s for turn in turns[cached]) for cached in (True, False)
    )
    result = {
        "with_cache_s": with_s,
        "without_cache_s": without_s,
        "ratio": with_s / without_s,
        "usage": turns[True][-1].usage,
    }
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


if __name__ == "__main__":
    main()

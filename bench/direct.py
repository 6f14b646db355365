"""Runs a worker's engine in this process, without API and Redis, for comparison with the whole service.

`python -m bench.direct --models m1,m2` reads the worker's `LORELAY_*` variables and prints one JSON line.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import msgspec

from bench.load import Load, prompts
from shared.messages import GenerationRequest, SamplingParams
from shared.settings import WorkerSettings
from worker.engine.ports import Engine
from worker.model.kernels.onednn import bound_caches
from worker.model.kernels.threads import sleep_while_waiting, stays_eager
from worker.serving.faults import Faults
from worker.serving.service import build_engine


class DirectResult(msgspec.Struct, frozen=True):
    """Result of a run of the engine alone."""

    num_tokens: int
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens divided by the duration of the whole run."""
        return self.num_tokens / self.wall_s


def requests(load: Load, base: str) -> Iterator[GenerationRequest]:
    """Yields the requests that `bench.load` would send over HTTP."""
    texts = prompts(load.seed, load.num_prompt_words)
    for number in range(load.num_requests):
        model = load.models[number % len(load.models)]
        yield GenerationRequest(
            request_id=f"direct-{number}",
            model=model,
            base=base,
            adapter_name=None if model == base else model,
            messages=[{"role": "user", "content": next(texts)}],
            sampling=SamplingParams(temperature=0, max_tokens=load.max_tokens, ignore_eos=True),
        )


def run(engine: Engine, load: Load, base: str) -> DirectResult:
    """Keeps `load.concurrency` requests in the engine until all requests of the load have ended."""
    waiting = requests(load, base)
    num_tokens, started_s = 0, time.perf_counter()

    def add(count: int) -> None:
        for request in itertools.islice(waiting, count):
            engine.add_request(request, engine.encode(request))

    add(load.concurrency)
    while engine.has_work:
        ended = [append.event for append in engine.step() if append.event.is_terminal]
        num_tokens += sum(event.usage.completion_tokens for event in ended if event.usage)
        add(len(ended))
    return DirectResult(num_tokens, time.perf_counter() - started_s)


def main() -> None:
    defaults = Load(())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", required=True, type=lambda value: value.split(","))
    parser.add_argument("--concurrency", type=int, default=defaults.concurrency)
    parser.add_argument("--requests", type=int, default=defaults.num_requests)
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens)
    parser.add_argument("--prompt-words", type=int, default=defaults.num_prompt_words)
    args = parser.parse_args()
    settings = WorkerSettings.load()
    load = Load(
        models=args.models,
        num_requests=args.requests,
        concurrency=args.concurrency,
        max_tokens=args.max_tokens,
        num_prompt_words=args.prompt_words,
    )
    sleep_while_waiting(is_eager=stays_eager(settings.compile))
    bound_caches()
    from worker.model.startup import load_model_runner

    with closing(load_model_runner(settings)) as runner:
        runner.wait()
        engine = build_engine(runner, settings, Faults())
        warm_up = replace(load, num_requests=max(load.concurrency, len(load.models)), max_tokens=4, seed=1)
        run(engine, warm_up, settings.base_name)
        result = run(engine, load, settings.base_name)
        forward = runner.forward_state
    fields = msgspec.structs.asdict(result) | {"tokens_per_s": result.tokens_per_s, "forward": forward}
    sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")


if __name__ == "__main__":
    main()

"""Compares the speed of two checkouts of Lorelay, which run the same benchmark loads in turn.

`python -m bench.compare --before FOLDER --model MODEL --adapters "a=PATH b=PATH"` compares the checkout in
FOLDER with this checkout. Both deployments run all the time. Each round measures both deployments, in
alternating order. The command prints a JSON line per load: medians, and ratios with 90 % intervals.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil  # type: ignore[import-untyped]

from bench.deployment import ROOT, Deployment
from bench.load import Load, checked, run
from shared.settings import WorkerSettings

NUM_RESAMPLES = 2000


class Sample(NamedTuple):
    """Result of one run of a load on one deployment."""

    tokens_per_s: float
    cpu_ms_per_token: dict[str, float]
    """CPU time (user and system, in ms) of API, worker and Redis server per output token."""


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", required=True, type=Path, help="the other checkout")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", required=True)
    parser.add_argument("--rounds", type=int, default=10, help="[default: %(default)s]")
    parser.add_argument(
        "--requests",
        type=int,
        default=64,
        help="of a load; one stream has a 16th of them [default: %(default)s]",
    )
    parser.add_argument("--worker-class", default="worker.LoraWorker")
    args = parser.parse_args()
    settings = {"model": args.model, "adapters": args.adapters, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        before, after = (
            stack.enter_context(
                Deployment(Path(folder) / name, settings, worker_class=args.worker_class, tree=tree)
            )
            for name, tree in (("before", args.before.resolve()), ("after", ROOT))
        )
        for name, load in loads(settings, args.requests).items():
            print_line({"load": name, **compare(before, after, load, args.rounds)})


def loads(settings: Mapping[str, str], num_requests: int) -> dict[str, Load]:
    """Returns the three loads: base model, mixed adapters, and a single stream."""
    parsed = WorkerSettings.load(**settings)
    base, adapters = parsed.base_name, [source.name for source in parsed.adapters]
    return {
        "base": Load([base], num_requests),
        "mixed": Load(adapters, num_requests),
        "one stream": Load([base], max(1, num_requests // 16), concurrency=1),
    }


def compare(before: Deployment, after: Deployment, load: Load, num_rounds: int) -> dict[str, object]:
    """Measures both deployments in turn. The first round is a warm-up and is not counted."""
    rounds: list[tuple[Sample, Sample]] = []
    for number in range(num_rounds + 1):
        if number % 2:
            second, first = measure(after, load), measure(before, load)
        else:
            first, second = measure(before, load), measure(after, load)
        rounds.append((first, second))
    olds, news = zip(*rounds[1:], strict=True)
    figures: dict[str, object] = {
        "rounds": num_rounds,
        "tokens_per_s": [statistics.median(sample.tokens_per_s for sample in side) for side in (olds, news)],
        "ratio": interval([new.tokens_per_s / old.tokens_per_s for old, new in rounds[1:]]),
    }
    for part in olds[0].cpu_ms_per_token:
        pairs = [(old.cpu_ms_per_token[part], new.cpu_ms_per_token[part]) for old, new in rounds[1:]]
        figures[f"{part} CPU ratio"] = interval([new / old for old, new in pairs])
        figures[f"{part} CPU ms per token"] = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return figures


def measure(deployment: Deployment, load: Load) -> Sample:
    """Runs a load to its end.

    Raises:
        LoadFailed: a request failed.
    """
    before = cpu_seconds(deployment)
    result = checked(asyncio.run(run(deployment.url, load)))
    num_tokens = sum(stream.num_tokens for stream in result.streams)
    spent = {part: now_s - before[part] for part, now_s in cpu_seconds(deployment).items()}
    return Sample(result.tokens_per_s, {part: 1000 * cpu_s / num_tokens for part, cpu_s in spent.items()})


def cpu_seconds(deployment: Deployment) -> dict[str, float]:
    """Returns the CPU time (s) of each part so far, including the part's child processes that have ended."""
    pids = {"API": [deployment.api.pid], "worker": deployment.worker_pids, "server": [deployment.server_pid]}
    return {part: sum(sum(psutil.Process(pid).cpu_times()[:4]) for pid in ids) for part, ids in pids.items()}


def interval(ratios: Sequence[float]) -> list[float]:
    """Returns the median of ratios and the ends of its 90 % interval, by bootstrap with a fixed seed."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(NUM_RESAMPLES))
    return [
        round(value, 4)
        for value in (
            statistics.median(ratios),
            medians[NUM_RESAMPLES // 20],
            medians[-(NUM_RESAMPLES // 20) - 1],
        )
    ]


def print_line(figures: Mapping[str, object]) -> None:
    """Prints one JSON line and flushes it."""
    sys.stdout.write(msgspec.json.encode(figures).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

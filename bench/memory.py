"""Checks that a worker's memory does not grow while a thousand adapters are loaded and evicted.

`python -m bench.memory --model MODEL --minutes 10 --adapters 1000` requests all adapters in turn, so that
each adapter is read from disk. The command prints JSON: the worker's memory over time and at the end, and the
faults found. The exit code is 1 if there are faults. The command runs only on Linux. The worker reads further
settings from `LORELAY_*`.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped]

from bench.adapters import ATTENTION, AdapterKind, AdapterMaker
from bench.deployment import Deployment
from bench.load import IGNORE_EOS, WORDS, Client
from bench.own import WATCHED, adapters_setting
from bench.watched import Holdings, Watch

ALLOWED_MIB = 256
"""Allowed growth in MiB: oneDNN's caches, activations, and memory that the allocator keeps.

Weights, KV cache, slots and host memory for adapters are allocated in full before the first sample."""
ALLOWED_TENSORS = 500
"""Allowed number of new tensors: each Linear creates tables for its adapters at their first use."""
CONCURRENCY = 4
MAX_NUM_WORDS = 60
"""Maximum number of words in a prompt; lengths vary, because each new shape fills oneDNN's caches."""
PAUSE_AFTER_ERROR_S = 1.0
SETTINGS: Mapping[str, str] = {
    "device": "cpu",
    "dtype": "bfloat16",
    "max_batch_size": str(CONCURRENCY),
    "max_resident_adapters": str(CONCURRENCY),
    "max_cached_adapter_bytes": str(8 << 20),
    "session_len": "512",
}


class Sample(msgspec.Struct, frozen=True):
    """Anonymous memory of worker and API at one time, without pages of files, which come and go."""

    at_s: float
    num_requests: int
    worker_mib: float
    api_mib: float


class MemoryResult(msgspec.Struct, frozen=True):
    """Result of a run of the memory check."""

    num_requests: int
    num_failed: int
    start: Sample
    middle: Sample
    end: Sample
    highest_mib: float
    """Maximum memory of the worker, in MiB."""
    mib_per_minute: float
    """Growth of the worker's memory in the second half of the run, by linear regression."""
    before: Holdings
    after: Holdings
    ended: str
    """Numbers of requests and cache blocks in use when the worker ended, taken from its log."""
    faults: list[str]


@dataclass
class Course:
    """Samples and answers collected during a run."""

    samples: list[Sample] = field(default_factory=list)
    num_requests: int = 0
    """Number of requests that were answered."""
    errors: list[str] = field(default_factory=list)
    """Errors of the requests that failed."""


def run(
    folder: Path,
    model: str,
    *,
    num_adapters: int,
    duration_s: float,
    interval_s: float = 5.0,
    **settings: str,
) -> MemoryResult:
    """Serves requests for `duration_s`, then judges the memory.

    `folder` is temporary; `settings` are further settings of the worker.

    Raises:
        StartFailed: the deployment did not start.
    """
    names = [f"a{n}" for n in range(num_adapters)]
    paths = AdapterMaker(model, AdapterKind(8, ATTENTION)).make(folder / "adapters", names)
    watch_file = folder / "watch.json"
    settings = {
        **SETTINGS,
        "model": model,
        "adapters": adapters_setting({name: str(path) for name, path in paths.items()}),
        "bench_watch_file": str(watch_file),
        **settings,
    }
    with Deployment(folder / "deployment", settings, worker_class=WATCHED) as deployment:
        course = asyncio.run(_serve(deployment, names, duration_s, interval_s))
    watch = msgspec.json.decode(watch_file.read_bytes(), type=Watch)
    return judge(course, watch, _last_words(deployment.worker_log(0)))


async def _serve(
    deployment: Deployment, names: Sequence[str], duration_s: float, interval_s: float
) -> Course:
    course, models, texts = Course(), itertools.cycle(names), _prompts()
    worker, api = psutil.Process(deployment.worker_pids[0]), psutil.Process(deployment.api.pid)
    started_s = time.monotonic()

    def has_time() -> bool:
        return time.monotonic() < started_s + duration_s

    def sample() -> None:
        latest = Sample(
            time.monotonic() - started_s, course.num_requests, anonymous_mib(worker), anonymous_mib(api)
        )
        course.samples.append(latest)
        sys.stderr.write(
            f"bench.memory: {latest.at_s:4.0f} s, {latest.num_requests} requests, "
            f"{len(course.errors)} failed, worker {latest.worker_mib:.0f} MiB, API {latest.api_mib:.0f} MiB\n"
        )

    async def ask(client: Client) -> None:
        while has_time():
            stream = await client.stream(next(models), next(texts), 4, IGNORE_EOS)
            if stream.error:
                course.errors.append(stream.error)
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)
            else:
                course.num_requests += 1

    async def watch() -> None:
        while has_time():
            sample()
            await asyncio.sleep(interval_s)

    async with Client(deployment.url) as client:
        await asyncio.gather(watch(), *(ask(client) for _ in range(CONCURRENCY)))
    sample()
    return course


def _prompts() -> Iterator[str]:
    rng = random.Random(0)
    while True:
        yield " ".join(rng.choices(WORDS, k=rng.randint(1, MAX_NUM_WORDS)))


def anonymous_mib(process: psutil.Process) -> float:
    """Returns a process's memory in MiB, without pages of files."""
    info = process.memory_info()
    return float(info.rss - info.shared) / 2**20


def _last_words(log: Path) -> str:
    _, _, words = log.read_text(errors="replace").rpartition(" ended with ")
    return words.partition("\n")[0]


def judge(course: Course, watch: Watch, ended: str) -> MemoryResult:
    """Judges a run of at least two samples; `ended` tells what the worker still held at its end."""
    samples = course.samples
    later = samples[(len(samples) - 1) // 2 :]
    growth = statistics.linear_regression([s.at_s / 60 for s in later], [s.worker_mib for s in later])
    highest_mib = max(sample.worker_mib for sample in samples)
    return MemoryResult(
        num_requests=course.num_requests,
        num_failed=len(course.errors),
        start=samples[0],
        middle=later[0],
        end=samples[-1],
        highest_mib=highest_mib,
        mib_per_minute=growth.slope,
        before=watch.before,
        after=watch.after,
        ended=ended,
        faults=list(_faults(course, highest_mib - samples[0].worker_mib, watch, ended)),
    )


def _faults(course: Course, grown_mib: float, watch: Watch, ended: str) -> Iterator[str]:
    num_new_tensors = watch.after.num_tensors - watch.before.num_tensors
    if course.errors:
        yield f"{len(course.errors)} requests failed, the first one with {course.errors[0]}"
    if grown_mib > ALLOWED_MIB:
        yield f"the worker grew by {grown_mib:.0f} MiB after its start, {ALLOWED_MIB} are allowed"
    if num_new_tensors > ALLOWED_TENSORS:
        yield f"the worker kept {num_new_tensors} more tensors, {ALLOWED_TENSORS} are allowed"
    if ended != "0 requests, 0 cache blocks in use":
        yield f"the worker ended with {ended}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face id")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--adapters", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorelay-memory-") as folder:
        result = run(Path(folder), args.model, num_adapters=args.adapters, duration_s=args.minutes * 60)
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(result)).decode() + "\n")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())

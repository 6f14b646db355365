"""Measures what hostile clients cost other clients: the gaps of running streams, and memory.

`python -m bench.hostile` runs a deployment with a scripted worker, so that gaps come from API and relay, not
from a model. Each hostile input has a row in the table. To measure a row, streams of another client run for
some seconds without the input, then for as many seconds with it, several times. For the last row, all inputs
arrive at once, while another client sends requests. The exit code is 1 if a row exceeds its limit.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]

from bench.deployment import Deployment
from bench.hostile_inputs import INPUTS, READY
from bench.load import IGNORE_EOS, Client, Load, LoadFailed, Stream, run
from bench.memory import anonymous_mib
from bench.own import SCRIPTED
from bench.report import aligned
from bench.run import demo_model
from bench.scripted import MAX_MODEL_LEN

STEP_S = 0.02
MAX_RISE_S = 0.05
"""Mark of an input's row: how much later than without the input the p99 of gaps may be."""
MAX_RATIO = 3.0
"""Mark of the crowd's row: its p99 of gaps, divided by the usual one."""
NUM_STREAMS = 4
SAMPLE_S = 0.5
STALL_LIMIT_S = 60.0
NEIGHBOR_KEY, HOSTILE_KEY = "sk-neighbor", "sk-hostile"
SETTINGS: Mapping[str, str] = {
    "device": "cpu",
    "bench_step_s": str(STEP_S),
    "api_keys": f"neighbor:{NEIGHBOR_KEY} hostile:{HOSTILE_KEY}",
}
PARTS = ("API", "worker", "Redis")
CROWD = "all of them"


class Round(NamedTuple):
    """Gaps (s) of running streams for some seconds without hostile clients, and then with them."""

    without_s: Sequence[float]
    with_s: Sequence[float]

    @property
    def rise_s(self) -> float:
        """The p99 of gaps with hostile clients, minus the p99 without them."""
        return p99(self.with_s) - p99(self.without_s)

    @property
    def figures_s(self) -> tuple[float, float, float, float]:
        """The p99 of gaps without and with hostile clients, then the longest gap without and with them."""
        return p99(self.without_s), p99(self.with_s), max(self.without_s), max(self.with_s)

    @property
    def ratio(self) -> float:
        """The p99 of gaps with hostile clients, divided by the p99 without them."""
        return p99(self.with_s) / p99(self.without_s)


@dataclass
class Result:
    """A row of the table."""

    name: str
    rounds: list[Round] = field(default_factory=list)
    growth_mib: Mapping[str, float] = field(default_factory=dict)
    """Growth of each of `PARTS`: its highest memory minus that before the first round."""
    ways: Counter[str] = field(default_factory=Counter)
    """Number of hostile connections by the way in which they ended."""
    faults: list[str] = field(default_factory=list)
    """Requests of the other client that failed, or the reason why the row has no figures."""

    @property
    def verdict(self) -> str:
        """`ok` if all rounds stay below the row's limit, otherwise a description of the problem."""
        if self.faults:
            return f"{len(self.faults)} failed: {self.faults[0].splitlines()[0]}"
        if self.name == CROWD:
            is_right = all(each.ratio <= MAX_RATIO for each in self.rounds)
        else:
            is_right = all(each.rise_s <= MAX_RISE_S for each in self.rounds)
        return "ok" if is_right else "short"

    @property
    def cells(self) -> list[str]:
        """The row's cells in the order of `HEADINGS`."""
        columns = zip(*(each.figures_s for each in self.rounds), strict=True)
        times = ["/".join(f"{1000 * value:.0f}" for value in column) for column in columns] or ["-"] * 4
        growth = [f"{self.growth_mib[part]:+.0f}" if self.growth_mib else "-" for part in PARTS]
        ways = ", ".join(f"{count} {way}" for way, count in self.ways.most_common())
        return [self.name, *times, *growth, self.verdict, ways]


HEADINGS = (
    *("hostile input", "p99 without", "p99 with", "max without", "max with"),
    *(f"{part} MiB" for part in PARTS),
    *("", "ends of hostile connections"),
)


def p99(values: Sequence[float]) -> float:
    """Returns the smallest value that 99 % of the values don't exceed."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def gaps_between(times: Sequence[float], begin: float, end: float) -> list[float]:
    """Returns the gaps between successive times that lie, at least in part, between `begin` and `end`."""
    return [
        later - earlier for earlier, later in itertools.pairwise(times) if later > begin and earlier < end
    ]


class RunningStreams:
    """Streams of one client that run all the time; an async context manager that ends them."""

    def __init__(self, client: Client, model: str) -> None:
        self._streams = [Stream(model, 0.0) for _ in range(NUM_STREAMS)]
        self._client = client
        self._tasks: list[asyncio.Task[Stream]] = []

    async def __aenter__(self) -> "RunningStreams":
        self._tasks = [
            asyncio.create_task(
                self._client.stream(stream.model, "hello", MAX_MODEL_LEN - 100, IGNORE_EOS, into=stream)
            )
            for stream in self._streams
        ]
        await self._all_later_than(0.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def gaps_s(self, seconds: float) -> list[float]:
        """Watches the streams for `seconds`, and then until the gaps that are open at that time have ended.

        Raises:
            LoadFailed: a stream ended, or had no text for `STALL_LIMIT_S`.
        """
        begin = time.perf_counter()
        await asyncio.sleep(seconds)
        end = time.perf_counter()
        await self._all_later_than(end)
        return [gap for stream in self._streams for gap in gaps_between(stream.text_at_s, begin, end)]

    async def _all_later_than(self, moment: float) -> None:
        """Waits until each stream has text that arrived after `moment`."""
        deadline = time.perf_counter() + STALL_LIMIT_S
        while not all(stream.text_at_s and stream.text_at_s[-1] > moment for stream in self._streams):
            for task, stream in zip(self._tasks, self._streams, strict=True):
                if task.done():
                    raise LoadFailed(f"a running stream ended: {stream.error or 'it was complete'}")
            if time.perf_counter() > deadline:
                raise LoadFailed(f"a running stream had no text for {STALL_LIMIT_S:.0f} s")
            await asyncio.sleep(STEP_S)


class Attack:
    """A process with hostile clients (`bench.hostile_inputs`), which attack in the context `under_way`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.ways: Counter[str] = Counter()
        """Number of connections that have ended so far, by the way."""

    @contextlib.asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        """Lets the hostile clients attack while the context lasts."""
        self._order()
        yield
        self._order()
        self.ways += Counter(json.loads(await self._line()))

    async def wait_until_ready(self) -> None:
        """Waits until the process has built all bytes that it will send."""
        line = await self._line()
        if line.strip() != READY:
            raise LoadFailed(f"the hostile clients did not start: {line!r}")

    async def _line(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode()

    def _order(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")


@contextlib.asynccontextmanager
async def attack(deployment: Deployment, names: Sequence[str], num_connections: int) -> AsyncIterator[Attack]:
    """Starts a process with hostile clients, which wait; the process ends with the context."""
    options = ["--url", deployment.url, "--model", deployment.base_name, "--api-key", HOSTILE_KEY]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.hostile_inputs", *options),
        *("--connections", str(num_connections), *names),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        started = Attack(process)
        await started.wait_until_ready()
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class MemoryWatch:
    """Samples the memory of API, worker and Redis; an async context manager."""

    def __init__(self, deployment: Deployment) -> None:
        pids = (deployment.api.pid, deployment.worker_pids[0], deployment.server_pid)
        self._processes = {part: psutil.Process(pid) for part, pid in zip(PARTS, pids, strict=True)}
        self._before = self._highest = self._sample()

    @property
    def growth_mib(self) -> dict[str, float]:
        """Growth of each part's memory: the maximum minus the value at the beginning."""
        return {part: self._highest[part] - before for part, before in self._before.items()}

    async def __aenter__(self) -> "MemoryWatch":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            now = self._sample()
            self._highest = {part: max(mib, now[part]) for part, mib in self._highest.items()}

    def _sample(self) -> dict[str, float]:
        return {part: anonymous_mib(process) for part, process in self._processes.items()}


async def measure_input(deployment: Deployment, name: str, num_runs: int, seconds: float) -> Result:
    """Measures one hostile input.

    Raises:
        LoadFailed: a stream of the other client ended or stalled.
    """
    result = Result(name)
    async with (
        attack(deployment, [name], INPUTS[name].num_connections) as hostile,
        Client(deployment.url, api_key=NEIGHBOR_KEY) as client,
        RunningStreams(client, deployment.base_name) as streams,
        MemoryWatch(deployment) as memory,
    ):
        for _ in range(num_runs):
            without_s = await streams.gaps_s(seconds)
            async with hostile.under_way():
                result.rounds.append(Round(without_s, await streams.gaps_s(seconds)))
        result.growth_mib, result.ways = memory.growth_mib, hostile.ways
    return result


async def measure_crowd(deployment: Deployment, num_connections: int, num_runs: int, load: Load) -> Result:
    """Measures requests of another client while connections of all hostile inputs are open.

    Raises:
        LoadFailed: none of these requests had text.
    """
    result = Result(CROWD)

    async def gaps_s() -> list[float]:
        answered = await run(deployment.url, load, api_key=NEIGHBOR_KEY)
        result.faults += answered.errors
        if gaps := [gap for stream in answered.streams for gap in stream.gaps_s]:
            return gaps
        raise LoadFailed(f"no request of the other client had text: {answered.errors[0]}")

    async with (
        attack(deployment, list(INPUTS), num_connections) as hostile,
        MemoryWatch(deployment) as memory,
    ):
        for _ in range(num_runs):
            without_s = await gaps_s()
            async with hostile.under_way():
                result.rounds.append(Round(without_s, await gaps_s()))
        result.growth_mib, result.ways = memory.growth_mib, hostile.ways
    return result


def measure(
    deployment: Deployment, names: Sequence[str], num_runs: int, seconds: float, num_connections: int
) -> Iterator[Result]:
    """Yields the rows; a row whose measurement fails has the reason in place of figures."""
    load = Load([deployment.base_name], num_requests=max(8, round(8 * seconds)), concurrency=8, max_tokens=40)
    for name in names:
        if name == CROWD:
            work = measure_crowd(deployment, num_connections, num_runs, load)
        else:
            work = measure_input(deployment, name, num_runs, seconds)
        sys.stderr.write(f"bench.hostile: measuring {name}\n")
        try:
            yield asyncio.run(work)
        except LoadFailed as error:
            yield Result(name, faults=[str(error)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    all_names = [*INPUTS, CROWD]
    add = parser.add_argument
    add("--model", default="", help="folder or Hugging Face id, for its tokenizer [default: the demo model]")
    add("--only", nargs="+", choices=all_names, default=all_names, metavar="ROW", help=", ".join(all_names))
    add("--runs", type=int, default=3, help="[default: %(default)s]")
    add("--seconds", type=float, default=5.0, help="with and without an input [default: %(default)s]")
    add("--connections", type=int, default=60, help="of the last row [default: %(default)s]")
    args = parser.parse_args(arguments)
    settings = {**SETTINGS, "model": args.model or demo_model()}
    with (
        tempfile.TemporaryDirectory(prefix="lorelay-hostile-") as folder,
        Deployment(Path(folder) / "deployment", settings, worker_class=SCRIPTED) as deployment,
    ):
        results = list(measure(deployment, args.only, args.runs, args.seconds, args.connections))
    rows = [HEADINGS, *(result.cells for result in results)]
    sys.stdout.write("".join(f"{line}\n" for line in ["times in ms, one per run", "", *aligned(rows)]))
    return int(any(result.verdict != "ok" for result in results))


if __name__ == "__main__":
    sys.exit(main())

"""Random faults in a real deployment under load, and a table of what happened to the requests.

`scripts/chaos --minutes M --seed S`. The same seed gives the same order of faults, but their timing depends
on the machine. The exit code is 1 if a request was lost or a token differs.
"""

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import redis

from shared.queue import keys
from tests.chaos.checker import (
    CANCELED_TTL_S,
    Expected,
    Reference,
    check_expiry,
    check_quiet,
    find_faults,
    find_partial_faults,
    lasting_keys,
)
from tests.chaos.cluster import BASE, UNHURRIED, Cluster, build_models
from tests.chaos.downtime import Downtime, Outage
from tests.chaos.faults import FaultMaker
from tests.chaos.neighbors import HOSTILE_KEY
from tests.chaos.proxy import Proxy
from tests.chaos.recorder import Answer, Ask, Load, Recorder, workload
from tests.forked import Nursery
from tests.server_faults import BUSY_OPTIONS
from tests.waiting import wait_until

NUM_WORKERS = 3
LOAD_KEY = "sk-load"
"""API key of the requests whose answers are compared."""
REFUSALS = ("queue_unavailable", "queue_full", "server_busy")
"""Error codes of requests that were not accepted."""
TOLD_OF_GARBAGE = ("can't be read", "was removed from the queue")
"""Parts of the error messages that clients of garbled requests get."""
MAX_NUM_CRASHES_MET = 2
MIN_PAUSE_S, MAX_PAUSE_S = 0.2, 2.5
RESULT_TTL_S = 20
"""Life of an ended request's log: long enough for the recorder to read it although Redis is away at times."""


class Book:
    """Results of the requests that are over; their texts are dropped once they are compared."""

    def __init__(self, reference: Reference, garbled: Collection[str]) -> None:
        """`garbled` has the requests with a garbled record; it grows while the run goes on."""
        self._reference = reference
        self._garbled = garbled
        self._lock = threading.Lock()
        self.times: list[array[float]] = []
        """Times of each completed request: sent, each chunk, end."""
        self.num_accepted = self.num_refused = self.num_garbled = 0
        self.losses: list[str] = []
        self.differences: list[str] = []

    def enter(self, answer: Answer) -> None:
        """Adds the answer of a request that is over."""
        with self._lock:
            if answer.error_code in REFUSALS and answer.status != 200:
                self.num_refused += 1
                return
            self.num_accepted += 1
            is_garbled = self._is_garbled(answer)
            self.num_garbled += is_garbled
            find = find_garbled_faults if is_garbled else find_faults
            if faults := find(answer, self._reference.of(answer.ask)):
                wrong = self.differences if answer.is_complete else self.losses
                wrong.append(f"{answer.request_id} {answer.ask}: {'; '.join(faults)}")
            chunk_times = [at for at, _ in answer.chunks]
            self.times.append(array("d", [answer.sent_at, *chunk_times, answer.ended_at]))
            answer.chunks, answer.log = [], None

    def _is_garbled(self, answer: Answer) -> bool:
        """True if a record of this request was garbled."""
        if answer.request_id or not answer.errors:
            return answer.request_id in self._garbled
        # An error before the stream began does not name its request: at most as many count as were garbled.
        is_told = any(words in answer.errors[0]["message"] for words in TOLD_OF_GARBAGE)
        return is_told and self.num_garbled < len(self._garbled)

    def longest_pause(self) -> tuple[float, float]:
        """Begin and end of the longest pause that any client saw."""
        pauses = (pair for times in self.times for pair in itertools.pairwise(times))
        return max(pauses, key=lambda pause: pause[1] - pause[0], default=(0.0, 0.0))

    def recovery_s(self, fault_at: float) -> float:
        """Time from a fault until the last stream that it interrupted went on."""
        return max(
            (_next(times, fault_at) - fault_at for times in self.times if _is_open(times, fault_at)),
            default=0.0,
        )


class Recomputed:
    """Counts recomputed tokens: those of requests that went back to their queues."""

    def __init__(self, url: str) -> None:
        self._connection = redis.Redis.from_url(url)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recomputed")
        self.num_requests = self.num_tokens = 0

    def start(self) -> None:
        """Begins to count."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the counting."""
        self._stopped.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._listen()
            except redis.RedisError:
                self._stopped.wait(0.05)

    def _listen(self) -> None:
        prefix = f"__keyspace@0__:{keys.owner('')}"
        with self._connection.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.psubscribe(f"{prefix}*")
            while not self._stopped.is_set():
                message = pubsub.get_message(timeout=0.2)
                if message and message["data"] == b"del":
                    self._count(message["channel"].decode().removeprefix(prefix))

    def _count(self, request_id: str) -> None:
        if self._connection.hget(f"rq:job:{request_id}", "status") in (b"queued", b"started"):
            self.num_requests += 1
            self.num_tokens += self._connection.llen(keys.log(request_id))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description="Random faults under load.")
    parser.add_argument("--minutes", type=float, default=1.0, metavar="M", help="[default: %(default)s]")
    parser.add_argument("--seed", type=int, default=None, metavar="S", help="[default: a random one]")
    parser.add_argument("--streams", type=int, default=32, metavar="N", help="[default: %(default)s]")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    sys.stdout.write(f"seed {seed}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="lorelay-chaos-models-") as folder, Nursery() as nursery:
        models = build_models(Path(folder))
        is_right, lines = run(models, args.minutes * 60, random.Random(seed), args.streams, nursery)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return int(not is_right)


def run(
    models: dict[str, str],
    seconds: float,
    rng: random.Random,
    num_streams: int,
    nursery: Nursery,
) -> tuple[bool, list[str]]:
    """Breaks a deployment for a while; returns whether no request or token was lost, and the report."""
    with ExitStack() as stack:
        asks = [ask for n in (12, 30, 60) for ask in workload(32, max_tokens=n, tag=f"{n} ")]
        rng.shuffle(asks)
        reference = fault_free(models, asks, nursery)
        options = ("--notify-keyspace-events", "Kg", *BUSY_OPTIONS)
        cluster = stack.enter_context(
            Cluster(
                models,
                nursery,
                append_only=True,
                tcp=True,
                options=options,
                compile="graph",
                drain_s="0.5",
                result_ttl_s=str(RESULT_TTL_S),
            )
        )
        proxies = [stack.enter_context(Proxy(cluster.port)) for _ in range(NUM_WORKERS + 1)]
        recorder = stack.enter_context(Recorder(cluster.server.url, api_key=LOAD_KEY))
        *worker_proxies, api_proxy = proxies
        maker = FaultMaker(cluster, worker_proxies, api_proxy, rng)
        cluster.start_api(api_proxy.url, api_keys=f"load:{LOAD_KEY} hostile:{HOSTILE_KEY}")
        maker.restart_dead()
        cluster.ensure_workers(NUM_WORKERS)
        recomputed = Recomputed(cluster.server.url)
        recomputed.start()
        stack.callback(recomputed.stop)
        downtime = Downtime(cluster)
        downtime.start()
        stack.callback(downtime.stop)
        book = Book(reference, maker.garbled)
        load = recorder.keep_busy(cluster.api.url, asks, num_streams, book.enter)
        try:
            break_for(seconds, maker, load, rng)
        finally:
            maker.heal()
            load.stop()
        remains = what_remains(cluster)
        is_right = not (book.losses or book.differences or remains or downtime.ended_by_themselves)
        return is_right, report(book, maker, recomputed, downtime, remains, cluster.take_complaints())


def fault_free(models: dict[str, str], asks: list[Ask], nursery: Nursery) -> Reference:
    """The fault-free answers to all requests, from a deployment without faults."""

    def answer(asks: "list[Ask] | tuple[Ask, ...]") -> list[Answer]:
        with Cluster(models, nursery, **UNHURRIED) as cluster, Recorder(cluster.server.url) as recorder:
            cluster.start_worker()
            api = cluster.start_api()
            return recorder.start(api.url, asks).wait()

    reference = Reference(answer)
    reference.prepare(asks)
    return reference


def find_garbled_faults(answer: Answer, expected: Expected) -> list[str]:
    """Mistakes in the answer of a garbled request: it may end early, but only once, and after right text."""
    if answer.is_complete:
        return [] if answer.text == expected.text else [f"text {answer.text!r} instead of {expected.text!r}"]
    return find_partial_faults(answer, expected)


def break_for(seconds: float, maker: FaultMaker, load: Load, rng: random.Random) -> None:
    """Causes one fault after another; no request meets more than two crashes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        maker.restart_dead()
        oldest = min((answer.sent_at for answer in list(load.open_answers)), default=time.monotonic())
        num_met = sum(at >= oldest for at in maker.crash_times)
        maker.strike(may_crash=num_met < MAX_NUM_CRASHES_MET)
        pause_until = time.monotonic() + rng.uniform(MIN_PAUSE_S, MAX_PAUSE_S)
        while time.monotonic() < min(pause_until, end):
            maker.restart_dead()
            time.sleep(0.05)


def what_remains(cluster: Cluster) -> list[str]:
    """Checks C5, and C4 when everything has expired but the jobs of aborted requests, which live longest."""
    try:
        check_quiet(cluster.connection, BASE)
        wait_until(lambda: not lasting_keys(cluster.connection), CANCELED_TTL_S + RESULT_TTL_S)
        check_expiry(cluster.connection, RESULT_TTL_S)
    except AssertionError as error:
        return [str(error), *lasting_keys(cluster.connection)]
    return []


def report(
    book: Book,
    maker: FaultMaker,
    recomputed: Recomputed,
    downtime: Downtime,
    remains: list[str],
    complaints: list[str],
) -> list[str]:
    """The table, below a list of everything that went wrong."""
    recoveries = [book.recovery_s(at) for at in maker.crash_times] or [0.0]
    kinds = Counter(name for _, name in maker.struck)
    rows = {
        "requests accepted": str(book.num_accepted),
        "refused at once (429, 503)": str(book.num_refused),
        "with a garbled record": str(book.num_garbled),
        "failed": str(len(book.losses)),
        "token differences": str(len(book.differences)),
        "keys left": str(len(remains)),
        "faults": f"{len(maker.struck)}: " + ", ".join(f"{n} {name}" for name, n in kinds.most_common()),
        "hostile connections": ", ".join(f"{n} {way}" for way, n in maker.neighbors.ways.most_common()),
        "longest pause": describe_pause(*book.longest_pause(), maker.struck),
        "recovery from a crash": f"{statistics.median(recoveries):.2f} s median, {max(recoveries):.2f} s max",
        "moved requests": str(recomputed.num_requests),
        "tokens recomputed": str(recomputed.num_tokens),
        "longest worker outage": describe_outage(downtime.outages),
        "ended by themselves": ", ".join(downtime.ended_by_themselves) or "0",
        "complaints in logs": str(len(complaints)),
    }
    width = max(map(len, rows))
    table = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    return [*book.losses, *book.differences, *remains, *complaints, *table]


def describe_outage(outages: list[Outage]) -> str:
    """The longest outage without the start of the successor, which no supervisor can shorten."""
    longest = max(outages, key=lambda outage: outage.beyond_start_s, default=Outage(0.0, 0.0))
    return f"{longest.beyond_start_s:.2f} s, and {longest.start_s:.2f} s in which its successor started"


def describe_pause(start: float, end: float, struck: list[tuple[float, str]]) -> str:
    """One line about a pause: its length, and the faults in it with the seconds since its beginning."""
    faults = ", ".join(f"{name} at {at - start:.1f}" for at, name in struck if start - 1 <= at <= end)
    return f"{end - start:.2f} s ({faults or 'no fault'})"


def _is_open(times: "array[float]", at: float) -> bool:
    return times[0] < at < times[-1]


def _next(times: "array[float]", at: float) -> float:
    return next(time for time in times if time > at)


if __name__ == "__main__":
    sys.exit(main())

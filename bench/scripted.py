"""Workers that repeat a fixed text instead of running a model, to measure the cost of all other parts.

`rq worker -w bench.scripted.ScriptedWorker`; `MeteredWorker` also measures the CPU time spent in Redis code.
"""

import functools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from pydantic_settings import SettingsConfigDict
from redis.connection import AbstractConnection

from shared.settings import Settings, WorkerSettings
from worker.engine.adapter_cache import AdapterCache
from worker.engine.sequence import Batch, Sampled, SampledToken
from worker.engine.served_models import ServedModel, ServedModels
from worker.lora_worker import LoraWorker
from worker.model.tokenizer import Tokenizer

TEXT = "the river runs past a stone bridge and a garden in the morning while the captain writes a letter home"
BLOCK_SIZE = 16
NUM_BLOCKS = 1 << 16
MAX_MODEL_LEN = 1 << 13
VERSION = "script"


class ScriptSettings(Settings):
    """Settings of a scripted worker."""

    model_config = SettingsConfigDict(env_prefix="LORELAY_BENCH_", frozen=True)

    step_s: float = 0.0
    """Duration of a step, for which the engine's thread sleeps."""
    meter_file: str = ""
    """File to which `MeteredWorker` writes its `Meter`, as JSON."""


class NoWeights:
    """An adapter without weights."""

    num_bytes = 0


class NoStore:
    """An adapter store that returns `NoWeights`."""

    def read(self, name: str) -> NoWeights:
        """Returns an adapter without reading a file."""
        return NoWeights()

    def put(self, name: str, weights: NoWeights, slot: int) -> None:
        """Does nothing."""

    def clear(self, slot: int) -> None:
        """Does nothing."""


class ScriptedRunner:
    """A model that repeats the same words, one token per step; each step takes `step_s`."""

    block_size = BLOCK_SIZE
    num_blocks = NUM_BLOCKS
    max_model_len = MAX_MODEL_LEN
    forward_state = "scripted"
    dtype = "none"

    def __init__(self, settings: WorkerSettings, step_s: float) -> None:
        tokenizer = Tokenizer.load(settings.model)
        self.vocab_size = 2**31
        self.served = ServedModels(ServedModel(settings.base_name, VERSION, settings.model, tokenizer, 1))
        for name, path in settings.adapters:
            self.served.add(ServedModel(name, VERSION, path, tokenizer, 1, name))
        self.adapter_cache = AdapterCache(
            NoStore(), ThreadPoolExecutor(1), num_slots=settings.max_batch_size, max_num_bytes=1
        )
        self._step_s = step_s
        token_ids = tokenizer.encode_chat([{"role": "user", "content": TEXT}])
        self._words = [SampledToken(word) for word in token_ids if tokenizer.decode([word]).strip()]

    def run(self, batch: Batch) -> list[Sampled]:
        """Returns the next word of each sequence."""
        if self._step_s:
            time.sleep(self._step_s)
        words = self._words
        return [words[item.seq.num_output_tokens % len(words)] for item in batch if item.samples]

    def close(self) -> None:
        """Does nothing, because there is no background work."""


class ScriptedWorker(LoraWorker):
    """A LoraWorker with a `ScriptedRunner` as its model."""

    def load_model(self, settings: WorkerSettings) -> Any:
        return ScriptedRunner(settings, ScriptSettings.load().step_s)


class Meter(msgspec.Struct, frozen=True):
    """CPU time and number of calls in redis-py's connections between the engine's first and last step."""

    num_steps: int
    engine_cpu_s: float
    """CPU time of the engine's thread."""
    num_engine_calls: int
    other_cpu_s: float
    """CPU time of all other threads."""
    num_other_calls: int


class MeteredWorker(ScriptedWorker):
    """A ScriptedWorker that writes a `Meter` to a file when it ends."""

    def work(self, *args: Any, **kwargs: Any) -> bool:
        self._redis_times = RedisTimes()
        self._redis_times.install()
        try:
            return super().work(*args, **kwargs)
        finally:
            meter = self._model_runner.meter()
            Path(ScriptSettings.load().meter_file).write_bytes(msgspec.json.encode(meter))

    def load_model(self, settings: WorkerSettings) -> Any:
        self._model_runner = MeteredRunner(settings, ScriptSettings.load().step_s, self._redis_times)
        return self._model_runner


class RedisTimes:
    """CPU time (`time.thread_time`) that each thread spent sending to Redis and reading from it.

    `install` wraps the two methods through which redis-py sends every command and reads every reply.
    """

    def __init__(self) -> None:
        self.cpu_s: dict[int, float] = defaultdict(float)
        """CPU seconds by thread."""
        self.num_calls: Counter[int] = Counter()

    def install(self) -> None:
        """Wraps the two methods until the process ends."""
        for name in ("send_packed_command", "read_response"):
            setattr(AbstractConnection, name, self._timed(getattr(AbstractConnection, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            thread, started_s = threading.get_ident(), time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.cpu_s[thread] += time.thread_time() - started_s
                self.num_calls[thread] += 1

        return timed


class MeteredRunner(ScriptedRunner):
    """A ScriptedRunner that records the Redis times before each step."""

    def __init__(self, settings: WorkerSettings, step_s: float, times: RedisTimes) -> None:
        super().__init__(settings, step_s)
        self._times = times
        self._first: RedisTimes | None = None
        self._last = RedisTimes()
        self._num_steps = 0
        self._thread = 0

    def run(self, batch: Batch) -> list[Sampled]:
        """Records the Redis times, then runs the step."""
        self._thread = threading.get_ident()
        self._last = RedisTimes()
        self._last.cpu_s, self._last.num_calls = self._times.cpu_s.copy(), self._times.num_calls.copy()
        self._first = self._first or self._last
        self._num_steps += 1
        return super().run(batch)

    def meter(self) -> Meter:
        """Returns the calls and the CPU time between the first step and the last."""
        first, last = self._first or self._last, self._last
        cpu_s = {thread: total_s - first.cpu_s[thread] for thread, total_s in last.cpu_s.items()}
        num_calls = last.num_calls - first.num_calls
        engine_cpu_s, num_engine_calls = cpu_s.pop(self._thread, 0.0), num_calls.pop(self._thread, 0)
        return Meter(
            num_steps=self._num_steps,
            engine_cpu_s=engine_cpu_s,
            num_engine_calls=num_engine_calls,
            other_cpu_s=sum(cpu_s.values()),
            num_other_calls=num_calls.total(),
        )

"""All settings: frozen objects, read from `LORELAY_*` environment variables and checked at once.

A malformed value raises `ConfigurationError`, which names the variable. The flags of `lorelay serve` set the
same variables.
"""

import math
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.errors import ConfigurationError

ENV_PREFIX = "LORELAY_"

MAX_DURATION = 1e9
"""Longest duration in seconds, some thirty years. An infinite one would be an error in Redis."""
Seconds = Annotated[float, Field(gt=0, le=MAX_DURATION)]
Count = Annotated[int, Field(gt=0)]


class AdapterSource(NamedTuple):
    """One configured adapter: the name that clients use, and a local folder or a Hugging Face id."""

    name: str
    path: str


def parse_adapters(value: Any) -> Any:
    """Parses `"a=path b=path @file"`, or one bare path, whose folder's name becomes the adapter's.

    Raises:
        ValueError: an entry is malformed, a name is used twice or is `default`, or a file can't be read; for
            an entry of a file, the message has the file's name and the line.
    """
    entries = shlex.split(value) if isinstance(value, str) else value
    if entries and isinstance(entries[0], AdapterSource):
        return entries
    if len(entries) == 1 and "=" not in entries[0] and not entries[0].startswith("@"):
        entries = [f"{Path(entries[0]).name}={entries[0]}"]
    sources: dict[str, AdapterSource] = {}
    for entry in entries:
        for source, where in _read_list(entry[1:]) if entry.startswith("@") else [(_parse_named(entry), "")]:
            if source.name in sources:
                raise ValueError(f"{where}adapter name {source.name!r} is given twice")
            sources[source.name] = source
    return tuple(sources.values())


def _read_list(path: str) -> Iterator[tuple[AdapterSource, str]]:
    """The adapters of a file with one `name=path` per line, each with its file and line.

    Blank lines and lines that begin with `#` are skipped. Paths may be relative to the file's folder.
    """
    file = Path(path).expanduser().absolute()
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't read {path!r}: {getattr(error, 'strerror', error)}") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}: "
        try:
            source = _parse_named(line)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        yield AdapterSource(source.name, _beside(file.parent, source.path)), where


def _beside(folder: Path, path: str) -> str:
    """A path from a file in `folder`, made absolute; a Hugging Face id stays unchanged."""
    named = folder / Path(path).expanduser()
    return str(named) if named.is_dir() or path.startswith((".", "~")) else path


def _parse_named(entry: str) -> AdapterSource:
    name, equals, path = entry.partition("=")
    if not (name and equals and path):
        raise ValueError(f"{entry!r} is not of the form name=path")
    _check_name(name)
    if name == "default":
        raise ValueError("no adapter may be called 'default': that is RQ's name for no queue at all")
    return AdapterSource(name, path)


def parse_weights(value: Any) -> Any:
    """Parses `"a=2 b=0.5"`, weights by model name.

    Raises:
        ValueError: an entry is malformed, a name is used twice, or a weight is no positive number.
    """
    if not isinstance(value, str):
        return value
    weights: dict[str, float] = {}
    for entry in shlex.split(value):
        name, _, weight = entry.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not name or name in weights or not 0 < number < math.inf:
            raise ValueError(
                f"{entry!r} is not of the form name=weight, with a positive number, once per name"
            )
        weights[name] = number
    return weights


def _check_name(name: str) -> None:
    """Refuses names that no URL can carry.

    Raises:
        ValueError: the name consists of dots, or has a character that can't be printed.
    """
    if name in (".", "..") or not name.isprintable():
        raise ValueError(f"{name!r} can't be the name of a model")


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/lorelay`, or `~/.local/state/lorelay`."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "lorelay"


def _split_words(value: Any) -> Any:
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


Adapters = Annotated[tuple[AdapterSource, ...], NoDecode, BeforeValidator(parse_adapters)]
Weights = Annotated[Mapping[str, float], NoDecode, BeforeValidator(parse_weights)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_words)]
Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class Settings(BaseSettings):
    """Base of all settings objects."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True
    )

    @classmethod
    def load(cls, **values: Any) -> Self:
        """The settings from `values`; fields that are missing there come from the environment.

        Raises:
            ConfigurationError: names the first variable that is missing or malformed, and why.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = f"{ENV_PREFIX}{first['loc'][0]}".upper() if first["loc"] else ""
            raise ConfigurationError(f"{name}: {first['msg']}".removeprefix(": "), param=name) from error


class RedisSettings(Settings):
    """The Redis server that has the queue."""

    redis_url: str
    """A `redis://`, `rediss://` (TLS) or `unix://` URL, with user and password where needed."""

    @field_validator("redis_url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("is not a redis://, rediss:// or unix:// URL")
        return url


class ServeSettings(Settings):
    """Settings of `lorelay serve` alone: its address, the number of workers, the embedded server's folder."""

    server_name: str = "0.0.0.0"
    server_port: Annotated[int, Field(ge=1, le=65535)] = 23333
    redis_url: str | None = None
    """None starts an embedded server."""
    state_dir: Path = Field(default_factory=default_state_dir)
    workers: Count = 1


class ApiSettings(Settings):
    """Settings of an API process."""

    log_level: LogLevel = "INFO"
    api_keys: Words = ()
    """Keys that clients may send; if empty, requests need none."""
    max_queue_depth: Count = 1_000
    max_total_queue_depth: Count = 10_000
    queue_time_limit_s: Seconds = 60
    generation_limit_s: Seconds = 600
    first_event_wait_s: Seconds = 10
    """Longest wait for the first token before a stream's headers are sent."""
    max_silence_s: Seconds = 0.5
    """Silence on a stream after which the API reads its log."""
    max_inbox_events: Count = 256
    """Events buffered for a slow client; further ones are read from the log."""
    max_body_bytes: Count = 4 * 1024 * 1024
    redis_timeout_s: Seconds = 2
    api_lease_s: Seconds = 6
    """Time after which the requests of a silent API process are aborted, unless they are detached."""
    api_drain_s: Seconds = 30
    result_ttl_s: Count = 300
    failure_ttl_s: Count = 24 * 3600


class WorkerSettings(Settings):
    """Settings of a worker: model, adapters, engine, leases."""

    log_level: LogLevel = "INFO"
    """Overridden by `rq worker`'s `--logging_level`, `-v` and `-q`."""
    model: str
    """Folder or Hugging Face id of the base model."""
    model_name: str = ""
    """The base's name for clients; by default `model`, or the last part of it if it is a folder."""
    adapters: Adapters = ()
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    """`auto` takes the first GPU, or the CPU if there is none."""
    dtype: Dtype = "auto"
    session_len: Count | None = None
    """Context length in tokens; by default the model's own."""
    max_batch_size: Count = 32
    max_prefill_tokens: Count = 2048
    """Most prompt tokens in one step, however fast the device is."""
    step_target_ms: Annotated[float, Field(gt=0, le=MAX_DURATION)] = 100
    """Aim for the duration of a step with prompt tokens; long prompts are divided into chunks by it."""
    cache_max_entry_count: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the free device memory that the KV cache may take."""
    cache_max_bytes: Count | None = None
    """Largest KV cache; by default 2 GiB on a CPU, and on a GPU only limited by `cache_max_entry_count`."""
    block_size: Count = 16
    prefix_cache: bool = True
    """If true, requests of one model whose prompts begin alike share blocks of the KV cache."""
    max_resident_adapters: Count | None = None
    """Slots on the device; by default `max_batch_size`, so that no batch waits for a slot.

    There are fewer by default if that many of the largest adapter exceed a tenth of the free device memory.
    """
    max_cached_adapter_bytes: Count | None = None
    """Host memory for adapters without a slot; by default a tenth of what is free at the start."""
    max_wait_s: Seconds = 1
    """Wait after which a request for an adapter without a slot may evict another one that is in demand."""
    adapter_weights: Weights = {}
    """Shares by model name, where the requests of several adapters, or of the base, wait; others have 1."""
    compile: Literal["off", "kernels", "graph"] = "graph"
    """Products of the machine's C++ compiler, on a CPU: nothing, the kernels, or the kernels and, in the
    background, the compiled forward pass."""
    num_threads: Count | None = None
    """CPU threads of the forward pass; by default torch's own choice."""
    lease_s: Seconds = 4
    heartbeat_s: Seconds = 1
    reap_s: Seconds = 0.5
    poll_s: Seconds = 0.2
    """Longest time between two appends while requests are held; the reply of each tells of aborts."""
    sweep_s: Seconds = 5
    """Interval at which a worker looks for queues that were changed with RQ's tools."""
    api_lease_s: Seconds = 6
    """Time after which a silent API process counts as dead; must be the same in all processes."""
    step_limit_s: Seconds = 60
    """Longest step; a worker whose step takes longer counts as hung and ends itself."""
    max_crashes_alone: Count = 3
    """Crashes of its worker while a request ran alone, after which the request ends as failed."""
    drain_s: Seconds = 30
    """Time that running requests have after SIGTERM before they are handed back to their queues."""
    step_delay_s: Annotated[float, Field(ge=0, le=MAX_DURATION)] = 0
    """Pause after each step, for tests."""
    faults: str = ""
    """Deliberate faults, for tests: see `worker/serving/faults.py`."""
    stream_ttl_s: Seconds = 3_600
    """Life of a token log after the last append."""
    result_ttl_s: Count = 300
    failure_ttl_s: Count = 24 * 3600

    @model_validator(mode="after")
    def _leases_are_renewed_in_time(self) -> Self:
        if self.heartbeat_s >= self.lease_s:
            raise ValueError(
                f"{ENV_PREFIX}HEARTBEAT_S ({self.heartbeat_s:g}) must be shorter than {ENV_PREFIX}LEASE_S "
                f"({self.lease_s:g}): a healthy worker would lose its requests"
            )
        return self

    @model_validator(mode="after")
    def _names_are_apart(self) -> Self:
        _check_name(self.base_name)
        if self.base_name in (source.name for source in self.adapters):
            raise ValueError(f"an adapter and the base model are both called {self.base_name!r}")
        return self

    @property
    def base_name(self) -> str:
        """The base model's name for clients."""
        if self.model_name:
            return self.model_name
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

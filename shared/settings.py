"""All settings, as immutable objects that are read from `LORELAY_*` environment variables and validated.

A malformed value raises a `ConfigurationError` that names the variable. The flags of `lorelay serve` set
these variables, too.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.api_keys import entries_of_file, parse_keys, read_keys_file, split_keys
from shared.errors import ConfigurationError
from shared.paths import expand_home, split_revision
from shared.setting_lists import AdapterSource, check_name, parse_adapters, parse_weights

ENV_PREFIX = "LORELAY_"

MAX_DURATION = 1e9
"""Maximum for a duration in seconds, about 30 years. Redis would refuse an infinite duration."""
Seconds = Annotated[float, Field(gt=0, le=MAX_DURATION)]
Count = Annotated[int, Field(gt=0)]


def default_state_dir() -> Path:
    """Returns `$XDG_STATE_HOME/lorelay`, or `~/.local/state/lorelay` if that variable is not set."""
    # `~` is replaced where the folder is used: a user without a home folder may use Redis instead.
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "lorelay"


def _check_keys(value: Any) -> Any:
    entries = split_keys(value) if isinstance(value, str) else value
    parse_keys(entries)
    return entries


def _check_keys_file(path: Path) -> Path:
    path = expand_home(path).absolute()
    try:
        parse_keys(entries_of_file(read_keys_file(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return path


def _check_origins(value: Any) -> Any:
    """Splits a text into origins; raises an error for an origin with a path, or in capital letters."""
    origins = tuple(value.replace(",", " ").split()) if isinstance(value, str) else value
    for origin in origins:
        if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
            raise ValueError(
                f"{origin!r} is not an origin, that is scheme and host in lower case without a final slash, "
                "such as https://chat.example.com or http://localhost:3000; or * for all"
            )
    return origins


Adapters = Annotated[tuple[AdapterSource, ...], NoDecode, BeforeValidator(parse_adapters)]
Weights = Annotated[Mapping[str, float], NoDecode, BeforeValidator(parse_weights)]
KeyEntries = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_check_keys), Field(repr=False)]
KeysFile = Annotated[Path, AfterValidator(_check_keys_file)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_check_origins)]
Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class Settings(BaseSettings):
    """Base class of all settings."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )

    @classmethod
    def load(cls, **values: Any) -> Self:
        """Creates the settings from `values`; missing fields are read from the environment.

        Raises:
            ConfigurationError: a variable is missing or malformed; the message has its name and the reason.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = f"{ENV_PREFIX}{first['loc'][0]}".upper() if first["loc"] else ""
            raise ConfigurationError(f"{name}: {first['msg']}".removeprefix(": "), param=name) from error


class RedisSettings(Settings):
    """The address of the Redis server."""

    redis_url: str
    """A `redis://`, `rediss://` (TLS) or `unix://` URL, with user and password if the server needs them."""

    @field_validator("redis_url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("is not a redis://, rediss:// or unix:// URL")
        return url


class ServeSettings(Settings):
    """Settings that only `lorelay serve` reads: address, number of workers, folder of the embedded server."""

    server_name: str = "0.0.0.0"
    server_port: Annotated[int, Field(ge=1, le=65535)] = 23333
    redis_url: str | None = None
    """The Redis server to use; None starts an embedded Valkey."""
    keep_alive_s: Count = 75
    """Seconds for which an idle connection of a client stays open after a response."""
    state_dir: Path = Field(default_factory=default_state_dir)
    workers: Count = 1


class ApiSettings(Settings):
    """Settings of an API process."""

    log_level: LogLevel = "INFO"
    api_keys: KeyEntries = ()
    """API keys that are accepted, as `name:key` or `key`; if there are none, requests need no key."""
    api_keys_file: KeysFile | None = None
    """File with further API keys, which is read again while the process runs."""
    cors_origins: Origins = ()
    """Origins of web pages whose scripts may call the API from a browser; `*` stands for all."""
    max_queue_depth: Count = 1_000
    max_total_queue_depth: Count = 10_000
    max_queue_bytes: Count = 256 * 1024 * 1024
    """Maximum size of all requests that wait for a base and its adapters, prompts included."""
    max_sequences_per_request: Count = 256
    """Maximum number of sequences of one request: the number of its prompts times `n`."""
    max_tenant_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of these limits that requests of one API key may use; ignored for requests without a key."""
    queue_time_limit_s: Seconds = 60
    no_worker_wait_s: Seconds = 5
    """Maximum wait of a request, within its queue time limit, for a model that no live worker serves."""
    generation_limit_s: Seconds = 600
    first_event_wait_s: Seconds = 10
    """Maximum wait for the first token before a stream's headers are sent without it."""
    max_silence_s: Seconds = 0.5
    """Seconds without an event for a stream, after which the API reads the stream's log in Redis."""
    json_whitespace: Literal["compact", "flexible"] = "compact"
    """White space in answers that must be JSON: none, or as the model likes."""
    max_inbox_events: Count = 256
    """Maximum number of events buffered per stream; the API reads further events from the log."""
    max_body_bytes: Count = 4 * 1024 * 1024
    max_arriving_bytes: Count = 64 * 1024 * 1024
    """Maximum size of all request bodies that are being received or parsed at one time."""
    max_connections: Count = 4_096
    head_limit_s: Seconds = 10
    """Maximum time for a request's line and headers to arrive."""
    body_limit_s: Seconds = 60
    """Maximum time for a request's body to arrive."""
    send_limit_s: Seconds = 60
    """Time after which a connection is cut whose client reads nothing of what waits for it."""
    redis_timeout_s: Seconds = 2
    api_lease_s: Seconds = 6
    """Lease of an API process; when it expires, workers abort the API's requests that are not detached."""
    api_drain_s: Seconds = 30
    result_ttl_s: Count = 300
    failure_ttl_s: Count = 24 * 3600


class WorkerSettings(Settings):
    """Settings of a worker: model, adapters, engine, leases, shutdown."""

    log_level: LogLevel = "INFO"
    """Overridden by `rq worker`'s `--logging_level`, `-v` and `-q`."""
    model: str
    """Folder or Hugging Face id of the base model."""
    model_name: str = ""
    """The name by which clients ask for the base; by default `model`, or if that is a folder, its name."""
    adapters: Adapters = ()
    revision: str | None = None
    trust_remote_code: bool = False
    control_tokens_in_text: bool = False
    """If true, the text of a control token in a message or prompt becomes that token."""
    device: str = "auto"
    """`auto` takes the first GPU, or the CPU if there is none."""
    dtype: Dtype = "auto"
    session_len: Count | None = None
    """Context length in tokens; by default the one in the model's configuration."""
    max_batch_size: Count = 32
    max_prefill_tokens: Count = 2048
    """Maximum number of prompt tokens in one step; `step_target_ms` may lower it."""
    step_target_ms: Annotated[float, Field(gt=0, le=MAX_DURATION)] = 100
    """Target duration of a step with prompt tokens; long prompts are split into chunks to meet the target."""
    cache_max_entry_count: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the free device memory that the KV cache may take."""
    cache_max_bytes: Count | None = None
    """Maximum size of the KV cache; by default 2 GiB on a CPU, and unlimited on a GPU."""
    block_size: Count = 16
    prefix_cache: bool = True
    """If true, requests of one model and one API key share the KV cache blocks of equal beginnings."""
    share_prefixes_between_tenants: bool = False
    """If true, requests with different API keys share these blocks, too."""
    max_resident_adapters: Count | None = None
    """Number of adapter slots on the device.

    By default `max_batch_size`, so that every sequence of a batch can use another adapter; fewer if so many
    slots, each as large as the largest adapter, would take more than a tenth of the free device memory.
    """
    max_cached_adapter_bytes: Count | None = None
    """Host memory for adapters without a slot; by default a tenth of the memory that is free at start."""
    max_wait_s: Seconds = 1
    """Time that a request for an adapter without a slot waits before it may evict an adapter in demand."""
    adapter_weights: Weights = {}
    """Fairness weights by model name, used while several models have waiting requests; the default is 1."""
    compile: Literal["off", "kernels", "graph"] = "graph"
    """Code that a CPU worker builds with the C++ compiler: nothing, the kernels, or the kernels and, in the
    background, the compiled forward pass."""
    num_threads: Count | None = None
    """Number of CPU threads of the forward pass; by default torch decides."""
    lease_s: Seconds = 4
    heartbeat_s: Seconds = 1
    reap_s: Seconds = 0.5
    poll_s: Seconds = 0.2
    """Maximum time between two calls of `append` while requests run; each reply lists aborted requests."""
    sweep_s: Seconds = 5
    """Interval at which a worker checks for queues that were changed with RQ's tools."""
    api_lease_s: Seconds = 6
    """Lease after which an API process counts as dead; must be equal in all API processes and workers."""
    step_limit_s: Seconds = 60
    """Maximum duration of a step; a worker whose step takes longer counts as hung and ends itself."""
    max_crashes_alone: Count = 3
    """Number of times a request may crash its worker while it runs alone, before it ends as failed."""
    drain_s: Seconds = 30
    """Time that running requests have to finish after SIGTERM; then unfinished requests are handed back."""
    step_delay_s: Annotated[float, Field(ge=0, le=MAX_DURATION)] = 0
    """Pause after each step, for tests."""
    faults: str = ""
    """Faults to inject, for tests: see `worker/serving/faults.py`."""
    stream_ttl_s: Seconds = 3_600
    """Time to live of a token log after its last append."""
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
        check_name(self.base_name)
        if self.base_name in (source.name for source in self.adapters):
            raise ValueError(f"an adapter and the base model are both called {self.base_name!r}")
        return self

    @property
    def base_name(self) -> str:
        """The name by which clients ask for the base model."""
        if self.model_name:
            return self.model_name
        folder = Path(self.model)
        return folder.resolve().name if folder.is_dir() else split_revision(self.model)[0]

"""The checks of `lorelay serve` before it starts a process: settings, folders, port, GPUs."""

import importlib.util
import os
import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorelay.devices import visible_gpus, worker_environments
from shared.control_groups import num_usable_cores
from shared.errors import ConfigurationError
from shared.paths import expand_home
from shared.settings import ENV_PREFIX, ApiSettings, RedisSettings, ServeSettings, WorkerSettings

MAX_VARIABLE_BYTES = 120_000
"""Maximum size of an environment variable; Linux accepts 128 KiB, name included."""


@dataclass(frozen=True)
class SslFiles:
    """Absolute paths of the TLS key and certificate."""

    keyfile: Path
    certfile: Path


@dataclass(frozen=True)
class ServePlan:
    """The checked settings, and the environment variables that pass them to the child processes."""

    serve: ServeSettings
    api: ApiSettings
    worker: WorkerSettings
    """Settings of the workers, with absolute paths."""
    ssl_files: SslFiles | None
    variables: Mapping[str, str]
    """Environment variables of all child processes."""
    worker_variables: tuple[Mapping[str, str], ...]
    """Additional environment variables, one mapping per worker."""

    @property
    def url(self) -> str:
        """The API's URL as seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(
            self.serve.server_name, self.serve.server_name
        )
        shown = f"[{host}]" if ":" in host else host
        return f"http{'s' if self.ssl_files else ''}://{shown}:{self.serve.server_port}"


def make_plan(values: Mapping[str, Any], variables: Mapping[str, str], *, use_ssl: bool) -> ServePlan:
    """Checks flags and environment.

    Both `values` and `variables` have the values of the given flags: `values` by the name of the setting,
    `variables` by the name of the environment variable.

    Raises:
        ConfigurationError: a value is missing or malformed, a path is not a folder, the port is in use, there
            are more workers than GPUs, or a package is missing.
    """
    serve = ServeSettings.load(**_pick(values, ServeSettings))
    if serve.redis_url:
        RedisSettings.load(redis_url=serve.redis_url)
    api = ApiSettings.load(**_pick(values, ApiSettings))
    worker, adapters = _with_absolute_paths(_pick(values, WorkerSettings))
    files = _ssl_files(os.environ) if use_ssl else None
    gpus = visible_gpus(os.environ) if worker.device != "cpu" else []
    worker_variables = worker_environments(worker, serve.workers, gpus, num_usable_cores())
    if importlib.util.find_spec("torch") is None:
        raise ConfigurationError(
            "the worker's packages are not installed: pip install -e '.[worker]' in the checkout"
        )
    check_port_free(serve.server_name, serve.server_port)
    resolved = {
        "LORELAY_MODEL": worker.model,
        "LORELAY_MODEL_NAME": worker.base_name,
        "LORELAY_ADAPTERS": adapters,
    }
    if api.api_keys_file is not None:
        # An API process runs in another working directory, so it would not find a relative path.
        resolved["LORELAY_API_KEYS_FILE"] = str(api.api_keys_file)
    return ServePlan(serve, api, worker, files, {**variables, **resolved}, tuple(worker_variables))


def check_port_free(host: str, port: int, setting: str = "LORELAY_SERVER_PORT (--server-port)") -> None:
    """Checks that a server can listen on this address.

    Raises:
        ConfigurationError: the address can't be used; the message names the setting and the reason.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise ConfigurationError(f"LORELAY_SERVER_NAME: {host!r} is no address: {error.strerror}") from error
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise ConfigurationError(f"{setting}: can't listen on {host}:{port}: {reason}") from error


def _with_absolute_paths(values: Mapping[str, Any]) -> tuple[WorkerSettings, str]:
    """Returns the worker's settings and its `LORELAY_ADAPTERS`, with absolute paths.

    Relative paths would not be found, because workers run in another working directory."""
    model = _resolve(WorkerSettings.load(**values).model, "LORELAY_MODEL (MODEL)")
    entries = values.get("adapters")
    if entries is None:
        entries = shlex.split(os.environ.get(f"{ENV_PREFIX}ADAPTERS", ""))
    entries = [_absolute_entry(entry) for entry in entries]
    settings = WorkerSettings.load(**{**values, "model": model, "adapters": entries})
    for source in settings.adapters:
        _resolve(source.path, f"LORELAY_ADAPTERS (--adapters): {source.name}")
    return settings, _adapters_variable(entries)


def _absolute_entry(entry: str) -> str:
    """Makes the path in an entry (`name=path`, `@file` or a path alone) absolute."""
    if entry.startswith("@"):
        return f"@{_expand(entry[1:], 'LORELAY_ADAPTERS (--adapters)').absolute()}"
    name, equals, path = entry.partition("=")
    if not equals:
        return _resolve(entry, "LORELAY_ADAPTERS (--adapters)")
    return f"{name}={_resolve(path, f'LORELAY_ADAPTERS (--adapters): {name}')}"


def _resolve(path: str, setting: str) -> str:
    """Returns the absolute path of a folder; returns a Hugging Face id unchanged."""
    folder = _expand(path, setting)
    if folder.is_dir():
        return str(folder.absolute())
    if folder.exists() or re.match(r"[./~]", path):
        raise ConfigurationError(f"{setting}: {path} is no folder")
    return path


def _expand(path: str, setting: str) -> Path:
    try:
        return expand_home(path)
    except ValueError as error:
        raise ConfigurationError(f"{setting}: {error}") from error


def _adapters_variable(entries: Sequence[str]) -> str:
    """Returns the value of `LORELAY_ADAPTERS`; an entry `@file` stands for all adapters in the file.

    Raises:
        ConfigurationError: the value is longer than an environment variable may be.
    """
    variable = shlex.join(entries)
    if len(variable.encode()) > MAX_VARIABLE_BYTES:
        raise ConfigurationError(
            f"LORELAY_ADAPTERS (--adapters): {len(entries)} adapters don't fit into an environment variable; "
            "write them into a file, one name=path per line, and give @FILE"
        )
    return variable


def _ssl_files(environ: Mapping[str, str]) -> SslFiles:
    paths = []
    for name in ("SSL_KEYFILE", "SSL_CERTFILE"):
        value = environ.get(name)
        if not value:
            raise ConfigurationError(f"{name}: is not set, and --ssl needs it")
        if not Path(value).is_file():
            raise ConfigurationError(f"{name}: {value} is no file")
        paths.append(Path(value).absolute())
    return SslFiles(*paths)


def _pick(values: Mapping[str, Any], owner: type[Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in owner.model_fields}

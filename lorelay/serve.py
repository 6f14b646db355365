"""`lorelay serve`: checks everything first (`make_plan`), then starts and supervises the parts (`serve`)."""

import contextlib
import http.client
import importlib.util
import math
import os
import re
import signal
import socket
import ssl
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import redis

from lorelay import embedded
from lorelay.devices import num_usable_cores, visible_gpus, worker_environments
from lorelay.status import live_workers
from lorelay.supervisor import ChildFailed, ChildSpec, Signals, Supervisor, say
from shared.errors import ConfigurationError
from shared.queue import registry
from shared.queue.connections import check_server
from shared.queue.refusals import explain
from shared.settings import AdapterSource, ApiSettings, RedisSettings, ServeSettings, WorkerSettings

ROOT = Path(__file__).resolve().parent.parent
"""Where `api` and `worker` are."""
SERVER_START_LIMIT_S = 60.0
STOP_MARGIN_S = 10.0
MAX_VARIABLE_BYTES = 120_000
"""Linux takes 128 KiB, name included."""
API = "api"
SERVER = "server"


@dataclass(frozen=True)
class SslFiles:
    """Absolute paths of key and certificate."""

    keyfile: Path
    certfile: Path


@dataclass(frozen=True)
class ServePlan:
    """All that `serve` needs, checked."""

    serve: ServeSettings
    api: ApiSettings
    worker: WorkerSettings
    """With absolute paths."""
    ssl_files: SslFiles | None
    variables: Mapping[str, str]
    """What all children get."""
    worker_variables: tuple[Mapping[str, str], ...]
    """What each worker gets beside that."""

    @property
    def url(self) -> str:
        """The API's URL as seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(
            self.serve.server_name, self.serve.server_name
        )
        shown = f"[{host}]" if ":" in host else host
        return f"http{'s' if self.ssl_files else ''}://{shown}:{self.serve.server_port}"


def make_plan(values: Mapping[str, Any], variables: Mapping[str, str], *, use_ssl: bool) -> ServePlan:
    """Checks the command line (`values` by setting, `variables` the same as `LORELAY_*`) and the environment.

    Raises:
        ConfigurationError: a value is missing or malformed, a path is no folder, the port is in use,
            there are more workers than GPUs, a package is missing.
    """
    serve = ServeSettings.load(**_pick(values, ServeSettings))
    if serve.redis_url:
        RedisSettings.load(redis_url=serve.redis_url)
    api = ApiSettings.load(**_pick(values, ApiSettings))
    worker = _with_absolute_paths(_pick(values, WorkerSettings))
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
        "LORELAY_ADAPTERS": _adapters_variable(worker.adapters),
    }
    return ServePlan(serve, api, worker, files, {**variables, **resolved}, tuple(worker_variables))


def check_port_free(host: str, port: int, setting: str = "LORELAY_SERVER_PORT (--server-port)") -> None:
    """Refuses an address that can't be listened on.

    Raises:
        ConfigurationError: names the setting and why.
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


def serve(plan: ServePlan) -> int:
    """Runs all parts until asked to stop; returns the exit code."""
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        folder = None if plan.serve.redis_url else stack.enter_context(_state_folder(plan))
        supervisor = Supervisor(signals, say=say)
        try:
            _run(plan, folder, supervisor)
        except ChildFailed as error:
            sys.stderr.write(f"lorelay: {error}; its messages are above\n")
            if error.name == SERVER and folder is not None:
                sys.stderr.write(f"{folder.log_tail()}\n")
            sys.stderr.flush()
            return error.exit_code
        finally:
            was_clean = supervisor.stop()
        return 0 if was_clean else 1


def _run(plan: ServePlan, folder: embedded.StateFolder | None, supervisor: Supervisor) -> None:
    redis_url = plan.serve.redis_url or ""
    if folder is not None:
        redis_url = folder.url
        _start_server(folder, supervisor)
        if supervisor.stop_asked:
            return
    with redis.Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=5) as connection:
        _check_redis(connection)
        if folder is not None:
            drop_earlier_cards(connection)
        workers = _worker_specs(plan, redis_url)
        say(f"starting {len(workers)} worker{'s' * (len(workers) > 1)} for {plan.worker.model}")
        supervisor.start(*workers)
        say(f"starting the API on {plan.url}")
        supervisor.start(_api_spec(plan, redis_url))
        if not supervisor.run_until(lambda: _is_ready(plan, connection, supervisor)):
            return
    supervisor.settled = True
    models = [plan.worker.base_name, *(source.name for source in plan.worker.adapters)]
    say(f"{plan.url}/v1 is ready and serves {', '.join(models)}; API documentation at {plan.url}/docs")
    supervisor.run()


def drop_earlier_cards(connection: redis.Redis) -> None:
    """Removes what an earlier command line registered; the workers register their own.

    All cards come from command lines now. Cards added at run time will have to stay here.
    """
    registry.drop(connection, [card.name for card in registry.list_cards(connection)])


def _state_folder(plan: ServePlan) -> embedded.StateFolder:
    return embedded.StateFolder(plan.serve.state_dir)


def _start_server(folder: embedded.StateFolder, supervisor: Supervisor) -> None:
    command = folder.command(embedded.find_binary())
    say(f"starting the embedded server in {folder.path}")
    supervisor.start(ChildSpec(SERVER, tuple(command), cwd=folder.path, pass_fds=(folder.lock_fd,)))
    is_up = supervisor.run_until(lambda: embedded.answers(folder.url), SERVER_START_LIMIT_S)
    if not is_up and not supervisor.stop_asked:
        raise ChildFailed(SERVER, 1, f"did not answer within {SERVER_START_LIMIT_S:g} s")


def _worker_specs(plan: ServePlan, redis_url: str) -> list[ChildSpec]:
    # By variable rather than -u, so that a password does not show in the list of processes.
    common = {**plan.variables, "LORELAY_REDIS_URL": redis_url, "RQ_REDIS_URL": redis_url}
    words = "worker -w worker.LoraWorker --connection-class worker.serving.patience.PatientRedis"
    command = (sys.executable, "-m", "rq.cli", *words.split())
    return [
        ChildSpec(
            f"worker {index}",
            command,
            env={**common, **variables},
            cwd=ROOT,
            stop_limit_s=plan.worker.drain_s + STOP_MARGIN_S,
        )
        for index, variables in enumerate(plan.worker_variables)
    ]


def _api_spec(plan: ServePlan, redis_url: str) -> ChildSpec:
    limit_s = math.ceil(plan.api.api_drain_s) + 5
    command = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app"]
    command += ["--host", plan.serve.server_name, "--port", str(plan.serve.server_port)]
    command += ["--timeout-graceful-shutdown", str(limit_s)]
    if plan.ssl_files is not None:
        command += [
            "--ssl-keyfile",
            str(plan.ssl_files.keyfile),
            "--ssl-certfile",
            str(plan.ssl_files.certfile),
        ]
    return ChildSpec(
        API,
        tuple(command),
        env={**plan.variables, "LORELAY_REDIS_URL": redis_url},
        cwd=ROOT,
        stop_limit_s=limit_s + STOP_MARGIN_S,
        hurry_signal=signal.SIGINT,  # what makes uvicorn drop open connections
    )


def _is_ready(plan: ServePlan, connection: redis.Redis, supervisor: Supervisor) -> bool:
    """Whether every worker serves and the API reaches the queue."""
    try:
        live = live_workers(connection, plan.worker.base_name)
    except redis.RedisError:
        return False
    host = socket.gethostname()
    pids = [pid for name, pid in supervisor.pids().items() if name not in (API, SERVER)]
    return all((host, pid) in live for pid in pids) and is_http_ready(plan.url)


def is_http_ready(url: str) -> bool:
    """Whether an API's `/ready` answers 200; the certificate is not checked."""
    scheme, _, address = url.partition("://")
    if scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            address, timeout=2, context=ssl._create_unverified_context()
        )
    else:
        connection = http.client.HTTPConnection(address, timeout=2)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False


def _check_redis(connection: redis.Redis) -> None:
    try:
        check_server(connection)
    except redis.RedisError as error:
        raise ConfigurationError(f"LORELAY_REDIS_URL (--redis-url): {explain(error)}") from error


def _with_absolute_paths(values: Mapping[str, Any]) -> WorkerSettings:
    """The worker's settings with folders made absolute: the children run elsewhere."""
    given = WorkerSettings.load(**values)
    model = _resolve(given.model, "LORELAY_MODEL (MODEL)")
    adapters = tuple(
        source._replace(path=_resolve(source.path, f"LORELAY_ADAPTERS (--adapters): {source.name}"))
        for source in given.adapters
    )
    return WorkerSettings.load(**{**values, "model": model, "adapters": adapters})


def _resolve(path: str, setting: str) -> str:
    """An absolute path for a folder; a Hugging Face id stays as it is."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder.absolute())
    if folder.exists() or re.match(r"[./~]", path):
        raise ConfigurationError(f"{setting}: {path} is no folder")
    return path


def _adapters_variable(sources: Iterable[AdapterSource]) -> str:
    """The variable that names these adapters to a worker; those of a file by the file, however many.

    Raises:
        ConfigurationError: it is longer than the operating system takes.
    """
    entries = [
        f"@{source.listed_in}" if source.listed_in else f"{source.name}={source.path}" for source in sources
    ]
    variable = " ".join(quote(entry) for entry in dict.fromkeys(entries))
    if len(variable.encode()) > MAX_VARIABLE_BYTES:
        raise ConfigurationError(
            f"LORELAY_ADAPTERS (--adapters): {len(entries)} adapters don't fit into a variable; "
            "write them into a file, one name=path a line, and give @FILE"
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

"""`lorelay serve`: starts and supervises the processes of a checked plan."""

import contextlib
import socket
import sys
from collections.abc import Sequence

import redis

from lorelay import embedded
from lorelay.plan import ServePlan
from lorelay.probes import is_http_ready
from lorelay.processes import ChildSpec, Signals
from lorelay.specs import SERVER, api_spec, server_spec, worker_specs
from lorelay.status import live_workers
from lorelay.supervisor import ChildFailed, Supervisor, say
from shared.errors import ConfigurationError
from shared.queue import registry
from shared.queue.connections import SOCKET_TIMEOUT_S, check_server
from shared.queue.refusals import explain

SERVER_START_LIMIT_S = 60.0


def serve(plan: ServePlan) -> int:
    """Runs all processes until a signal asks to stop; returns the exit code."""
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        folder = None
        if not plan.serve.redis_url:
            folder = stack.enter_context(embedded.StateFolder(plan.serve.state_dir))
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
        if supervisor.is_stopping:
            return
    with redis.Redis.from_url(
        redis_url, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S
    ) as connection:
        _check_redis(connection)
        if folder is not None:
            drop_earlier_cards(connection)
        workers = worker_specs(plan, redis_url)
        say(f"starting {len(workers)} worker{'s' * (len(workers) > 1)} for {plan.worker.model}")
        supervisor.start(*workers)
        say(f"starting the API on {plan.url}")
        supervisor.start(api_spec(plan, redis_url))
        if not supervisor.run_until(lambda: _is_ready(plan, connection, workers, supervisor)):
            return
    supervisor.settle()
    models = ", ".join(_model_names(plan))
    say(f"{plan.url}/v1 is ready and serves {models}; API documentation at {plan.url}/docs")
    supervisor.run()


def drop_earlier_cards(connection: redis.Redis) -> None:
    """Removes the model cards that an earlier `lorelay serve` left; the new workers register new cards.

    All cards come from command lines today. If adapters could be added at run time, this function would
    delete their cards.
    """
    registry.clear(connection)


def _start_server(folder: embedded.StateFolder, supervisor: Supervisor) -> None:
    spec = server_spec(folder)
    say(f"starting the embedded server in {folder.path}")
    supervisor.start(spec)
    is_up = supervisor.run_until(lambda: embedded.answers(folder.url), SERVER_START_LIMIT_S)
    if not is_up and not supervisor.is_stopping:
        raise ChildFailed(SERVER, 1, f"did not answer within {SERVER_START_LIMIT_S:g} s")


def _is_ready(
    plan: ServePlan, connection: redis.Redis, workers: Sequence[ChildSpec], supervisor: Supervisor
) -> bool:
    """Returns True if every worker lives, all models are registered, and the API reaches Redis."""
    try:
        live = live_workers(connection, plan.worker.base_name)
        registered = {card.name for card in registry.list_cards(connection)}
    except redis.RedisError:
        return False
    host, pids = socket.gethostname(), supervisor.pids
    return (
        all((host, pids.get(spec.name)) in live for spec in workers)
        and registered.issuperset(_model_names(plan))
        and is_http_ready(plan.url)
    )


def _model_names(plan: ServePlan) -> list[str]:
    return [plan.worker.base_name, *(source.name for source in plan.worker.adapters)]


def _check_redis(connection: redis.Redis) -> None:
    try:
        check_server(connection)
    except redis.RedisError as error:
        raise ConfigurationError(f"LORELAY_REDIS_URL (--redis-url): {explain(error)}") from error

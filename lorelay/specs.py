"""The commands with which `lorelay serve` starts the embedded server, the workers and the API."""

import math
import signal
import sys
from pathlib import Path

from lorelay import embedded
from lorelay.plan import ServePlan
from lorelay.processes import ChildSpec

ROOT = Path(__file__).resolve().parent.parent
"""The folder that contains the packages `api` and `worker`."""
API = "api"
SERVER = "server"
STOP_MARGIN_S = 10.0


def server_spec(folder: embedded.StateFolder) -> ChildSpec:
    """Describes the process of the embedded server.

    Raises:
        ConfigurationError: no server is installed.
    """
    command = folder.command(embedded.find_binary())
    return ChildSpec(SERVER, tuple(command), cwd=folder.path, pass_fds=(folder.lock_fd,))


def worker_specs(plan: ServePlan, redis_url: str) -> list[ChildSpec]:
    """Describes one `rq worker` process for each entry of `plan.worker_variables`."""
    # If the URL were passed with -u, the list of processes would show its password.
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


def api_spec(plan: ServePlan, redis_url: str) -> ChildSpec:
    """Describes the API's process, which runs uvicorn."""
    limit_s = math.ceil(plan.api.api_drain_s) + 5
    command = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app"]
    command += ["--host", plan.serve.server_name, "--port", str(plan.serve.server_port)]
    command += ["--timeout-graceful-shutdown", str(limit_s)]
    # With uvicorn's default of 5 s, clients and proxies that keep connections longer would send requests on
    # connections that are just being closed.
    command += ["--timeout-keep-alive", str(plan.serve.keep_alive_s)]
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
        hurry_signal=signal.SIGINT,  # after a SIGTERM, makes uvicorn drop open connections
    )

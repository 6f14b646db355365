"""The commands with which `lorelay serve` starts its parts."""

import math
import signal
import sys
from pathlib import Path

from lorelay import embedded
from lorelay.plan import ServePlan
from lorelay.processes import ChildSpec

ROOT = Path(__file__).resolve().parent.parent
"""The folder of the packages `api` and `worker`."""
API = "api"
SERVER = "server"
STOP_MARGIN_S = 10.0


def server_spec(folder: embedded.StateFolder) -> ChildSpec:
    """The embedded server.

    Raises:
        ConfigurationError: no server is installed.
    """
    command = folder.command(embedded.find_binary())
    return ChildSpec(SERVER, tuple(command), cwd=folder.path, pass_fds=(folder.lock_fd,))


def worker_specs(plan: ServePlan, redis_url: str) -> list[ChildSpec]:
    """One `rq worker` for each GPU or share of the cores."""
    # The URL goes by variable: with -u a password would show in the list of processes.
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
    """The API under uvicorn."""
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
        hurry_signal=signal.SIGINT,  # uvicorn drops open connections at it
    )

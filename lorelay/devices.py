"""Assigns a GPU or a number of CPU threads to each worker of this machine, without importing torch."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from shared.errors import ConfigurationError
from shared.settings import WorkerSettings

NVIDIA_SMI_LIMIT_S = 20


def visible_gpus(environ: Mapping[str, str], dev: Path = Path("/dev")) -> list[str]:
    """Returns the entries of `CUDA_VISIBLE_DEVICES`, or all GPU numbers if the variable is not set."""
    configured = environ.get("CUDA_VISIBLE_DEVICES")
    if configured is not None:
        entries = [entry.strip() for entry in configured.split(",")]
        return [entry for entry in entries if entry and entry != "-1"]
    num_gpus = _count_by_nvidia_smi()
    if num_gpus is None:
        num_gpus = len([path for path in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    return [str(index) for index in range(num_gpus)]


def worker_environments(
    settings: WorkerSettings, num_workers: int, gpus: list[str], num_cores: int
) -> list[dict[str, str]]:
    """Returns environment variables for each worker, which assign a GPU or a number of CPU cores to it.

    Raises:
        ConfigurationError: there are more workers than GPUs.
    """
    if settings.device != "cpu" and gpus:
        return _one_gpu_each(settings, num_workers, gpus)
    if num_workers == 1 or settings.num_threads is not None:
        return [{} for _ in range(num_workers)]
    num_threads = max(1, num_cores // num_workers)
    return [{"LORELAY_NUM_THREADS": str(num_threads)} for _ in range(num_workers)]


def _one_gpu_each(settings: WorkerSettings, num_workers: int, gpus: list[str]) -> list[dict[str, str]]:
    if num_workers > len(gpus):
        raise ConfigurationError(
            f"LORELAY_WORKERS: {num_workers} workers need a GPU each, and there are {len(gpus)}; "
            f"start fewer, or use --device cpu (LORELAY_DEVICE)",
            param="LORELAY_WORKERS",
        )
    if num_workers == 1 and ":" in settings.device:
        return [{}]
    if ":" in settings.device:
        raise ConfigurationError(
            f"LORELAY_DEVICE: {settings.device!r} names one GPU for {num_workers} workers; "
            "leave out the number",
            param="LORELAY_DEVICE",
        )
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:num_workers]]


def _count_by_nvidia_smi() -> int | None:
    """Returns the number of GPUs that nvidia-smi lists, or None if it is missing or fails."""
    binary = shutil.which("nvidia-smi")
    if binary is None:
        return None
    try:
        listing = subprocess.run(
            [binary, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_LIMIT_S, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return len(re.findall(r"^GPU \d+:", listing.stdout, re.MULTILINE))

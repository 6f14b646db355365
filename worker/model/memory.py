"""Memory limits of the KV cache and the adapters, computed from the settings and the free memory."""

import torch

from shared.control_groups import MemoryLimit, cpu_quota, memory_limit
from shared.errors import ConfigurationError
from shared.settings import WorkerSettings

DEFAULT_CPU_CACHE_BYTES = 2 << 30
"""Default maximum size of the KV cache in host memory, which other processes need, too."""
NUM_PREFIX_BATCHES = 3
"""Number of full batches of ended sequences whose blocks fit into the cache and serve as prefix cache."""
DEFAULT_ADAPTER_SHARE = 0.1
"""Share of the memory free at startup: device memory for slots, host memory for cached adapters."""


def num_free_bytes(device: torch.device) -> int:
    """Returns the free memory of the device.

    For the CPU, this is the memory that is available on the machine, or less if the control group has a
    limit.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    limit = _binding_limit()
    return limit.num_free_bytes if limit else _num_available_bytes()


def describe_limits() -> str:
    """Describes for the log how much memory and how many threads the process may use, and the reason."""
    limit, quota = _binding_limit(), cpu_quota()
    by = f"by the control group's limit of {limit.num_bytes >> 20} MiB" if limit else "on the machine"
    of_quota = f", control group's quota: {quota:g} CPUs" if quota else ""
    num_free_mib = num_free_bytes(torch.device("cpu")) >> 20
    return f"{num_free_mib} MiB of memory free {by}; {torch.get_num_threads()} CPU threads{of_quota}"


def _binding_limit() -> MemoryLimit | None:
    """Returns the control group's limit if it leaves less memory than is available on the machine."""
    limit = memory_limit()
    return limit if limit and limit.num_free_bytes < _num_available_bytes() else None


def _num_available_bytes() -> int:
    import psutil  # type: ignore[import-untyped]  # installed with accelerate, which peft needs

    return int(psutil.virtual_memory().available)


def adapter_bytes(device: torch.device) -> int:
    """Returns the default limit on the bytes of all adapters on a device."""
    return int(num_free_bytes(device) * DEFAULT_ADAPTER_SHARE)


def num_cache_blocks(
    settings: WorkerSettings, device: torch.device, *, max_model_len: int, num_block_bytes: int
) -> int:
    """Returns the number of blocks of the KV cache: all that fit into memory, but no more than are useful.

    The useful blocks are those of a full batch of sequences of maximum length and, with a prefix cache, of
    `NUM_PREFIX_BATCHES` further batches.

    Raises:
        ConfigurationError: not even one sequence of `max_model_len` tokens fits.
    """
    num_bytes = int(num_free_bytes(device) * settings.cache_max_entry_count)
    limit = settings.cache_max_bytes or (DEFAULT_CPU_CACHE_BYTES if device.type == "cpu" else num_bytes)
    num_bytes = min(num_bytes, limit)
    per_sequence = -(-max_model_len // settings.block_size)
    num_blocks = num_bytes // num_block_bytes
    if num_blocks < per_sequence:
        group = _binding_limit() if device.type == "cpu" else None
        of_group = f", or raise the control group's limit of {group.num_bytes >> 20} MiB" if group else ""
        raise ConfigurationError(
            f"LORELAY_SESSION_LEN: the KV cache of one sequence of {max_model_len} tokens needs "
            f"{per_sequence * num_block_bytes / 2**20:.1f} MiB and may take {num_bytes / 2**20:.1f}; set a "
            "shorter one, or give the cache more: LORELAY_CACHE_MAX_BYTES, LORELAY_CACHE_MAX_ENTRY_COUNT"
            f"{of_group}"
        )
    num_batches = 1 + NUM_PREFIX_BATCHES * settings.prefix_cache
    return min(num_blocks, num_batches * settings.max_batch_size * per_sequence)

"""Memory limits: how much the KV cache and the adapters may take, from the settings and what is free."""

import torch

from shared.errors import ConfigurationError
from shared.settings import WorkerSettings

DEFAULT_CPU_CACHE_BYTES = 2 << 30
"""Default limit of the KV cache in host memory, which other workers and programs share."""
NUM_PREFIX_BATCHES = 3
"""Full batches of ended sequences that the cache has room for, so that later prompts find their prefixes."""
DEFAULT_ADAPTER_SHARE = 0.1
"""Share of the memory free at the start: of the device's for slots, of the host's for cached adapters."""


def num_free_bytes(device: torch.device) -> int:
    """Free memory of the device; on the CPU, what the machine has available."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped]  # installed with accelerate, which peft needs

    return int(psutil.virtual_memory().available)


def adapter_bytes(device: torch.device) -> int:
    """Default limit of the adapters' memory on a device."""
    return int(num_free_bytes(device) * DEFAULT_ADAPTER_SHARE)


def num_cache_blocks(
    settings: WorkerSettings, device: torch.device, *, max_model_len: int, num_block_bytes: int
) -> int:
    """The number of blocks of the KV cache: as many as memory admits and batches can use.

    A full batch of the longest sequences can use so many; with a prefix cache, `NUM_PREFIX_BATCHES` more.

    Raises:
        ConfigurationError: not even one sequence of `max_model_len` tokens fits.
    """
    num_bytes = int(num_free_bytes(device) * settings.cache_max_entry_count)
    limit = settings.cache_max_bytes or (DEFAULT_CPU_CACHE_BYTES if device.type == "cpu" else num_bytes)
    num_bytes = min(num_bytes, limit)
    per_sequence = -(-max_model_len // settings.block_size)
    num_blocks = num_bytes // num_block_bytes
    if num_blocks < per_sequence:
        raise ConfigurationError(
            f"LORELAY_SESSION_LEN: the KV cache of one sequence of {max_model_len} tokens needs "
            f"{per_sequence * num_block_bytes / 2**20:.1f} MiB and may take {num_bytes / 2**20:.1f}; set a "
            "shorter one, or give the cache more: LORELAY_CACHE_MAX_BYTES, LORELAY_CACHE_MAX_ENTRY_COUNT"
        )
    num_batches = 1 + NUM_PREFIX_BATCHES * settings.prefix_cache
    return min(num_blocks, num_batches * settings.max_batch_size * per_sequence)

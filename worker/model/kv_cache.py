"""The paged KV cache: tensors with the keys and values of all sequences, in blocks."""

import torch
from torch import Tensor

from worker.model.kernels.native import KernelState


class PagedKVCache:
    """Keys and values of each layer: tensors (num_blocks, block_size, num_kv_heads, head_dim).

    A layer's tensors are allocated at its first write, because only the write shows their shapes. In some
    models, head sizes differ between layers, or between keys and values.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._kernels: KernelState | None = None

    def share_with(self, kernels: KernelState) -> None:
        """Passes the tensors of all layers to the kernels, including layers that are allocated later."""
        self._kernels = kernels
        for number, layer in self._layers.items():
            kernels.set_cache(number, *layer)

    @property
    def num_bytes_per_block(self) -> int:
        """Number of bytes of one block in all layers written so far."""
        return sum(entry[0].nbytes for layer in self._layers.values() for entry in layer)

    def resize(self, num_blocks: int) -> None:
        """Reallocates the layers written so far with `num_blocks` blocks; all contents are lost."""
        self.num_blocks = num_blocks
        shapes = {
            number: [(entry.shape[1:], entry.dtype, entry.device) for entry in layer]
            for number, layer in self._layers.items()
        }
        self._layers.clear()
        for number, (key, value) in shapes.items():
            self._set_layer(number, self._allocate(*key), self._allocate(*value))

    def write(self, layer: int, indices: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (T, num_kv_heads, head_dim) at `indices` (T,); returns the layer's tensors.

        An index is block x block_size + offset. Entries that are not finite are stored as finite numbers. A
        NaN would spoil the next sequence that gets its block, because even a masked entry is multiplied (by
        0), and 0 x NaN is NaN. The logits of the token that had the NaN are NaN all the same.
        """
        tensors = self._layer(layer, key.transpose(0, 1), value.transpose(0, 1))
        for stored, new in zip(tensors, (key, value), strict=True):
            stored.flatten(0, 1).index_copy_(0, indices, new.nan_to_num())
        return tensors

    def _layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a layer's tensors, after allocating them at the first call.

        `key` and `value` are (num_kv_heads, T, head_dim).
        """
        if layer not in self._layers:
            keys, values = (
                self._allocate((self.block_size, len(new), new.shape[-1]), new.dtype, new.device)
                for new in (key, value)
            )
            self._set_layer(layer, keys, values)
        return self._layers[layer]

    def _set_layer(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._layers[layer] = (keys, values)
        if self._kernels is not None:
            self._kernels.set_cache(layer, keys, values)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros((self.num_blocks, *shape), dtype=dtype, device=device)

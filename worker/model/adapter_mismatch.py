"""Compares an adapter's tensors with its config and with the base, and suggests how to fix a mismatch."""

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

_CHUNK_ROWS = 4096
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def from_base(key: str, tensor: Tensor, model: nn.Module) -> str | None:
    """Describes how an adapter's tensor differs from the model's of the same name; None for a copy.

    PEFT saves copies of heads and embeddings beside the adapter, in the precision of the training. A copy may
    therefore differ from the model's tensor by the rounding of the lower precision of the two.
    """
    own = model.state_dict().get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
    if own is None:
        return ""
    if own.shape != tensor.shape:
        return f" has the shape {tuple(tensor.shape)}, the base's is {tuple(own.shape)}"
    if _is_copy(tensor, own):
        return None
    return (
        " differs from the base's by more than rounding: it was trained, or made for another base; merge it "
        "into the base, or train the adapter without it"
    )


def _is_copy(tensor: Tensor, own: Tensor) -> bool:
    if tensor.dtype == own.dtype:
        return torch.equal(tensor.to(own.device), own)
    infos = torch.finfo(tensor.dtype), torch.finfo(own.dtype)
    relative = max(info.eps for info in infos)
    # Below its smallest normal number, a precision rounds to multiples of its smallest number.
    absolute = max(info.smallest_normal * info.eps for info in infos)
    chunks = zip(torch.split(tensor, _CHUNK_ROWS), torch.split(own, _CHUNK_ROWS), strict=True)
    return all(
        torch.allclose(theirs.to(mine.device, torch.float64), mine.double(), rtol=relative, atol=absolute)
        for theirs, mine in chunks
    )


def advice(stored: Collection[str], expected: Collection[str]) -> str:
    """Suggests how to fix an adapter that lacks the tensors of some `expected` layers."""
    incomplete = "if they were lost, save or download the adapter again"
    missing = set(expected) - set(stored)
    present = sorted(_numbers(stored))
    if present and (lacking := _numbers(missing).difference(present)):
        return (
            f"it has none for the layers {_ranges(lacking)}. If the adapter changes only the other layers, "
            f'write "layers_to_transform": {present} into adapter_config.json; {incomplete}'
        )
    if lacking_modules := _modules(missing) - _modules(stored):
        names = ", ".join(sorted(lacking_modules))
        return f"if the adapter doesn't change {names}, remove that from target_modules; {incomplete}"
    return incomplete


def _numbers(layers: Collection[str]) -> set[int]:
    """Returns the numbers of the decoder layers to which these Linears belong."""
    return {int(match[0]) for layer in layers if (match := _LAYER.search(layer)) is not None}


def _modules(layers: Collection[str]) -> set[str]:
    return {layer.rpartition(".")[2] for layer in layers}


def _ranges(numbers: Collection[int]) -> str:
    """Writes numbers as ranges, such as `0, 12-21`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)

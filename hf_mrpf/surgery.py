"""Take channels out of layers: tensors are sliced, and the sizes that a layer's class keeps are set."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SIZES = {
    "in": ("in_channels", "in_features"),
    "out": ("out_channels", "out_features"),
    "both": ("in_channels", "out_channels", "groups", "num_features", "num_channels"),
}


def cut_inputs(layer: nn.Module, removed: Sequence[int], *, whole_groups: bool = False) -> None:
    """
    Remove inputs of a convolution or linear layer, in place.

    Args:
        layer (`nn.Module`): a layer with a weight.
        removed (`Sequence[int]`): indices of inputs; of a grouped convolution the same ones of every group.
        whole_groups (`bool`, *optional*, defaults to `False`): a grouped convolution loses groups, and its weight,
            which holds the inputs of one group, no inputs.
    """
    weight: Any = layer.weight
    if not whole_groups:
        take(layer, "weight", 1, sorted({index % weight.shape[1] for index in removed}))
    _shrink(layer, "in", len(removed))


def cut_outputs(layer: nn.Module, removed: Sequence[int], *, groups: int = 0) -> None:
    """Remove outputs of a convolution or linear layer, in place; and `groups` of its groups."""
    for name in ("weight", "bias"):
        take(layer, name, 0, removed)
    if groups:
        layer.groups -= groups  # type: ignore[operator,assignment]
    _shrink(layer, "out", len(removed))


def cut_both(layer: nn.Module, removed: Sequence[int]) -> None:
    """Remove channels of a norm or a depthwise convolution, in place."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        take(layer, name, 0, removed)
    _shrink(layer, "both", len(removed))
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (layer.normalized_shape[0] - len(removed),)


def take(module: nn.Module, name: str, axis: int, removed: Sequence[int]) -> None:
    """Remove indices of a parameter or buffer along an axis; one that is None stays None."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        return
    gone = set(removed)
    kept = torch.tensor([index for index in range(tensor.shape[axis]) if index not in gone], device=tensor.device)
    smaller = tensor.detach().index_select(axis, kept)
    setattr(module, name, nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller)


@torch.no_grad()
def scale_rows(layer: nn.Module, factors: Sequence[float]) -> None:
    """Multiply each output of a layer, weight and bias, in place."""
    weight: Any = layer.weight
    scale = weight.new_tensor(factors)
    weight.mul_(scale.reshape(-1, *(1,) * (weight.ndim - 1)))
    if isinstance(layer.bias, Tensor):
        layer.bias.mul_(scale)


def _shrink(layer: nn.Module, side: str, count: int) -> None:
    for name in _SIZES[side]:
        if name in vars(layer):
            setattr(layer, name, getattr(layer, name) - count)

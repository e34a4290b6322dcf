"""Take channels out of layers: by torch-pruning's functions, where it has right ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Layer


def cut_layer(model: nn.Module, name: str, layer: Layer, side: str, removed: Sequence[int]) -> None:
    """
    Remove channels of one side of a layer, in place. Parameters become new ones; their gradients' flags and memory
    format stay.

    Args:
        model (`nn.Module`): holds the layer.
        name (`str`): `named_modules` name, or that of a parameter which belongs to no layer.
        layer (`Layer`): its shape before.
        side (`str`): `"in"`, `"out"` or `"both"`.
        removed (`Sequence[int]`): indices on that side, sorted.
    """
    if layer.kind == "parameter":
        owner, _, parameter = name.rpartition(".")
        _take(model.get_submodule(owner), parameter, layer.axis, removed)
        return
    module = model.get_submodule(name)
    before = dict(module.named_parameters())
    flags = {key: tensor.requires_grad for key, tensor in before.items()}
    channels_last = [key for key, tensor in before.items() if tensor.ndim == 4 and not tensor.is_contiguous()]
    if layer.loses_groups:
        _cut_groups(module, layer, side, removed)
    elif isinstance(module, nn.LayerNorm):
        _cut_layer_norm(module, removed)
    else:
        _library_function(module, layer.kind, side)(module, list(removed))
    for key, remade in module.named_parameters():
        remade.requires_grad_(flags[key])
        if key in channels_last:
            remade.data = remade.data.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def scale_rows(layer: nn.Module, factors: Sequence[float]) -> None:
    """Multiply each output of a layer, weight and bias, in place."""
    weight: Any = layer.weight
    scale = weight.new_tensor(factors)
    weight.mul_(scale.reshape(-1, *(1,) * (weight.ndim - 1)))
    if isinstance(layer.bias, Tensor):
        layer.bias.mul_(scale)


def _library_function(module: nn.Module, kind: str, side: str) -> Callable[[nn.Module, list[int]], nn.Module]:
    import torch_pruning as tp

    if kind == "norm":
        return tp.prune_groupnorm_out_channels if isinstance(module, nn.GroupNorm) else tp.prune_batchnorm_out_channels
    if kind == "depthwise":
        return tp.prune_depthwise_conv_out_channels
    if kind == "linear":
        return tp.prune_linear_out_channels if side == "out" else tp.prune_linear_in_channels
    # Of a grouped convolution the same inputs go of every group, which is how this function reads them.
    return tp.prune_conv_out_channels if side == "out" else tp.prune_conv_in_channels


def _cut_layer_norm(module: nn.LayerNorm, removed: Sequence[int]) -> None:
    # torch-pruning 1.6.1 keeps the indices in the order of a Python set, which permutes the weights of wide norms.
    for name in ("weight", "bias"):
        _take(module, name, 0, removed)
    module.normalized_shape = (module.normalized_shape[0] - len(removed),)


def _cut_groups(module: nn.Module, layer: Layer, side: str, removed: Sequence[int]) -> None:
    # The weight holds the inputs of one group, which stay as many.
    if side == "in":
        module.in_channels -= len(removed)  # type: ignore[operator,assignment]
        module.groups -= len(removed) // layer.ins  # type: ignore[operator,assignment]
        return
    for name in ("weight", "bias"):
        _take(module, name, 0, removed)
    module.out_channels -= len(removed)  # type: ignore[operator,assignment]


def _take(module: nn.Module, name: str, axis: int, removed: Sequence[int]) -> None:
    """Remove indices of a parameter along an axis; one that is None stays None."""
    tensor = getattr(module, name)
    if tensor is None:
        return
    gone = set(removed)
    kept = torch.tensor([index for index in range(tensor.shape[axis]) if index not in gone], device=tensor.device)
    setattr(module, name, nn.Parameter(tensor.detach().index_select(axis, kept), tensor.requires_grad))

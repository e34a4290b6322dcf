"""Coupled channels as torch-pruning's importance functions read them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .layers import Layer, Slot

if TYPE_CHECKING:
    from torch_pruning.dependency import Group


def importance_group(modules: Mapping[str, nn.Module], layers: Mapping[str, Layer], slots: Sequence[Slot]) -> "Group":
    """
    Make a group of torch-pruning of the slots of a unit.

    Args:
        modules (`Mapping[str, nn.Module]`): by `named_modules` name.
        layers (`Mapping[str, Layer]`): by name.
        slots (`Sequence[Slot]`): sides of layers; those without weights of their own count nothing.

    Returns:
        `Group`: with one root index for each channel of the slots.
    """
    import torch_pruning as tp
    from torch_pruning.dependency import Dependency, Group, Node

    functions = {
        ("conv", "out"): tp.prune_conv_out_channels,
        ("conv", "in"): tp.prune_conv_in_channels,
        ("grouped", "out"): tp.prune_conv_out_channels,
        ("grouped", "in"): tp.prune_conv_in_channels,
        ("depthwise", "both"): tp.prune_depthwise_conv_out_channels,
        ("linear", "out"): tp.prune_linear_out_channels,
        ("linear", "in"): tp.prune_linear_in_channels,
        ("norm", "both"): tp.prune_batchnorm_out_channels,
    }
    group = Group()

    def add(module: nn.Module, name: str, function: Any, positions: Sequence[Sequence[int]]) -> None:
        node = Node(module, None, name)
        pairs = sorted((index, channel) for channel, own in enumerate(positions) for index in own)
        group.add_dep(Dependency(function, function, node, node), [index for index, _ in pairs])
        group[-1].root_idxs = [channel for _, channel in pairs]

    # Its functions give one score an index of the first item, which therefore must have one index a channel.
    order = sorted(
        (slot for slot in slots if (layers[slot.layer].kind, slot.side) in functions),
        key=lambda slot: len(slot.positions[0]),
    )
    if len(order[0].positions[0]) > 1:
        width = len(order[0].positions)
        # Its initial values would be drawn from the caller's random numbers.
        nothing = nn.utils.skip_init(nn.Linear, 1, width, bias=False, device="cpu")
        nothing.weight.data.zero_()
        nothing.weight.grad = torch.zeros_like(nothing.weight)
        add(nothing, "nothing", tp.prune_linear_out_channels, [(channel,) for channel in range(width)])
    for slot in order:
        module = modules[slot.layer]
        function = functions[layers[slot.layer].kind, slot.side]
        if isinstance(module, nn.LayerNorm):
            function = tp.prune_layernorm_out_channels
        add(module, slot.layer, function, slot.positions)
    return group

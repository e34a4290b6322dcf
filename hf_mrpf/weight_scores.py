"""Scores of channels from weights alone: norms of what a channel touches, or of the filters that write it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch_pruning.dependency import Group


# Elements that are squared at a time: 1 MB.
_SQUARES = 2**18


def precise(tensor: Tensor) -> Tensor:
    """In float64, where its device is: on the CPU for a GPU of Apple's, which knows none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


@torch.no_grad()
def squared_norms(group: "Group") -> Tensor:
    """What `GroupMagnitudeImportance(p=2)` gives, to the bit, without three copies of the weights of every side."""
    import torch_pruning as tp

    total, count = torch.zeros(1 + max(group[0].root_idxs), device="cpu"), 0
    for item in group.items:
        layer, function = item.dep.layer, item.dep.pruning_fn
        weight = layer.weight
        if weight is None or isinstance(layer, nn.GroupNorm) or function == tp.prune_depthwise_conv_out_channels:
            continue
        inputs = function in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
        rows = weight.transpose(0, 1) if inputs else weight
        squares = _sums_of_squares(rows.flatten(1)) if weight.ndim > 1 else weight.square()
        if inputs and isinstance(layer, nn.Conv2d):
            squares = squares.repeat(layer.groups)
        indices = torch.tensor(item.idxs, device=squares.device)
        total.scatter_add_(0, torch.tensor(item.root_idxs, device="cpu"), squares[indices].float().cpu())
        count += 1
    total /= count
    return total / total.mean()


def _sums_of_squares(rows: Tensor) -> Tensor:
    """Of each row; some rows at a time, because fresh memory for many squares takes longer than they do."""
    if not rows.is_contiguous():  # such sums are taken in an order that hangs on how many there are
        return rows.square().sum(1)
    return torch.cat([part.square().sum(1) for part in rows.split(max(1, _SQUARES // rows.shape[1]))])


@torch.no_grad()
def l1_norms(group: "Group") -> Tensor:
    """
    Sum of the absolute weights of all filters that write each channel.

    Args:
        group (`Group`): torch-pruning's group with all channels of a unit.

    Returns:
        `Tensor`: `[width]`, on the CPU.
    """
    return torch.stack([torch.linalg.vector_norm(rows, 1, dim=1).cpu() for rows in _filters(group)]).sum(0)


@torch.no_grad()
def summed_distances(group: "Group") -> Tensor:
    """
    Sum over all channels of a unit of the Euclidean distance between their filters and those of each channel.

    Where several filters write a channel they count as one long one. Argument and result as for [`l1_norms`].
    """
    # In float64: a matrix product gives the small distance of two large filters to half of the digits only.
    squares = torch.stack([_squared_distances(precise(rows)).cpu() for rows in _filters(group)]).sum(0)
    return squares.sqrt().sum(1)


def _squared_distances(rows: Tensor) -> Tensor:
    norms = rows.square().sum(1)
    return (norms[:, None] + norms - 2 * rows @ rows.T).clamp(min=0).fill_diagonal_(0)


def _filters(group: "Group") -> Iterator[Tensor]:
    """For each convolution or linear layer that writes the channels, its weights by channel: `[width, n]`."""
    import torch_pruning as tp

    width = 1 + max(group[0].root_idxs)
    for item in group.items:
        # A depthwise layer scales and spreads what others write.
        if item.dep.pruning_fn in (tp.prune_conv_out_channels, tp.prune_linear_out_channels):
            weight = item.dep.layer.weight.detach()
            order = torch.tensor(item.root_idxs, device="cpu").argsort(stable=True)
            indices = torch.tensor(item.idxs, device="cpu")[order].to(weight.device)
            yield weight[indices].reshape(width, -1)

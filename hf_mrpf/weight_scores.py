"""Scores of channels by sums over weights: of all that a channel touches, or of the filters that write it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch_pruning.dependency import Group


# Terms of sums that are made at a time: 1 MB.
_TERMS = 2**18


def precise(tensor: Tensor) -> Tensor:
    """In float64, where its device is: on the CPU for a GPU of Apple's, which knows none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def squared_norms(group: "Group") -> Tensor:
    """
    Squared norms of all weights that each channel touches, relative to their mean.

    Where no convolution is grouped this is what `GroupMagnitudeImportance(p=2)` of torch-pruning gives, to the bit,
    without three copies of the weights of every side. Argument and result as for [`l1_norms`].
    """
    return _relative(_touched(group, torch.square))


def lamp_norms(group: "Group") -> Tensor:
    """
    Squared norm of each channel over the sum of all that are at least as large (torch-pruning's `LAMPImportance`).

    Of channels of the same norm an arbitrary one counts as the smaller. Argument and result as for [`l1_norms`].
    """
    norms = _touched(group, torch.square)
    ordered, places = norms.sort()
    smaller = torch.zeros_like(ordered)
    smaller[1:] = ordered.cumsum(0)[:-1]
    return torch.empty_like(norms).scatter_(0, places, ordered / (norms.sum() - smaller))


def first_order(group: "Group") -> Tensor:
    """
    Sums of |weight * gradient| over what each channel touches, BatchNorm left out, relative to their mean.

    Every weight must have a gradient in `.grad`. Argument and result as for [`l1_norms`].
    """

    def term(weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).abs()

    return _relative(_touched(group, term, gradients=True, batchnorm=False))


def second_order(group: "Group") -> Tensor:
    """
    Sums of weight^2 * g over what each channel touches, relative to their mean, g what stands in `.grad`.

    Argument and result as for [`l1_norms`].
    """

    def term(weight: Tensor, gradient: Tensor) -> Tensor:
        return weight.square() * gradient

    return _relative(_touched(group, term, gradients=True))


def _relative(scores: Tensor) -> Tensor:
    return scores / scores.mean()


@torch.no_grad()
def _touched(group: "Group", term: Callable[..., Tensor], *, gradients: bool = False, batchnorm: bool = True) -> Tensor:
    """
    Mean over the sides of layers of the sums of `term(weight)`, or `term(weight, gradient)`, over what each channel
    touches there.

    As in torch-pruning's classes, which this follows, depthwise filters and GroupNorm count nothing. They sum a grouped
    convolution's inputs over the outputs of all groups, though each is read by those of its own group alone.
    """
    import torch_pruning as tp

    left_out = {tp.prune_depthwise_conv_out_channels} | (set() if batchnorm else {tp.prune_batchnorm_out_channels})
    total, count = torch.zeros(1 + max(group[0].root_idxs), dtype=torch.float32, device="cpu"), 0
    for item in group.items:
        layer, function = item.dep.layer, item.dep.pruning_fn
        if layer.weight is None or isinstance(layer, nn.GroupNorm) or function in left_out:
            continue
        tensors = (layer.weight, layer.weight.grad) if gradients else (layer.weight,)
        if layer.weight.ndim > 1:
            reads = function in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
            parts = getattr(layer, "groups", 1) if reads else 0
            sums = _sums(term, [_rows(tensor, parts) for tensor in tensors])
        else:
            sums = term(*tensors)
        indices = torch.tensor(item.idxs, device=sums.device)
        total.scatter_add_(0, torch.tensor(item.root_idxs, device="cpu"), sums[indices].float().cpu())
        count += 1
    return total / count


def _rows(weight: Tensor, parts: int) -> Tensor:
    """`[channels, n]`: what each input of so many groups is read by; with 0 what each output is written by."""
    if parts:
        weight = weight.unflatten(0, (parts, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _sums(term: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Of each row; some rows at a time, because fresh memory for many terms takes longer than they do."""
    # Where memory is not in rows, such sums are taken in an order that hangs on how many there are.
    if not all(tensor.is_contiguous() for tensor in tensors):
        return term(*tensors).sum(1)
    some = max(1, _TERMS // tensors[0].shape[1])
    return torch.cat([term(*rows).sum(1) for rows in zip(*(t.split(some) for t in tensors), strict=True)])


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

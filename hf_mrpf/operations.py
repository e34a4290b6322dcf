"""Which tensor operations keep channels apart: anything else between two layers would make pruning silently wrong."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The layers' own operations; that every product belongs to a known layer is checked by counting.
_LAYERS = {"convolution", "cudnn_convolution", "mkldnn_convolution", "linear", "addmm", "mm", "t"}
_NORMS = {"native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training", "batch_norm"}
_COPIES = {"clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "copy_"}
# Pointwise, although not tagged so.
_POINTWISE = {"hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "relu_", "silu_", "elu", "elu_", "leaky_relu_"}
# Within each image and channel: input and output have the same first two dimensions.
_SPATIAL = {
    "max_pool2d_with_indices",
    "max_pool2d",
    "avg_pool2d",
    "_adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_bicubic2d",
    "constant_pad_nd",
    "reflection_pad2d",
    "replication_pad2d",
    "slice",
    "expand",
}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std"}
_VIEWS = {"view", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze"}


class ChannelWatch(TorchDispatchMode):
    """
    Notes every operation, run inside the context, that may move or mix channels (dimension 1).

    Only tensors that require a gradient are watched: with all parameters trainable, those that depend on a layer.

    Attributes:
        found (`list[str]`): their names, in the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        known = _LAYERS | _NORMS | _COPIES | _POINTWISE
        watched = any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(args))
        if watched and not (name in known or torch.Tag.pointwise in func.tags or _stays(name, args, output)):
            self.found.append(name)
        return output


def _stays(name: str, args: tuple, output: Any) -> bool:
    """Whether an operation that is not pointwise leaves channels where they are, by its arguments and shapes."""
    if name == "cat":
        axis = args[1] if len(args) > 1 else 0
        return axis % args[0][0].ndim == 1
    before = args[0]
    if name in _REDUCTIONS:
        axes = args[1] if len(args) > 1 and args[1] is not None else ()
        return bool(axes) and all(axis % before.ndim > 1 for axis in axes)
    after = output[0] if isinstance(output, tuple) else output
    if name in _SPATIAL:
        return after.shape[:2] == before.shape[:2]
    if name in _VIEWS:
        flattened = after.ndim == 2 and after.shape[0] == before.shape[0]
        return flattened or after.shape[:2] == before.shape[:2]
    return False

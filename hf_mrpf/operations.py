"""Follow every single channel through a network: which elements of which tensors stand for the same channel.

One forward pass runs beside a shadow of it. Each element of a tensor that depends on channels has a label, the number
of the channel that it belongs to. Operations that only move elements move their labels likewise; where two labels meet
(a residual sum, a layer that reads one input at many places), they are one channel. Whatever does anything else is
noted, never guessed at.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

# Label of an element that belongs to no channel, such as padding.
NONE = -1.0

# These move elements (or repeat them) and do nothing else, so they do the same to labels.
_MOVES = {
    "view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "reshape", "permute", "transpose", "t", "squeeze",
    "unsqueeze", "expand", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "roll",
    "repeat", "flip", "reflection_pad2d", "replication_pad2d",
}  # fmt: skip
# Of these, the ones that part or count along an axis, and where its number stands among the arguments: which channels
# they give would depend on the width, so the axis may not be that of the channels.
_PARTS = {"slice": 1, "select": 1, "split": 2, "split_with_sizes": 2, "chunk": 2, "unbind": 1, "roll": 2}
_COPIES = {"clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh"}
# Pointwise, although not tagged so.
_POINTWISE = {"hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "relu_", "silu_", "elu", "elu_", "leaky_relu_"}
# Within each image and channel: input and output have the same first two dimensions.
_SPATIAL = {
    "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
    "upsample_nearest2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std"}


class ChannelTrace(TorchDispatchMode):
    """
    Label channels during one forward pass, without gradients, inside the context.

    Labels of layers' inputs and outputs are reserved with [`reserve`]; what happens between [`enter`] and [`leave`]
    (the inside of a layer) is not followed.

    Args:
        parameters (`Mapping[str, nn.Parameter]`):
            Parameters that belong to no layer, such as position embeddings: each element has a label.

    Attributes:
        first (`dict[str, int]`): first label of each reserved name; those of a name are consecutive.
        count (`dict[str, int]`): number of labels of each reserved name.
        found (`dict[str, str]`): operations that cannot be followed, each with the module that ran it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.first: dict[str, int] = {}
        self.count: dict[str, int] = {}
        self.found: dict[str, str] = {}
        self.running: list[str] = [""]
        self._total = 0
        self._depth = 0
        self._labels = WeakTensorKeyDictionary()
        self._pairs: list[Tensor] = []
        self._needed: list[tuple[str, str, Tensor]] = []
        self._alive: list[Tensor] = []
        for name, parameter in parameters.items():
            self.reserve(name, parameter.numel())
            self._labels[parameter] = self.labels(name).reshape(parameter.shape)

    def reserve(self, name: str, count: int) -> None:
        """Reserve `count` labels under a name."""
        self.first[name], self.count[name] = self._total, count
        self._total += count

    def labels(self, name: str) -> Tensor:
        """The labels of a reserved name, `[count]`."""
        return torch.arange(self.first[name], self.first[name] + self.count[name], dtype=torch.float64)

    def read(self, tensor: Tensor, name: str, axis: int) -> None:
        """Note that a layer reads `tensor` with one weight for each index along `axis`."""
        labels = self._of(tensor)
        if labels is not None:
            self._meet(labels, _along(self.labels(name), labels.ndim, axis).expand(labels.shape))

    def write(self, tensor: Tensor, name: str, axis: int) -> None:
        """Note that `tensor` is a layer's output, with its channels along `axis`."""
        self._set(tensor, _along(self.labels(name), tensor.ndim, axis).expand(tensor.shape))

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Make labels of two equally shaped tensors the same channels."""
        self._meet(one, other)

    def enter(self) -> bool:
        """Start what is not to be followed; whether it is the outermost such part."""
        self._depth += 1
        return self._depth == 1

    def leave(self) -> bool:
        """End what is not followed; whether it was the outermost such part."""
        self._depth -= 1
        return self._depth == 0

    def of(self, tensor: Tensor) -> Tensor:
        """Labels of the elements of a tensor that are channels, without repetition."""
        labels = self._of(tensor)
        return torch.empty(0, dtype=torch.int64) if labels is None else _distinct(labels)

    def channels(self) -> Tensor:
        """
        Number of the channel of each label: equal for labels that met.

        Operations that need channels to be alike (a mean over them) are checked now and added to `found`.
        """
        roots = torch.arange(self._total)
        if self._pairs:
            one, other = torch.cat(self._pairs, dim=1)
            while True:
                low, high = torch.minimum(roots[one], roots[other]), torch.maximum(roots[one], roots[other])
                apart = low != high
                if not apart.any():
                    break
                roots = roots.scatter_reduce(0, high[apart], low[apart], "amin")
                while not torch.equal(further := roots[roots], roots):
                    roots = further
        for operation, module, pairs in self._needed:
            if not torch.equal(roots[pairs[0]], roots[pairs[1]]):
                self.found[operation] = module
        return roots

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._depth:
            return output
        flat, layout = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        if all(self._of(tensor) is None for tensor in tensors):
            return output
        name = func.overloadpacket.__name__
        if name in _COPIES:
            self._set(output, self._of(tensors[0]))
        elif name in _POINTWISE or torch.Tag.pointwise in func.tags:
            self._pointwise(name, tensors, output)
        elif name in _MOVES:
            self._part(name, args, output)
            shadows = [self._shadow(value) if isinstance(value, Tensor) else value for value in flat]
            moved_args, moved_kwargs = tree_unflatten(shadows, layout)
            self._set_all(output, _reshaping(func, name)(*moved_args, **moved_kwargs))
        elif name in _REDUCTIONS and len(args) > 1 and args[1]:
            keep = (
                args[2] if name in ("mean", "sum", "amax", "amin") and len(args) > 2 else kwargs.get("keepdim", False)
            )
            self._reduce(name, args[0], args[1], bool(keep), output)
        elif name in _SPATIAL:
            self._spatial(name, args[0], output)
        elif name == "constant_pad_nd":
            self._set(output, torch.constant_pad_nd(self._shadow(args[0]), args[1], NONE))
        elif name in ("im2col", "col2im"):
            self._unfold(name, func, args, output)
        elif name == "as_strided_" and output.is_contiguous() and self._shadow(output).shape == output.shape:
            # Pooling to one pixel in channels_last renames the strides of dimensions of size 1.
            pass
        elif name in ("_softmax", "_log_softmax"):
            labels = self._shadow(args[0])
            self._need(name, labels, labels.amax(args[1], keepdim=True).expand(labels.shape))
            self._set(output, labels)
        else:
            self.found[name] = self.running[-1]
        return output

    def _of(self, tensor: Tensor) -> Tensor | None:
        return self._labels.get(tensor)

    def _shadow(self, tensor: Tensor) -> Tensor:
        labels = self._of(tensor)
        return torch.full((), NONE, dtype=torch.float64).expand(tensor.shape) if labels is None else labels

    def _set(self, tensor: Tensor, labels: Tensor | None) -> None:
        if labels is not None:
            # Kept alive, so that no later tensor can be taken for this one.
            self._alive.append(tensor)
            self._labels[tensor] = _compressed(labels)

    def _set_all(self, output: Any, labels: Any) -> None:
        if isinstance(output, Tensor):
            self._set(output, labels)
        else:
            for tensor, own in zip(output, labels, strict=True):
                self._set(tensor, own)

    def _pointwise(self, name: str, tensors: list[Tensor], output: Tensor) -> None:
        labelled = [self._of(tensor) for tensor in tensors]
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        merged: Tensor | None = None
        for labels in labelled:
            if labels is None:
                continue
            labels = labels.expand(shape)
            if merged is None:
                merged = labels
            else:
                self._meet(merged, labels)
                if _distinct_none(merged):
                    merged = torch.where(merged == NONE, labels, merged)
        # Other views of a tensor without channels would not learn that it has some now.
        if name.endswith("_") and labelled[0] is None:
            self.found[name] = self.running[-1]
        self._set(output, merged)

    def _part(self, name: str, args: tuple, output: Any) -> None:
        whole = isinstance(output, Tensor) and name == "slice" and output.shape == args[0].shape
        if name in _PARTS and not whole:
            axes = args[_PARTS[name]] if len(args) > _PARTS[name] else 0
            labels = self._shadow(args[0])
            self._need(name, labels, labels.amax(axes or 0, keepdim=True).expand(labels.shape))

    def _reduce(self, name: str, tensor: Tensor, axes: list[int], keep: bool, output: Any) -> None:
        labels = self._shadow(tensor)
        top = labels.amax(axes, keepdim=True)
        self._need(name, labels, top.expand(labels.shape))
        self._set(output, top if keep else top.reshape(output.shape))

    def _spatial(self, name: str, tensor: Tensor, output: Any) -> None:
        labels = self._shadow(tensor)
        first = output[0] if isinstance(output, tuple) else output
        if first.shape[:2] != labels.shape[:2]:
            self.found[name] = self.running[-1]
            return
        top = labels.amax(tuple(range(2, labels.ndim)), keepdim=True)
        self._need(name, labels, top.expand(labels.shape))
        self._set(first, top.expand(first.shape))

    def _unfold(self, name: str, func: Any, args: tuple, output: Tensor) -> None:
        """Blocks of pixels become columns, or back: where blocks do not overlap, every element just moves."""
        kernel, dilation, padding, stride = args[-4:]
        if list(kernel) != list(stride) or any(padding) or any(step != 1 for step in dilation):
            self.found[name] = self.running[-1]
            return
        shadow = self._shadow(args[0]).contiguous()
        if name == "col2im" and output.numel() != shadow.numel():
            self.found[name] = self.running[-1]
            return
        self._set(output, func(shadow, *args[1:]))

    def _meet(self, one: Tensor, other: Tensor) -> None:
        if (pairs := _pairs(one, other)).numel():
            self._pairs.append(pairs)

    def _need(self, name: str, one: Tensor, other: Tensor) -> None:
        if (pairs := _pairs(one, other)).numel():
            self._needed.append((name, self.running[-1], pairs))


def _along(labels: Tensor, dimensions: int, axis: int) -> Tensor:
    shape = [1] * dimensions
    shape[axis] = len(labels)
    return labels.reshape(shape)


def _reshaping(func: Any, name: str) -> Any:
    # Labels that repeat along a dimension share memory, which a view cannot always follow.
    return torch.reshape if name in ("view", "_unsafe_view", "_reshape_alias") else func


def _squashed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors without the repetitions that all of them have."""
    for axis in range(tensors[0].ndim):
        if tensors[0].shape[axis] > 1 and all(tensor.stride(axis) == 0 for tensor in tensors):
            tensors = tuple(tensor.narrow(axis, 0, 1) for tensor in tensors)
    return tensors


def _compressed(labels: Tensor) -> Tensor:
    """The same labels, without memory for the repetitions along an axis: all that follows is then quick."""
    small = labels
    for axis in range(labels.ndim):
        if small.shape[axis] > 1:
            first = small.narrow(axis, 0, 1)
            if small.stride(axis) == 0 or bool((small == first).all()):
                small = first
    return small.expand(labels.shape)


def _pairs(one: Tensor, other: Tensor) -> Tensor:
    """Distinct pairs of different labels at the same place, `[2, n]`, integers."""
    one, other = _squashed(one, other)
    apart = (one != other) & (one != NONE) & (other != NONE)
    codes = torch.unique((one[apart].long() << 32) + other[apart].long())
    return torch.stack([codes >> 32, codes & 0xFFFFFFFF])


def _distinct(labels: Tensor) -> Tensor:
    (labels,) = _squashed(labels)
    return torch.unique(labels[labels != NONE].long())


def _distinct_none(labels: Tensor) -> bool:
    (labels,) = _squashed(labels)
    return bool((labels == NONE).any())

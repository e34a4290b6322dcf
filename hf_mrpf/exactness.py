"""The check that counts: a pruned network computes what the original does with the same channels at zero.

Whatever a trace gets wrong (a shuffle of channels, a mean over them, code that counts on a width) shows here, on a copy
with random weights: a right removal differs by rounding alone, a wrong one by parts in a thousand or more. So does an
operation that makes something of zero (a sigmoid in front of a layer), which is refused too. It is a random test, no
proof: code that mixes channels for some images or at some widths only can pass.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import channel_axis
from .attacks import logits_of
from .folding import the_input
from .layers import Layer, shapes_only, skeleton, twin

# By what the check computes in: the second takes half of the time, and leaves more of a wrong removal to the first.
TOLERANCE = 1e-9
TOLERANCES = {torch.float64: TOLERANCE, torch.float32: 1e-4}
# Between the random numbers of two weights.
_APART = 9973


def removal_error(
    model: nn.Module,
    example: Tensor,
    layers: Mapping[str, Layer],
    removed: Mapping[tuple[str, str], Sequence[int]],
    cut: Callable[[nn.Module], None],
    dtype: torch.dtype = torch.float64,
) -> float:
    """
    Compare a removal with its masked original, on the CPU, on random weights and pixels.

    Args:
        model (`nn.Module`): only its architecture counts; it is copied.
        example (`torch.Tensor` of shape `[N, C, H, W]`): only its shape counts.
        layers (`Mapping[str, Layer]`): by name.
        removed (`Mapping`): removed indices by (layer, side).
        cut (`Callable`): removes just these from a model, in place.
        dtype (`torch.dtype`): what to compute in, a key of `TOLERANCES`.

    Returns:
        `float`: largest difference of logits, relative to the largest logit of the masked original.

    Raises:
        Exception: whatever the smaller network raises, in eval mode, or in train mode where the original does not.
    """
    generator = torch.Generator().manual_seed(0)
    copied = _randomised(model, generator, dtype)
    # Of both signs, and of the size that pixels have once they are normalised.
    images = 2 * torch.randn(1, *example.shape[1:], generator=generator, dtype=dtype, device="cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        with _masked(copied, layers, removed):
            expected = logits_of(copied(images))
        cut(copied)
        found = logits_of(copied(images))
        fault = _training_fault(copied, images)
        # What runs in training alone was not traced. A network that cannot train anyway is none the worse.
        if fault is not None and _training_fault(skeleton(model).to(dtype), images) is None:
            raise fault
    scale = expected.abs().max().item()
    return (found - expected).abs().max().item() / scale if scale > 0 else float("inf")


def _training_fault(model: nn.Module, images: Tensor) -> Exception | None:
    """What a forward pass in train mode raises, on shapes alone: nothing is computed."""
    try:
        with shapes_only():
            model.to("meta").train()(torch.zeros(2, *images.shape[1:], dtype=images.dtype, device="meta"))
    except Exception as error:  # an arbitrary network may refuse in any way
        return error
    return None


def _randomised(model: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
    """
    A copy whose every weight matters: defaults of 0 and 1 would hide wrong indices.

    Weights of one fan-in are parts of the same random numbers, each from a place of its own: as many numbers as a large
    network has would take longer than its forward pass.
    """
    sizes: dict[int, list[int]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            sizes[parameter[0].numel()].append(parameter.numel())
    numbers, places = {}, {}
    for fan_in, own in sizes.items():
        bound = 2.4 / fan_in**0.5  # uniform, because normal numbers take longer than the rest
        drawn = torch.empty(max(own) + _APART * len(own), dtype=dtype, device="cpu")
        numbers[fan_in] = drawn.uniform_(-bound, bound, generator=generator)
        places[fan_in] = count(0, _APART)

    def random(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to("cpu", copy=True)
        if tensor.ndim < 2 or not isinstance(tensor, nn.Parameter):
            drawn = torch.empty(tensor.shape, dtype=dtype, device="cpu")
            return drawn.uniform_(0.5, 1.5, generator=generator)
        fan_in = tensor[0].numel()
        return numbers[fan_in].narrow(0, next(places[fan_in]), tensor.numel()).view(tensor.shape)

    made = twin(model, random).eval()
    for module in made.modules():
        # What is no buffer does not follow the module: a mean that was put on a GPU by hand is still there.
        kept = {name: value.cpu() for name, value in vars(module).items() if isinstance(value, Tensor)}
        vars(module).update(kept)
    return made


@contextmanager
def _masked(
    model: nn.Module, layers: Mapping[str, Layer], removed: Mapping[tuple[str, str], Sequence[int]]
) -> Iterator[None]:
    """Removed channels are silent where they are made: nothing of them may reach what is kept."""
    handles, restore = [], []
    for (name, side), indices in removed.items():
        layer, index = layers[name], torch.tensor(indices, device="cpu")
        if layer.kind == "parameter":
            parameter = model.get_parameter(name)
            restore.append((parameter, parameter.data))
            # Not in place: other parameters may be parts of the same numbers.
            parameter.data = parameter.index_fill(layer.axis, index, 0.0)
        elif side != "in":
            handles.append(model.get_submodule(name).register_forward_hook(_silence(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in restore:
            parameter.data = value


def _silence(index: Tensor) -> Callable[[Any, tuple, dict, Tensor], Tensor]:
    """A hook that zeroes channels behind a layer; a norm over channels takes its moments without them."""

    def hook(module: Any, inputs: tuple, named: dict, output: Tensor) -> Tensor:
        axis = channel_axis(module)
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            features = the_input(inputs, named)
            kept = torch.ones(features.shape[axis], dtype=torch.bool, device="cpu")
            kept[index] = False
            own = features.index_select(axis, kept.nonzero().flatten())
            axes = tuple(range(1, features.ndim)) if isinstance(module, nn.GroupNorm) else (axis,)
            variance, mean = torch.var_mean(own, axes, correction=0, keepdim=True)
            output = (features - mean) / (variance + module.eps).sqrt()
            shape = [1] * features.ndim
            shape[axis] = -1
            for name, apply in (("weight", torch.mul), ("bias", torch.add)):
                if getattr(module, name) is not None:
                    output = apply(output, getattr(module, name).reshape(shape))
        return output.index_fill_(axis, index, 0.0)

    return hook

"""The layers of a network: their shapes, what they cost, and which indices of their sides are which channels."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .architectures import channel_axis, unsupported
from .attacks import logits_of
from .modes import frozen

# Kinds of layers whose outputs are channels of their own.
PRODUCERS = ("conv", "linear", "depthwise", "grouped")


@dataclass(frozen=True)
class Slot:
    """
    One side of one layer that follows a unit's width.

    Attributes:
        layer (`str`): `named_modules` name, or that of a parameter which belongs to no layer.
        side (`str`): `"out"`, `"in"`, or `"both"` where they are the same channels (norms, depthwise layers).
        positions (`tuple[tuple[int, ...], ...]`): for each channel of the unit its indices on that side: one, or
            several after a flatten, in patches that are merged, or in groups; offset after a concatenation.
    """

    layer: str
    side: str
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layer:
    """
    Shape of a layer: MACs are `macs_each * outs * ins` (`ins` is 1 in depthwise and norm layers, and that of one group
    in grouped ones). A parameter without a layer has the kind `"parameter"` and is cut along `axis`; the products of
    attention, which has no layer for them, have the kind `"products"`.
    """

    kind: str
    outs: int
    ins: int
    macs_each: int
    params_each: int
    params_out: int
    groups: int = 1
    axis: int = 0

    @property
    def macs(self) -> int:
        return self.macs_each * self.outs * self.ins

    @property
    def loses_groups(self) -> bool:
        """Whether a grouped convolution loses whole groups, rather than channels in every group: what is finer."""
        return self.kind == "grouped" and self.groups >= self.ins


def twin(model: nn.Module, remake: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model that has `remake(tensor)` in the place of each parameter and buffer, which are not copied."""
    tensors: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        made = remake(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        tensors[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
    return copy.deepcopy(model, tensors)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without any value: forward passes on the meta device compute shapes alone, in no time."""
    return twin(model, lambda tensor: torch.empty_like(tensor, device="meta"))


def _batch_norm_fits(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    own, given = input.shape[1:2], (running_mean, running_var, weight, bias)
    one_value = training and input.numel() == input.shape[1]
    return not one_value and all(tensor is None or tensor.shape == own for tensor in given)


def _layer_norm_fits(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    own = input.shape[-len(normalized_shape) :]
    return own == tuple(normalized_shape) and all(tensor is None or tensor.shape == own for tensor in (weight, bias))


class _QuickNorms(TorchFunctionMode):
    """PyTorch takes dozens of steps to find the shape of a norm of no values; where all fits it is the input's."""

    fits: ClassVar[dict[Any, Callable[..., bool]]] = {F.batch_norm: _batch_norm_fits, F.layer_norm: _layer_norm_fits}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.fits and self.fits[function](*args, **kwargs):
            features = args[0] if args else kwargs["input"]
            if features.requires_grad or not torch.is_grad_enabled():  # else the weights alone are on the graph
                return features * 1.0
        return function(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Run a [`skeleton`], quickly: whatever it makes has no values either."""
    with torch.device("meta"), _QuickNorms():
        yield


def measure_layers(
    model: nn.Module, example: Tensor, kinds: Mapping[str, str], products: Mapping[str, tuple[int, Iterable[str]]]
) -> dict[str, Layer]:
    """
    Shapes of all layers, by one forward pass that also accounts for every multiply-accumulate of the model.

    Args:
        model (`nn.Module`): in eval mode.
        example (`torch.Tensor` of shape `[1, C, H, W]`): one image.
        kinds (`Mapping[str, str]`): of [`known_layers`].
        products (`Mapping`): by name of an attention module how many channels its products have (of keys and of values
            together), and the names of its layers. These products become layers called `"name:products"`.

    Raises:
        ValueError: If a module multiplies matrices (as unknown attention does) outside of layers; it is named.
    """
    modules = dict(model.named_modules())
    positions = dict.fromkeys(kinds, 0)
    handles = []
    for name in kinds:

        def count(module: nn.Module, inputs: tuple, output: Tensor, name: str = name) -> None:
            positions[name] += output.numel() // output.shape[channel_axis(module)]

        handles.append(modules[name].register_forward_hook(count))
    # Fused and plain attention do the same products; torch 2.11 can count only the plain ones on a CPU. The counter
    # fails on views of parameters that want gradients.
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), frozen(model), sdpa_kernel(SDPBackend.MATH), counter:
            logits_of(model(example))
    finally:
        for handle in handles:
            handle.remove()
    layers = {name: _shape(modules[name], kind, positions[name]) for name, kind in kinds.items()}
    counts = {name.partition(".")[2]: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    for name, (width, inner) in products.items():
        each, rest = divmod(counts.get(name, 0) // 2 - sum(layers[layer].macs for layer in inner), width)
        if rest or each < 0:
            raise unsupported(name, modules[name], "multiplies more than queries, keys and values")
        layers[f"{name}:products"] = Layer("products", width, 1, each, 0, 0)
    if counter.get_total_flops() != 2 * sum(layer.macs for layer in layers.values()):
        _refuse_other_products(counts, modules, (*kinds, *products))
    return layers


def loose_parameters(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters that belong to no layer (position embeddings, scales), by name."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] not in layers}


def parameter_layer(parameter: nn.Parameter, axis: int = 0) -> Layer:
    """A parameter without a layer, with its channels along an axis."""
    outs = max(1, parameter.shape[axis]) if parameter.ndim else 1
    return Layer("parameter", outs, 1, 0, parameter.numel() // outs, 0, axis=axis)


def _shape(module: nn.Module, kind: str, positions: int) -> Layer:
    bias = int(getattr(module, "bias", None) is not None)
    weight: Any = getattr(module, "weight", None)
    if kind == "norm":
        counts = [getattr(module, name, None) for name in ("num_features", "num_channels")]
        outs = next((count for count in counts if isinstance(count, int)), None)
        outs = outs or getattr(module, "normalized_shape")[0]  # noqa: B009
        return Layer(kind, outs, 1, 0, int(weight is not None), bias)
    kernel = weight[0, 0].numel()
    groups = module.groups if kind == "grouped" else 1
    return Layer(kind, weight.shape[0], weight.shape[1], positions * kernel, kernel, bias, groups)  # type: ignore[arg-type]


def _refuse_other_products(counts: Mapping[str, int], modules: Mapping[str, nn.Module], known: Iterable[str]) -> None:
    # The innermost module is the one to name.
    inside = tuple(f"{name}." for name in known)
    for name, module in reversed(list(modules.items())):
        children = sum(counts.get(f"{name}.{child}".lstrip("."), 0) for child, _ in module.named_children())
        if not f"{name}.".startswith(inside) and counts.get(name, 0) > children:
            raise unsupported(name, module, "multiplies matrices or convolves outside of such layers")
    raise unsupported("", modules[""], "computes products that its layers do not account for")

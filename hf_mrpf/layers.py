"""The layers of a network: their shapes, what they cost, and which indices of their sides are which channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .architectures import FoundAttention, channel_axis, unsupported

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
            several after a flatten, a concatenation with itself or in groups; offset after a concatenation.
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


def measure_layers(
    model: nn.Module, example: Tensor, kinds: Mapping[str, str], attentions: Mapping[str, FoundAttention]
) -> dict[str, Layer]:
    """Shapes of all layers; refuses a model whose multiply-accumulates they do not account for."""
    modules = dict(model.named_modules())
    positions = dict.fromkeys(kinds, 0)
    handles = []
    for name in kinds:

        def count(module: nn.Module, inputs: tuple, output: Tensor, name: str = name) -> None:
            positions[name] += output.numel() // output.shape[channel_axis(module)]

        handles.append(modules[name].register_forward_hook(count))
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    layers = {name: _shape(modules[name], kind, positions[name]) for name, kind in kinds.items()}
    counts = {name.partition(".")[2]: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    for name, attention in attentions.items():
        own = sum(_macs(layers[layer]) for layer in attention.inner)
        width = 2 * attention.heads * attention.dim
        each, rest = divmod(counts.get(name, 0) // 2 - own, width)
        if rest or each < 0:
            raise unsupported(name, modules[name], "multiplies more than queries, keys and values")
        layers[f"{name}:products"] = Layer("products", width, 1, each, 0, 0)
    if counter.get_total_flops() != 2 * sum(map(_macs, layers.values())):
        _refuse_other_products(counts, modules, {*kinds, *attentions})
    inside = {name: (axis, attention.heads) for attention in attentions.values() for name, axis in attention.per_head}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in kinds:
            axis, outs = inside.get(name, (0, 1))
            layers[name] = Layer("parameter", outs, 1, 0, parameter.numel() // outs, 0, axis=axis)
    return layers


def _macs(layer: Layer) -> int:
    return layer.macs_each * layer.outs * layer.ins


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


def _refuse_other_products(counts: Mapping[str, int], modules: Mapping[str, nn.Module], known: set[str]) -> None:
    """Name the innermost module that multiplies matrices (as attention does) outside of the known layers."""
    for name, module in reversed(list(modules.items())):
        children = sum(counts.get(f"{name}.{child}".lstrip("."), 0) for child, _ in module.named_children())
        inside = any(name.startswith(f"{layer}.") for layer in known)
        if name not in known and not inside and counts.get(name, 0) > children:
            raise unsupported(name, module, "multiplies matrices or convolves outside of such layers")
    raise unsupported("", modules[""], "computes products that its layers do not account for")


def by_groups(groups: int, share: int) -> bool:
    return groups >= share

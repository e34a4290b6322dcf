"""Coupled channels: what must be pruned together, and what a network costs at any widths, without running it again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .architectures import known_layers, unsupported
from .attacks import eval_mode, logits_of
from .operations import ChannelWatch

if TYPE_CHECKING:
    from torch_pruning.dependency import Group

METRICS = ("macs", "params")


@dataclass(frozen=True)
class PruningUnit:
    """
    Channels that share one width: a residual stream, the inside of a block, a depthwise chain.

    Attributes:
        name (`str`):
            Name of the first member in module order.
        kind (`str`):
            `"channels"`.
        width (`int`):
            Number of channels. Channel `i` is output `i` of every member (a block of outputs where they are
            unflattened).
        members (`tuple[str, ...]`):
            `named_modules` names of the convolutions and linear layers whose *output* channels are in the unit, in
            module order.
        cost (`int`):
            Multiply-accumulates per image that touch the unit: those that would be saved if it had no channels. One
            between two units counts in both, so costs add up to more than the network's.
    """

    name: str
    kind: str
    width: int
    members: tuple[str, ...]
    cost: int


@dataclass(frozen=True)
class Slot:
    """
    One side of one layer that follows a unit's width.

    Attributes:
        layer (`str`): `named_modules` name.
        side (`str`): `"out"`, `"in"`, or `"both"` where they are the same channels (BatchNorm, depthwise layers).
        positions (`tuple[tuple[int, ...], ...]`): for each channel of the unit its indices on that side: one, or
            several after a flatten; offset after a concatenation.
    """

    layer: str
    side: str
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Layer:
    """Shape of a layer: MACs are `macs_each * outs * ins` (`ins` is 1 in depthwise and norm layers)."""

    kind: str
    outs: int
    ins: int
    macs_each: int
    params_each: int
    params_out: int


@dataclass(frozen=True, eq=False)
class UnitGraph:
    """
    The units of a model and all that planning needs to know of them. Made by [`trace_units`].

    Attributes:
        units (`tuple[PruningUnit, ...]`): in module order of their first members.
        slots (`dict[str, tuple[Slot, ...]]`): by unit name.
        groups (`dict[str, Group]`): torch-pruning's groups with all channels, for its importance functions.
        layers (`dict[str, _Layer]`): every layer with parameters.
    """

    units: tuple[PruningUnit, ...]
    slots: dict[str, tuple[Slot, ...]]
    groups: dict[str, "Group"]
    layers: dict[str, _Layer]

    def size(self, widths: Mapping[str, int]) -> dict[str, int]:
        """
        Count what the model would cost at other widths, exactly.

        Args:
            widths (`Mapping[str, int]`): channels kept by unit name; a unit that is not named keeps all.

        Returns:
            `dict[str, int]`: `"macs"` per image and `"params"`.
        """
        outs = {name: layer.outs for name, layer in self.layers.items()}
        ins = {name: layer.ins for name, layer in self.layers.items()}
        for unit in self.units:
            removed = unit.width - widths.get(unit.name, unit.width)
            for slot in self.slots[unit.name] if removed else ():
                side = ins if slot.side == "in" else outs
                side[slot.layer] -= removed * len(slot.positions[0])
        layers = self.layers.items()
        return {
            "macs": sum(layer.macs_each * outs[name] * ins[name] for name, layer in layers),
            "params": sum(outs[name] * (layer.params_each * ins[name] + layer.params_out) for name, layer in layers),
        }

    def touching(self, unit: PruningUnit, metric: str) -> int:
        """MACs per image (or parameters) that would be saved if `unit` had no channels at all."""
        return self.size({})[metric] - self.size({unit.name: 0})[metric]

    def removed_positions(self, kept: Mapping[str, Sequence[int]]) -> dict[tuple[str, str], list[int]]:
        """
        Translate kept channels of units to removed indices of layers.

        Args:
            kept (`Mapping[str, Sequence[int]]`): channels kept by unit name; a unit that is not named keeps all.

        Returns:
            `dict[tuple[str, str], list[int]]`: by (layer, side), sorted; sides that lose nothing are left out.
        """
        removed: dict[tuple[str, str], list[int]] = {}
        for unit in self.units:
            gone = sorted(set(range(unit.width)) - set(kept.get(unit.name, range(unit.width))))
            for slot in self.slots[unit.name] if gone else ():
                indices = removed.setdefault((slot.layer, slot.side), [])
                indices.extend(index for channel in gone for index in slot.positions[channel])
        return {key: sorted(indices) for key, indices in removed.items()}


def pruning_units(model: nn.Module, example: Tensor) -> list[PruningUnit]:
    """
    Find the coupled sets of channels of a model.

    Channels that reach the logits (the classes) belong to no unit: whatever layer makes the output is found by the
    trace itself, not by its name.

    Args:
        model (`nn.Module`):
            Model that returns logits or an output with `.logits`. It is run twice in eval mode; modes, gradients'
            flags, BatchNorm statistics and the random state are left as they were.
        example (`torch.Tensor` of shape `[N, C, H, W]`):
            Images of the size that counts, pixels in [0, 1]. The first one is used.

    Returns:
        `list[PruningUnit]`: in module order of their first members.

    Raises:
        ValueError: If the model holds a layer or an operation that could not be pruned rightly; its full class name is
            given.
    """
    return list(trace_units(model, example).units)


def trace_units(model: nn.Module, example: Tensor) -> UnitGraph:
    """Like [`pruning_units`], with the indices and sizes of every layer that they touch."""
    kinds = known_layers(model)
    if not isinstance(example, Tensor) or example.ndim != 4 or example.shape[0] == 0:
        given = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example is {given}; a tensor of at least one image [N, 3, H, W] is needed.")
    reference = next(model.parameters())
    example = example[:1].to(reference.device, reference.dtype)
    with eval_mode(model):
        layers = _measure(model, example, kinds)
        groups = _coupled_groups(model, example)
    names = {module: name for name, module in model.named_modules()}
    order = {name: index for index, name in enumerate(kinds)}
    found = []
    for group in groups:
        slots = tuple(sorted(_slots(group, names, layers), key=lambda slot: (order[slot.layer], slot.side)))
        members = tuple(slot.layer for slot in slots if slot.side != "in" and layers[slot.layer].kind != "norm")
        found.append((PruningUnit(members[0], "channels", len(slots[0].positions), members, 0), slots, group))
    found.sort(key=lambda entry: order[entry[0].name])
    graph = UnitGraph(
        tuple(unit for unit, _, _ in found),
        {unit.name: slots for unit, slots, _ in found},
        {unit.name: group for unit, _, group in found},
        layers,
    )
    costs = {unit.name: graph.touching(unit, "macs") for unit in graph.units}
    units = tuple(PruningUnit(u.name, u.kind, u.width, u.members, costs[u.name]) for u in graph.units)
    return UnitGraph(units, graph.slots, graph.groups, layers)


def _coupled_groups(model: nn.Module, example: Tensor) -> list["Group"]:
    """torch-pruning's groups of all channels, without those that reach the logits."""
    import torch_pruning as tp

    def forward(traced: nn.Module, images: Tensor) -> Tensor:
        # The sum is an operation of its own, so that the graph ends in an output node whatever layer makes the logits.
        return logits_of(traced(images)) + 0.0

    with torch.enable_grad(), _all_trainable(model):
        try:
            graph = tp.DependencyGraph().build_dependency(model, example, forward_fn=forward, verbose=False)
            groups = list(graph.get_all_groups())
        except Exception as error:
            # The forward pass itself ran just before, so this is an operation that torch-pruning cannot follow.
            raise unsupported("", model, f"holds an operation that torch-pruning cannot follow ({error!r})") from error
    output = tp.ops.OPTYPE.OUTPUT
    return [group for group in groups if all(dep.target.type != output for dep, _ in group)]


def _slots(group: "Group", names: Mapping[nn.Module, str], layers: Mapping[str, _Layer]) -> Iterator[Slot]:
    width = len(group[0].idxs)
    for item in group.items:
        name = names.get(item.dep.target.module, "")
        if name not in layers:
            continue
        layer = layers[name]
        if layer.kind in ("norm", "depthwise"):
            side = "both"
        else:
            side = "out" if item.dep.handler.__name__ == "prune_out_channels" else "in"
        positions: list[list[int]] = [[] for _ in range(width)]
        for index, channel in zip(item.idxs, item.root_idxs, strict=True):
            positions[channel].append(index)
        uneven = len({len(indices) for indices in positions}) != 1 or len(set(item.idxs)) != len(item.idxs)
        if uneven or (side == "out" and len(item.idxs) != layer.outs):
            raise unsupported(name, item.dep.target.module, "sees its channels mixed by an operation before it")
        yield Slot(name, side, tuple(tuple(sorted(indices)) for indices in positions))


def _measure(model: nn.Module, example: Tensor, kinds: Mapping[str, str]) -> dict[str, _Layer]:
    """Shapes of all layers; refuses a model whose multiply-accumulates they do not account for."""
    modules = dict(model.named_modules())
    positions = dict.fromkeys(kinds, 0)
    handles = []
    for name, kind in kinds.items():
        channel_axis = 1 if kind in ("conv", "depthwise") else -1

        def count(module: nn.Module, inputs: tuple, output: Tensor, name: str = name, axis: int = channel_axis) -> None:
            positions[name] += output.numel() // output.shape[axis]

        handles.append(modules[name].register_forward_hook(count))
    counter, watch = FlopCounterMode(display=False), ChannelWatch()
    try:
        with torch.enable_grad(), _all_trainable(model), counter, watch:
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    layers = {name: _shape(modules[name], kind, positions[name]) for name, kind in kinds.items()}
    if counter.get_total_flops() != 2 * sum(layer.macs_each * layer.outs * layer.ins for layer in layers.values()):
        _refuse_other_products(counter, modules, kinds)
    if watch.found:
        operations = ", ".join(dict.fromkeys(watch.found))
        raise unsupported("", model, f"moves or mixes channels between its layers ({operations})")
    return layers


def _shape(module: nn.Module, kind: str, positions: int) -> _Layer:
    bias = int(getattr(module, "bias", None) is not None)
    if kind == "norm":
        affine = int(module.weight is not None)
        return _Layer(kind, module.num_features, 1, 0, affine, bias)  # type: ignore[arg-type]
    weight = cast(Tensor, module.weight)
    kernel = weight[0, 0].numel()
    return _Layer(kind, weight.shape[0], weight.shape[1], positions * kernel, kernel, bias)


def _refuse_other_products(
    counter: FlopCounterMode, modules: Mapping[str, nn.Module], kinds: Mapping[str, str]
) -> None:
    """Name the innermost module that multiplies matrices (as attention does) outside of the known layers."""
    counts = {name.partition(".")[2]: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    for name, module in reversed(list(modules.items())):
        children = sum(counts.get(f"{name}.{child}".lstrip("."), 0) for child, _ in module.named_children())
        if name not in kinds and counts.get(name, 0) > children:
            raise unsupported(name, module, "multiplies matrices or convolves outside of such layers")
    raise unsupported("", modules[""], "computes products that its layers do not account for")


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Let autograd, which the trace reads, see every parameter; afterwards each has its own flag back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

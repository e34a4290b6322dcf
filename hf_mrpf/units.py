"""Coupled channels: what must be pruned together, and what a network costs at any widths, without running it again."""

import copy
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .architectures import FoundAttention, find_attention, known_layers, refresh, unsupported
from .attacks import eval_mode
from .coupling import couple
from .heads import head_parts, head_slots, removed_rows
from .layers import PRODUCERS, Layer, Slot, by_groups, measure_layers
from .surgery import cut_both, cut_inputs, cut_outputs, scale_rows, take

if TYPE_CHECKING:
    from torch_pruning.dependency import Group


METRICS = ("macs", "params")


@dataclass(frozen=True)
class PruningUnit:
    """
    Channels that share one width: a residual stream, the inside of a block, a depthwise chain, the heads of attention.

    Attributes:
        name (`str`):
            Name of the first member in module order, or of the attention module.
        kind (`str`):
            `"channels"`; `"attention"` for the channels of each head of one attention, of which every head keeps the
            same number; `"heads"` for whole heads.
        width (`int`):
            Number of channels: outputs of the first member, blocks of outputs where those cannot be parted (the groups
            of a grouped convolution), channels of one head, or heads.
        members (`tuple[str, ...]`):
            `named_modules` names of the convolutions and linear layers whose *output* channels are in the unit, in
            module order; with `":q"`, `":k"`, `":v"` for parts of a fused projection.
        cost (`int`):
            Multiply-accumulates per image that touch the unit: those that would be saved if it had no channels. One
            between two units counts in both, so costs add up to more than the network's.
    """

    name: str
    kind: str
    width: int
    members: tuple[str, ...]
    cost: int


@dataclass(frozen=True, eq=False)
class UnitGraph:
    """
    The units of a model and all that planning needs to know of them. Made by [`trace_units`].

    Attributes:
        units (`tuple[PruningUnit, ...]`): in module order of their first members.
        slots (`dict[str, tuple[Slot, ...]]`): by unit name.
        groups (`dict[str, Group]`): torch-pruning's groups with all channels, for its importance functions: one a unit
            of channels or heads; two for attention, `"name:qk"` and `"name:v"`, with the channels of all heads.
        layers (`dict[str, Layer]`): every layer with parameters.
        attention (`dict[str, FoundAttention]`): by unit name.
    """

    units: tuple[PruningUnit, ...]
    slots: dict[str, tuple[Slot, ...]]
    groups: dict[str, "Group"]
    layers: dict[str, Layer]
    attention: dict[str, FoundAttention]

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
                count = removed * len(slot.positions[0])
                if slot.side != "in":
                    outs[slot.layer] -= count
                elif not self.cuts_groups(slot.layer):
                    # Each group reads its own share of the inputs.
                    ins[slot.layer] -= count // self.layers[slot.layer].groups
        layers = self.layers.items()
        return {
            "macs": sum(layer.macs_each * outs[name] * ins[name] for name, layer in layers),
            "params": sum(outs[name] * (layer.params_each * ins[name] + layer.params_out) for name, layer in layers),
        }

    def touching(self, unit: PruningUnit, metric: str) -> int:
        """MACs per image (or parameters) that would be saved if `unit` had no channels at all."""
        return self.size({})[metric] - self.size({unit.name: 0})[metric]

    def cuts_groups(self, layer: str) -> bool:
        """Whether a grouped convolution loses whole groups, rather than channels inside every group."""
        shape = self.layers[layer]
        return shape.kind == "grouped" and by_groups(shape.groups, shape.ins)

    def removed_positions(self, kept: Mapping[str, Any]) -> dict[tuple[str, str], list[int]]:
        """
        Translate kept channels of units to removed indices of layers.

        Args:
            kept (`Mapping`): channels kept by unit name, as in [`PruningPlan`]; a unit that is not named keeps all.

        Returns:
            `dict[tuple[str, str], list[int]]`: by (layer, side), sorted; sides that lose nothing are left out.
        """
        removed: dict[tuple[str, str], set[int]] = {}
        for unit in self.units:
            if unit.name not in kept:
                continue
            if unit.name in self.attention:
                for key, indices in removed_rows(self.attention[unit.name], kept[unit.name]):
                    removed.setdefault(key, set()).update(indices)
                continue
            gone = set(range(unit.width)) - set(kept[unit.name])
            for slot in self.slots[unit.name]:
                indices = removed.setdefault((slot.layer, slot.side), set())
                indices.update(index for channel in gone for index in slot.positions[channel])
        return {key: sorted(indices) for key, indices in removed.items() if indices}

    def folded_scale(self, kept: Mapping[str, Any], layer: str) -> list[float] | None:
        """
        Factors of a query projection's kept rows that make up for the softmax scale of narrower heads.

        Heads of D' channels are scaled by `D' ** -0.5`: times `sqrt(D' / D)` on the queries that is `D ** -0.5` again.

        Returns:
            `list[float]`, *optional*: one factor a kept row; None where the layer makes no queries, or narrower ones.
        """
        for name, attention in self.attention.items():
            if attention.rows.get("q", ("", 0))[0] != layer or name not in kept:
                continue
            heads = [len(dims) for dims in kept[name]["qk"]]
            factor = (heads[0] / attention.dim) ** 0.5
            values = sum(len(dims) for dims in kept[name]["v"])
            rows = {"q": sum(heads), "k": sum(heads), "v": values}
            order = sorted(part for part, (own, _) in attention.rows.items() if own == layer)
            order.sort(key=lambda part: attention.rows[part][1])
            return [factor if part == "q" else 1.0 for part in order for _ in range(rows[part])]
        return None


def pruning_units(model: nn.Module, example: Tensor, *, heads: bool = False) -> list[PruningUnit]:
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
        heads (`bool`, *optional*, defaults to `False`):
            Whether attention loses whole heads, instead of channels of every head (linear attention has no heads).

    Returns:
        `list[PruningUnit]`: in module order of their first members.

    Raises:
        ValueError: If the model holds a layer or an operation that could not be pruned rightly; its full class name is
            given.
    """
    return list(trace_units(model, example, heads=heads).units)


def trace_units(model: nn.Module, example: Tensor, *, heads: bool = False, check: bool = True) -> UnitGraph:
    """Like [`pruning_units`], with the indices and sizes of every layer that they touch."""
    if not isinstance(example, Tensor) or example.ndim != 4 or example.shape[0] == 0:
        given = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example is {given}; a tensor of at least one image [N, 3, H, W] is needed.")
    known_layers(model)
    reference = next(model.parameters())
    example = example[:1].to(reference.device, reference.dtype)
    graph = _trace(model, example, heads)
    if check:
        _check_smaller(model, example, graph, heads)
    return graph


def cut(model: nn.Module, graph: UnitGraph, kept: Mapping[str, Any]) -> None:
    """Remove from a model, in place, what `kept` (as in [`PruningPlan`]) does not keep of the units of its graph."""
    # Each side of each layer is cut once, by indices into the dense layer, so no cut can shift another's indices.
    for (name, side), removed in graph.removed_positions(kept).items():
        layer, whole = graph.layers[name], graph.cuts_groups(name)
        if layer.kind == "parameter":
            owner, _, parameter = name.rpartition(".")
            take(model.get_submodule(owner), parameter, layer.axis, removed)
        elif side == "both":
            cut_both(model.get_submodule(name), removed)
        elif side == "in":
            cut_inputs(model.get_submodule(name), removed, whole_groups=whole)
        else:
            groups = len(removed) * layer.groups // layer.outs if whole else 0
            cut_outputs(model.get_submodule(name), removed, groups=groups)
    for name, attention in graph.attention.items():
        if name in kept and attention.heads_attribute is not None:
            factors = graph.folded_scale(kept, attention.rows["q"][0])
            if factors is not None:
                scale_rows(model.get_submodule(attention.rows["q"][0]), factors)
            module, attribute = attention.heads_attribute
            setattr(model.get_submodule(module), attribute, len(kept[name]["heads"]))
    refresh(model)


def _check_smaller(model: nn.Module, example: Tensor, graph: UnitGraph, heads: bool) -> None:
    """
    Cut a copy and see that its channels go where they went before: a network's own code may count on fixed widths, or
    split channels by their number (as a channel shuffle does), and would then mix others.
    """
    generator = torch.Generator().manual_seed(0)

    def some(width: int) -> list[int]:
        return sorted(torch.randperm(width, generator=generator)[: max(1, (2 * width) // 3)].tolist())

    kept: dict[str, Any] = {}
    for unit in graph.units:
        # A grouped convolution with fewer groups may be one that loses channels inside its groups.
        grouped = any(graph.layers[slot.layer].groups > 1 for slot in graph.slots[unit.name])
        kept[unit.name] = list(range(unit.width)) if grouped else some(unit.width)
        if unit.kind != "channels":
            attention = graph.attention[unit.name]
            whole, dims = list(range(attention.heads)), kept[unit.name]
            if unit.kind == "heads":
                whole, dims = dims, list(range(attention.dim))
            kept[unit.name] = {"heads": whole, "qk": [dims] * len(whole), "v": [dims] * len(whole)}
    smaller = copy.deepcopy(model)
    try:
        cut(smaller, graph, kept)
        found = _trace(smaller, example, heads)
    except Exception as error:
        raise unsupported("", model, f"does not run, or not rightly, with fewer channels ({error})") from error
    removed = graph.removed_positions(kept)
    for unit in graph.units:
        if unit.kind == "channels":
            slots = {_renumbered(slot, kept[unit.name], removed) for slot in graph.slots[unit.name]}
            if slots != set(found.slots.get(unit.name, ())):
                raise unsupported("", model, f"moves or mixes channels between its layers (those of {unit.name!r})")


def _renumbered(slot: Slot, kept: Sequence[int], removed: Mapping[tuple[str, str], Sequence[int]]) -> Slot:
    """The slot as it must be once channels are gone."""
    gone = sorted(removed.get((slot.layer, slot.side), ()))
    positions = (slot.positions[channel] for channel in kept)
    return replace(slot, positions=tuple(tuple(index - bisect(gone, index) for index in own) for own in positions))


def _trace(model: nn.Module, example: Tensor, heads: bool) -> UnitGraph:
    kinds = known_layers(model)
    attentions = {attention.name: attention for attention in find_attention(model)}
    with eval_mode(model), torch.no_grad():
        layers = measure_layers(model, example, kinds, attentions)
        slots = couple(model, example, layers, attentions)
    whole = {name: heads and attention.heads_attribute is not None for name, attention in attentions.items()}
    for name, attention in attentions.items():
        slots[name] = head_slots(attention, whole[name])
    order = {name: index for index, name in enumerate(kinds)}
    modules = dict(model.named_modules())
    units: list[PruningUnit] = []
    groups: dict[str, Group] = {}
    for name, own in slots.items():
        if name in attentions:
            width, members = len(own[0].positions), attentions[name].members
            units.append(PruningUnit(name, "heads" if whole[name] else "attention", width, members, 0))
            parts = head_parts(attentions[name], own, whole[name])
            groups |= {key: _group(modules, layers, part) for key, part in parts}
            continue
        members = tuple(slot.layer for slot in own if slot.side != "in" and layers[slot.layer].kind in PRODUCERS)
        units.append(PruningUnit(name, "channels", len(own[0].positions), members, 0))
        groups[name] = _group(modules, layers, own)
    units.sort(key=lambda unit: order[unit.members[0].partition(":")[0]])
    graph = UnitGraph(tuple(units), slots, groups, layers, attentions)
    costs = {unit.name: graph.touching(unit, "macs") for unit in units}
    return replace(graph, units=tuple(replace(unit, cost=costs[unit.name]) for unit in units))


def _group(modules: Mapping[str, nn.Module], layers: Mapping[str, Layer], slots: Sequence[Slot]) -> "Group":
    """The slots as torch-pruning's importance functions read them."""
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
        (slot for slot in slots if layers[slot.layer].kind != "parameter"), key=lambda slot: len(slot.positions[0])
    )
    if len(order[0].positions[0]) > 1:
        width = len(order[0].positions)
        nothing = nn.Linear(1, width, bias=False)
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

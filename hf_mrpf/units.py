"""Coupled channels: what must be pruned together, and what a network costs at any widths, without running it again."""

import copy
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .architectures import FoundAttention, channel_axis, find_attention, known_layers, refresh, unsupported
from .attacks import eval_mode, logits_of
from .operations import ChannelTrace
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
class _Layer:
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


@dataclass(frozen=True, eq=False)
class UnitGraph:
    """
    The units of a model and all that planning needs to know of them. Made by [`trace_units`].

    Attributes:
        units (`tuple[PruningUnit, ...]`): in module order of their first members.
        slots (`dict[str, tuple[Slot, ...]]`): by unit name.
        groups (`dict[str, Group]`): torch-pruning's groups with all channels, for its importance functions: one a unit
            of channels or heads; two for attention, `"name:qk"` and `"name:v"`, with the channels of all heads.
        layers (`dict[str, _Layer]`): every layer with parameters.
        attention (`dict[str, FoundAttention]`): by unit name.
    """

    units: tuple[PruningUnit, ...]
    slots: dict[str, tuple[Slot, ...]]
    groups: dict[str, "Group"]
    layers: dict[str, _Layer]
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
        return shape.kind == "grouped" and _by_groups(shape.groups, shape.ins)

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
                for key, indices in _removed_heads(self.attention[unit.name], kept[unit.name]):
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
        layers = _measure(model, example, kinds, attentions)
        slots = _couple(model, example, layers, attentions)
    whole = {name: heads and attention.heads_attribute is not None for name, attention in attentions.items()}
    for name, attention in attentions.items():
        slots[name] = _attention_slots(attention, whole[name])
    order = {name: index for index, name in enumerate(kinds)}
    modules = dict(model.named_modules())
    units: list[PruningUnit] = []
    groups: dict[str, Group] = {}
    for name, own in slots.items():
        if name in attentions:
            width, members = len(own[0].positions), attentions[name].members
            units.append(PruningUnit(name, "heads" if whole[name] else "attention", width, members, 0))
            parts = _head_parts(attentions[name], own, whole[name])
            groups |= {key: _group(modules, layers, part) for key, part in parts}
            continue
        members = tuple(slot.layer for slot in own if slot.side != "in" and layers[slot.layer].kind in _PRODUCERS)
        units.append(PruningUnit(name, "channels", len(own[0].positions), members, 0))
        groups[name] = _group(modules, layers, own)
    units.sort(key=lambda unit: order[unit.members[0].partition(":")[0]])
    graph = UnitGraph(tuple(units), slots, groups, layers, attentions)
    costs = {unit.name: graph.touching(unit, "macs") for unit in units}
    return replace(graph, units=tuple(replace(unit, cost=costs[unit.name]) for unit in units))


# Kinds of layers whose outputs are channels of their own.
_PRODUCERS = ("conv", "linear", "depthwise", "grouped")


def _couple(
    model: nn.Module, example: Tensor, layers: dict[str, _Layer], attentions: Mapping[str, FoundAttention]
) -> dict[str, tuple[Slot, ...]]:
    """Slots of every set of coupled channels, by the name of its first member; without those that reach the logits."""
    modules = dict(model.named_modules())
    loose = {name: model.get_parameter(name) for name, layer in layers.items() if layer.kind == "parameter"}
    trace = ChannelTrace({n: p for n, p in loose.items() if not n.startswith(tuple(f"{a}." for a in attentions))})
    for name, layer in layers.items():
        if layer.kind in ("norm", "depthwise"):
            trace.reserve(f"{name} both", layer.outs)
        elif layer.kind in _PRODUCERS:
            trace.reserve(f"{name} in", layer.ins * layer.groups)
            trace.reserve(f"{name} out", layer.outs)
            if layer.groups > 1:
                _tie_groups(trace, name, layer)
    with _watched(model, trace, layers, attentions), trace:
        logits = logits_of(model(example))
    classes = trace.of(logits)
    channels = trace.channels()
    if trace.found:
        name = next(iter(trace.found.values()))
        operations = ", ".join(operation for operation, where in trace.found.items() if where == name)
        raise unsupported(name, modules[name], f"moves or mixes channels between its layers ({operations})")
    fixed = set(channels[classes].tolist())
    inside = {f"{layer} out" for attention in attentions.values() for layer, _ in attention.rows.values()}
    inside |= {f"{attention.out} in" for attention in attentions.values()}
    return _slots(model, trace, fixed, channels, layers, inside)


def _slots(
    model: nn.Module,
    trace: ChannelTrace,
    fixed: set[int],
    channels: Tensor,
    layers: dict[str, _Layer],
    inside: set[str],
) -> dict[str, tuple[Slot, ...]]:
    """Group channels by the layers that make them."""
    positions: dict[tuple[str, str], dict[int, list[int]]] = {}
    makers: dict[int, list[str]] = {}
    touched: dict[int, list[tuple[str, str]]] = {}
    loose: dict[str, Tensor] = {}
    for key, first in trace.first.items():
        name, _, side = key.partition(" ")
        own = channels[first : first + trace.count[key]]
        if not side:
            loose[name] = own
        elif key not in inside:
            by_channel = positions.setdefault((name, side), {})
            for index, channel in enumerate(own.tolist()):
                if channel not in fixed:
                    by_channel.setdefault(channel, []).append(index)
            if side != "in" and layers[name].kind in _PRODUCERS:
                for channel in by_channel:
                    makers.setdefault(channel, []).append(name)
    for name, own in loose.items():
        if any(channel in makers for channel in own.tolist()):
            positions[name, "out"] = _parameter_positions(model, name, own, layers)
    for place, by_channel in positions.items():
        for channel in by_channel:
            touched.setdefault(channel, []).append(place)
    found: dict[str, list[int]] = {}
    for channel, names in makers.items():
        found.setdefault(names[0], []).append(channel)
    slots = {}
    for unit, members in found.items():
        members.sort(key=lambda channel: _first_position(positions, unit, channel))
        own_slots = []
        for name, side in dict.fromkeys(place for channel in members for place in touched[channel]):
            by_channel = positions[name, side]
            here = [by_channel.get(channel, []) for channel in members]
            made_elsewhere = name in makers[members[0]] and side != "in" and set(by_channel) != set(members)
            if made_elsewhere or len({len(indices) for indices in here}) != 1:
                raise unsupported(name, _owner(model, name), "sees its channels mixed by an operation before it")
            own_slots.append(Slot(name, side, tuple(tuple(indices) for indices in here)))
        if len(members) == 1 and layers[unit].outs > 1:
            raise unsupported(unit, _owner(model, unit), "moves or mixes channels between its layers: all become one")
        slots[unit] = tuple(own_slots)
    return slots


def _first_position(positions: Mapping[tuple[str, str], Mapping[int, list[int]]], name: str, channel: int) -> int:
    return positions[(name, "both") if (name, "both") in positions else (name, "out")][channel][0]


def _owner(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    return modules[name] if name in modules else modules[name.rpartition(".")[0]]


def _parameter_positions(
    model: nn.Module, name: str, channels: Tensor, layers: dict[str, _Layer]
) -> dict[int, list[int]]:
    """Channels of a parameter without a layer: those of the one axis that its elements differ along."""
    shape = model.get_parameter(name).shape
    channels = channels.reshape(shape)
    for axis, size in enumerate(shape):
        along = channels.movedim(axis, 0).reshape(size, -1)
        if bool((along == along[:, :1]).all()):
            layers[name] = replace(layers[name], outs=size, params_each=channels.numel() // size, axis=axis)
            by_channel: dict[int, list[int]] = {}
            for index, channel in enumerate(along[:, 0].tolist()):
                by_channel.setdefault(channel, []).append(index)
            return by_channel
    raise unsupported(
        name.rpartition(".")[0], _owner(model, name), f"holds {name!r}, whose channels lie on no one axis"
    )


def _tie_groups(trace: ChannelTrace, name: str, layer: _Layer) -> None:
    """A grouped convolution loses whole groups, or the same number of channels in every group: whatever is finer."""
    ins = trace.labels(f"{name} in").reshape(layer.groups, -1)
    outs = trace.labels(f"{name} out").reshape(layer.groups, -1)
    if _by_groups(layer.groups, layer.ins):
        trace.tie(ins, ins[:, :1].expand_as(ins))
        trace.tie(outs, ins[:, :1].expand_as(outs))
    else:
        trace.tie(ins, ins[:1].expand_as(ins))
        trace.tie(outs, outs[:1].expand_as(outs))


def _by_groups(groups: int, share: int) -> bool:
    return groups >= share


@contextmanager
def _watched(
    model: nn.Module,
    trace: ChannelTrace,
    layers: Mapping[str, _Layer],
    attentions: Mapping[str, FoundAttention],
) -> Iterator[None]:
    """Tell the trace what every layer reads and writes, and which module runs."""
    modules = dict(model.named_modules())
    handles = []

    def watch(name: str, reads: list[tuple[str, int]], writes: tuple[str, int]) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if trace.enter():
                images = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
                for label, axis in reads:
                    trace.read(images, label, axis)

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if trace.leave():
                trace.write(output if isinstance(output, Tensor) else output[0], *writes)

        handles.append(modules[name].register_forward_pre_hook(before, with_kwargs=True))
        handles.append(modules[name].register_forward_hook(after))

    def pause(module: nn.Module, *ignored: Any) -> None:
        trace.running.append(names[module])

    def resume(module: nn.Module, *ignored: Any) -> None:
        trace.running.pop()

    names = {module: name for name, module in modules.items()}
    inner = {name for attention in attentions.values() for name in attention.inner}
    for name, module in modules.items():
        if name in attentions:
            attention = attentions[name]
            axis = channel_axis(modules[attention.out])
            read = dict.fromkeys(layer for layer, _ in attention.rows.values())
            watch(name, [(f"{layer} in", axis) for layer in read], (f"{attention.out} out", axis))
        elif name in layers and name not in inner:
            axis = channel_axis(module)
            same = layers[name].kind in ("norm", "depthwise")
            ins, outs = ("both", "both") if same else ("in", "out")
            watch(name, [(f"{name} {ins}", axis)], (f"{name} {outs}", axis))
        else:
            handles.append(module.register_forward_pre_hook(pause))
            handles.append(module.register_forward_hook(resume))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    model: nn.Module, example: Tensor, kinds: Mapping[str, str], attentions: Mapping[str, FoundAttention]
) -> dict[str, _Layer]:
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
        layers[f"{name}:products"] = _Layer("products", width, 1, each, 0, 0)
    if counter.get_total_flops() != 2 * sum(map(_macs, layers.values())):
        _refuse_other_products(counts, modules, {*kinds, *attentions})
    inside = {name: (axis, attention.heads) for attention in attentions.values() for name, axis in attention.per_head}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in kinds:
            axis, outs = inside.get(name, (0, 1))
            layers[name] = _Layer("parameter", outs, 1, 0, parameter.numel() // outs, 0, axis=axis)
    return layers


def _macs(layer: _Layer) -> int:
    return layer.macs_each * layer.outs * layer.ins


def _shape(module: nn.Module, kind: str, positions: int) -> _Layer:
    bias = int(getattr(module, "bias", None) is not None)
    weight: Any = getattr(module, "weight", None)
    if kind == "norm":
        counts = [getattr(module, name, None) for name in ("num_features", "num_channels")]
        outs = next((count for count in counts if isinstance(count, int)), None)
        outs = outs or getattr(module, "normalized_shape")[0]  # noqa: B009
        return _Layer(kind, outs, 1, 0, int(weight is not None), bias)
    kernel = weight[0, 0].numel()
    groups = module.groups if kind == "grouped" else 1
    return _Layer(kind, weight.shape[0], weight.shape[1], positions * kernel, kernel, bias, groups)  # type: ignore[arg-type]


def _refuse_other_products(counts: Mapping[str, int], modules: Mapping[str, nn.Module], known: set[str]) -> None:
    """Name the innermost module that multiplies matrices (as attention does) outside of the known layers."""
    for name, module in reversed(list(modules.items())):
        children = sum(counts.get(f"{name}.{child}".lstrip("."), 0) for child, _ in module.named_children())
        inside = any(name.startswith(f"{layer}.") for layer in known)
        if name not in known and not inside and counts.get(name, 0) > children:
            raise unsupported(name, module, "multiplies matrices or convolves outside of such layers")
    raise unsupported("", modules[""], "computes products that its layers do not account for")


def _attention_slots(attention: FoundAttention, heads: bool) -> tuple[Slot, ...]:
    """Rows and columns of each channel of all heads, or of each head."""
    count, dim = attention.heads, attention.dim
    if heads:
        blocks = [[head * dim + channel for channel in range(dim)] for head in range(count)]
    else:
        blocks = [[head * dim + channel for head in range(count)] for channel in range(dim)]
    by_layer: dict[str, list[list[int]]] = {}
    for layer, first in attention.rows.values():
        rows = by_layer.setdefault(layer, [[] for _ in blocks])
        for own, block in zip(rows, blocks, strict=True):
            own.extend(first + index for index in block)
    slots = [Slot(layer, "out", tuple(map(tuple, rows))) for layer, rows in by_layer.items()]
    slots.append(Slot(attention.out, "in", tuple(map(tuple, blocks))))
    slots.append(Slot(f"{attention.name}:products", "out", tuple((*block, *block) for block in blocks)))
    if heads:
        slots += [Slot(name, "out", tuple((head,) for head in range(count))) for name, _ in attention.per_head]
    return tuple(slots)


def _removed_heads(attention: FoundAttention, kept: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], set[int]]]:
    size, dim = attention.heads * attention.dim, attention.dim
    gone = {}
    for part in ("qk", "v"):
        rows = (head * dim + channel for head, own in zip(kept["heads"], kept[part], strict=True) for channel in own)
        gone[part] = set(range(size)) - set(rows)
    for part, (layer, first) in attention.rows.items():
        yield (layer, "out"), {first + row for row in gone["v" if part == "v" else "qk"]}
    yield (attention.out, "in"), gone["v"]
    for name, _ in attention.per_head:
        yield (name, "out"), set(range(attention.heads)) - set(kept["heads"])


def _head_parts(attention: FoundAttention, slots: Sequence[Slot], heads: bool) -> Iterator[tuple[str, list[Slot]]]:
    """What each importance of an attention unit is taken over."""
    if heads:
        yield attention.name, [slot for slot in slots if slot.side == "in" or slot.layer in attention.inner]
        return
    size = attention.heads * attention.dim

    def rows(part: str) -> Slot:
        layer, first = attention.rows[part]
        return Slot(layer, "out", tuple((first + row,) for row in range(size)))

    columns = Slot(attention.out, "in", tuple((column,) for column in range(size)))
    if "q" in attention.rows:
        yield f"{attention.name}:qk", [rows("q"), rows("k")]
        yield f"{attention.name}:v", [rows("v"), columns]
    else:
        # Keys and values are multiplied channel by channel: they go together.
        yield f"{attention.name}:v", [rows("k"), rows("v"), columns]


def _group(modules: Mapping[str, nn.Module], layers: Mapping[str, _Layer], slots: Sequence[Slot]) -> "Group":
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

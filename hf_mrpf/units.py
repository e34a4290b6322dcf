"""Coupled channels: what must be pruned together, and what a network costs at any widths, without running it again."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .architectures import known_layers, owner, refresh, unsupported
from .attention import FoundAttention, find_attention, head_parts, head_slots, removed_rows
from .coupling import EndlessGroupError, couple
from .exactness import TOLERANCES, removal_error
from .groups import importance_group
from .layers import PRODUCERS, Layer, Slot, loose_parameters, measure_layers, parameter_layer, shapes_only, skeleton
from .modes import eval_mode
from .surgery import cut_layer, scale_rows
from .wrappers import refuse_hidden

if TYPE_CHECKING:
    from torch_pruning.dependency import Group


LOGGER = logging.getLogger("hf_mrpf")
METRICS = ("macs", "params")
# Side of the images on which planning checks a removal: 2x2 positions at a stride of 32.
_CHECKED_SIDE = 64
# Units of which little is enough for a check: the less is left, the sooner it has run.
_WIDE = 48


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
                elif not self.layers[slot.layer].loses_groups:
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

    def structure(self, unit: PruningUnit) -> tuple[str, ...]:
        """
        How a unit is built: its kind, then kind and side of all layers that its channels pass, in module order.

        Equal for units that are built alike, whatever their widths and kernels, such as the insides of two blocks.
        """
        sides = (f"{self.layers[slot.layer].kind} {slot.side}" for slot in self.slots[unit.name])
        return (unit.kind, *sides)

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
            given. If it is wrapped by `torch.compile(model)` or for data parallelism: give the network itself.
    """
    return list(trace_units(model, example, heads=heads).units)


def trace_units(model: nn.Module, example: Tensor, *, heads: bool = False, check: bool = True) -> UnitGraph:
    """Like [`pruning_units`], with the indices and sizes of every layer that they touch."""
    if not isinstance(example, Tensor) or example.ndim != 4 or example.shape[0] == 0:
        given = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example is {given}; a tensor of at least one image [N, 3, H, W] is needed.")
    if torch.is_inference_mode_enabled():
        raise ValueError("channels cannot be traced inside torch.inference_mode(); leave it, or use torch.no_grad().")
    refuse_hidden(model)
    kinds, attentions = known_layers(model), find_attention(model)
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    if reference is None:
        raise unsupported("", model, "has no weights")
    example = example[:1].to(reference.device, reference.dtype)
    try:
        with shapes_only():
            layers, coupled = _follow(skeleton(model), example.to("meta"), kinds, attentions)
    except Exception as error:  # code that reads values may fail in any way; what cannot be pruned fails again
        if isinstance(error.__cause__, EndlessGroupError):
            raise
        LOGGER.debug("%s does not run on shapes alone (%s); it is traced with values.", type(model).__name__, error)
        layers, coupled = _follow(model, example, kinds, attentions)
    graph = _graph(model, kinds, layers, coupled, attentions, heads)
    if not graph.units:
        raise unsupported("", model, "has no channels that could go: all of them are pixels or classes")
    if check:
        generator = torch.Generator().manual_seed(0)
        _check_some(model, example, graph, {unit.name: _some(graph, unit, generator) for unit in graph.units})
    return graph


def _follow(
    model: nn.Module, example: Tensor, kinds: Mapping[str, str], attentions: dict[str, FoundAttention]
) -> tuple[dict[str, Layer], list[tuple[Slot, ...]]]:
    """What the layers of a model are, and which of their channels are coupled."""
    products = {name: (2 * a.heads * a.dim, {*a.projections, a.out}) for name, a in attentions.items()}
    with eval_mode(model):
        layers = measure_layers(model, example, kinds, products)
        axes = {name: axis for attention in attentions.values() for name, axis in attention.per_head.items()}
        for name, parameter in loose_parameters(model, kinds).items():
            layers[name] = parameter_layer(parameter, axes.get(name, 0))
        return layers, couple(model, example, layers, attentions)


def cut(model: nn.Module, graph: UnitGraph, kept: Mapping[str, Any]) -> None:
    """Remove from a model, in place, what `kept` (as in [`PruningPlan`]) does not keep of the units of its graph."""
    # Each side of each layer is cut once, by indices into the dense layer, so no cut can shift another's indices.
    for (name, side), removed in graph.removed_positions(kept).items():
        cut_layer(model, name, graph.layers[name], side, removed)
    for name, attention in graph.attention.items():
        if name in kept and attention.heads_attribute is not None:
            queries = attention.rows["q"][0]
            if (factors := graph.folded_scale(kept, queries)) is not None:
                scale_rows(model.get_submodule(queries), factors)
            module, attribute = attention.heads_attribute
            setattr(model.get_submodule(module), attribute, len(kept[name]["heads"]))
    refresh(model)


def _graph(
    model: nn.Module,
    kinds: Mapping[str, str],
    layers: dict[str, Layer],
    coupled: Sequence[tuple[Slot, ...]],
    attentions: dict[str, FoundAttention],
    heads: bool,
) -> UnitGraph:
    order = {name: index for index, name in enumerate(kinds)}
    modules = dict(model.named_modules())
    units: list[PruningUnit] = []
    slots: dict[str, tuple[Slot, ...]] = {}
    groups: dict[str, Group] = {}
    for own in coupled:
        members = tuple(slot.layer for slot in own if slot.side != "in" and layers[slot.layer].kind in PRODUCERS)
        units.append(PruningUnit(members[0], "channels", len(own[0].positions), members, 0))
        slots[members[0]], groups[members[0]] = own, importance_group(modules, layers, own)
    for name, attention in attentions.items():
        whole = heads and attention.heads_attribute is not None
        slots[name] = head_slots(attention, whole)
        width = attention.heads if whole else attention.dim
        units.append(PruningUnit(name, "heads" if whole else "attention", width, attention.members, 0))
        for key, part in head_parts(attention, slots[name], whole):
            groups[key] = importance_group(modules, layers, part)
    units.sort(key=lambda unit: order[unit.members[0].partition(":")[0]])
    graph = UnitGraph(tuple(units), slots, groups, layers, attentions)
    costs = {unit.name: graph.touching(unit, "macs") for unit in units}
    return replace(graph, units=tuple(replace(unit, cost=costs[unit.name]) for unit in units))


def _check_some(model: nn.Module, example: Tensor, graph: UnitGraph, kept: Mapping[str, Any]) -> None:
    """
    Check a removal in float32, on a small image where the network takes one. [`prune`] checks its own in full.

    What fails there may fail for the size of the image, or for rounding: float64 at the full size decides.
    """
    sides = [min(side, _CHECKED_SIDE) for side in example.shape[2:]]
    small = torch.zeros(1, example.shape[1], *sides, device="cpu")
    if not _takes(model, small.to(example.dtype)):
        small = example
    try:
        found = _error(model, small, graph, kept, torch.float32)
    except Exception as error:  # an arbitrary network may refuse in any way
        LOGGER.debug("%s does not run with fewer channels on a small image: %s", type(model).__name__, error)
        found = float("inf")
    if not found <= TOLERANCES[torch.float32]:
        check_removal(model, example, graph, kept)


def _takes(model: nn.Module, images: Tensor) -> bool:
    """Whether a network runs on images of that size."""
    try:
        with shapes_only(), torch.no_grad():
            skeleton(model).eval()(images.to("meta"))
    except Exception as error:  # an arbitrary network may refuse in any way
        LOGGER.debug("%s takes no images of %s: %s", type(model).__name__, list(images.shape), error)
        return False
    return True


def _error(model: nn.Module, example: Tensor, graph: UnitGraph, kept: Mapping[str, Any], dtype: torch.dtype) -> float:
    removed = graph.removed_positions(kept)
    return removal_error(model, example, graph.layers, removed, lambda pruned: cut(pruned, graph, kept), dtype)


def check_removal(model: nn.Module, example: Tensor, graph: UnitGraph, kept: Mapping[str, Any]) -> None:
    """Refuse a model of which removing all but `kept` is not exact (see `exactness.py`); the unit at fault is named."""

    def refuse_where_wrong(chosen: Mapping[str, Any], where: tuple[str, nn.Module], which: str) -> None:
        try:
            found = _error(model, example, graph, chosen, torch.float64)
        except Exception as broken:  # an arbitrary network's own code may fail in any way at other widths
            reason = f"does not run with fewer channels ({broken}); {which}"
            if alone := _alone(graph):
                reason += f"; no unit has {', '.join(alone)}: does what it computes reach the logits, as pruning needs"
            raise unsupported(*where, reason) from broken
        if not found <= TOLERANCES[torch.float64]:
            reason = (
                f"moves, mixes or shifts channels between its layers (removing some changes the others by {found:.1e})"
            )
            raise unsupported(*where, f"{reason}; {which}")

    try:
        refuse_where_wrong(kept, ("", model), "it shows where several units lose some at once")
    except ValueError:
        # One unit by itself says more of where it is.
        for unit in graph.units:
            names = [slot.layer.partition(":")[0] for slot in graph.slots[unit.name]]
            which = f"they are those of {', '.join(unit.members)}"
            refuse_where_wrong({unit.name: kept[unit.name]}, owner(model, names), which)
        raise


def _alone(graph: UnitGraph) -> list[str]:
    """Layers that are run and share no channel with others, as those do whose outputs the logits do not depend on."""
    shared = {slot.layer for slots in graph.slots.values() for slot in slots}
    return [name for name, layer in graph.layers.items() if layer.macs_each and name not in shared]


def _some(graph: UnitGraph, unit: PruningUnit, generator: torch.Generator) -> Any:
    """A third of a wide unit, two of a narrow one: an odd number, so that code which counts on even widths shows."""

    def choose(width: int) -> list[int]:
        count = max(1, width // 3 if width >= _WIDE else 2 * width // 3)
        count -= count > 1 and count % 2 == 0
        return sorted(torch.randperm(width, generator=generator, device="cpu")[:count].tolist())

    if unit.kind == "channels":
        return choose(unit.width)
    attention = graph.attention[unit.name]
    if unit.kind == "heads":
        heads, dims = choose(attention.heads), [list(range(attention.dim))] * attention.heads
        return {"heads": heads, "qk": dims[: len(heads)], "v": dims[: len(heads)]}
    heads = list(range(attention.heads))
    values = [choose(attention.dim) for _ in heads]
    queries = [choose(attention.dim) for _ in heads] if "q" in attention.rows else values
    return {"heads": heads, "qk": queries, "v": values}

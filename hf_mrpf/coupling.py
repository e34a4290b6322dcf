"""Which channels of which layers are the same: torch-pruning's dependency graph, read layer by layer.

Attention and Swin's patch merging are traced as single black boxes that read one width and give another, so that the
graph sees what lies between them; the inside of attention is known from its class (`attention.py`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .architectures import MERGES, class_id, owner, unsupported
from .attacks import logits_of
from .attention import FoundAttention
from .layers import PRODUCERS, Layer, Slot, loose_parameters, parameter_layer
from .modes import trainable

if TYPE_CHECKING:
    from torch_pruning.dependency import Group

# Several times those of the largest supported networks.
_MOST_DEPENDENCIES = 5000
# For each channel its indices, by (layer, side).
Places = dict[tuple[str, str], list[list[int]]]
# (number of the group of the graph, number of the channel in it)
Channel = tuple[int, int]


@dataclass(frozen=True)
class _Box:
    """A module that the graph sees as one operation, its width in and out, and the sides of layers that follow them."""

    width_in: int
    width_out: int
    reads: tuple[tuple[str, str], ...]
    gives: tuple[tuple[str, str], ...]
    blocks: int = 1


def couple(
    model: nn.Module, example: Tensor, layers: dict[str, Layer], attentions: Mapping[str, FoundAttention]
) -> list[tuple[Slot, ...]]:
    """
    Find the slots of every set of coupled channels, without those that reach the logits.

    Args:
        model (`nn.Module`): in eval mode.
        example (`torch.Tensor` of shape `[1, C, H, W]`): one image.
        layers (`dict[str, Layer]`): parameters without a layer that the graph follows get their axis of channels.
        attentions (`Mapping[str, FoundAttention]`): by name of the module.

    Returns:
        `list[tuple[Slot, ...]]`: each in module order; the first that is no input belongs to the layer that names it.

    Raises:
        ValueError: If the graph cannot be built, or couples channels unevenly.
    """
    boxes = _boxes(model, attentions)
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    loose = {parameter: name for name, parameter in loose_parameters(model, layers).items()}
    found: list[Places] = []
    for group in _groups(model, example, boxes):
        width = len(group[0].idxs)
        places: Places = {}
        # Most layers of a residual stream have the same indices: made once, they are one list.
        same: dict[Any, list[list[int]]] = {}
        for item in group.items:
            module = item.dep.target.module
            out = item.dep.handler.__name__ == "prune_out_channels"
            sides: Iterable[tuple[str, str]] = ()
            blocks, size = 1, 0
            if isinstance(module, nn.Parameter):
                sides = ((loose[module], "out"),)
                layers[loose[module]] = parameter_layer(module, item.dep.target.pruning_dim)
            elif (name := names.get(module, "")) in boxes:
                box = boxes[name]
                sides = box.gives if out else box.reads
                blocks, size = (1 if out else box.blocks), box.width_in
            elif name in layers:
                both = layers[name].kind in ("norm", "depthwise")
                sides = ((name, "both" if both else "out" if out else "in"),)
            if sides and None in item.root_idxs:
                raise unsupported("", model, "reshapes channels in a way that torch-pruning cannot follow")
            if not sides:
                continue
            key = (tuple(item.idxs), tuple(item.root_idxs), blocks, size)
            if key not in same:
                positions = same[key] = [[] for _ in range(width)]
                for index, channel in zip(item.idxs, item.root_idxs, strict=True):
                    positions[channel].extend(index + block * size for block in range(blocks))
            places |= dict.fromkeys(sides, same[key])
        found.append(places)
    order = {name: index for index, name in enumerate(layers)}
    return [_slots(model, places, layers, order) for places in _tied(found, layers)]


def _boxes(model: nn.Module, attentions: Mapping[str, FoundAttention]) -> dict[str, _Box]:
    boxes = {}
    for name, module in model.named_modules():
        if name in attentions:
            attention = attentions[name]
            ins = model.get_parameter(f"{attention.projections[0]}.weight").shape[1]
            outs = model.get_parameter(f"{attention.out}.weight").shape[0]
            reads = tuple((layer, "in") for layer in attention.projections)
            gives = ((attention.out, "out"),)
            boxes[name] = _Box(ins, outs, reads, gives)
        elif class_id(module) in MERGES:
            norm, layer = (f"{name}.{path}".lstrip(".") for path in MERGES[class_id(module)])
            outs, ins = model.get_parameter(f"{layer}.weight").shape
            boxes[name] = _Box(ins // 4, outs, ((norm, "both"), (layer, "in")), ((layer, "out"),), blocks=4)
    return boxes


def _groups(model: nn.Module, example: Tensor, boxes: Mapping[str, _Box]) -> list["Group"]:
    """torch-pruning's groups of all channels, without those that reach the logits."""
    import torch_pruning as tp

    by_module = {model.get_submodule(name): box for name, box in boxes.items()}

    class BoxPruner(tp.BasePruningFunc):
        """Only widths: nothing is removed through the graph."""

        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            return layer

        def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            return layer

        def get_out_channels(self, layer: nn.Module) -> int:
            return by_module[layer].width_out

        def get_in_channels(self, layer: nn.Module) -> int:
            return by_module[layer].width_in

    def forward(traced: nn.Module, images: Tensor) -> Tensor:
        # The sum is an operation of its own, so that the graph ends in an output node whatever layer makes the logits.
        return logits_of(traced(images)) + 0.0

    pruners = {type(module): BoxPruner() for module in by_module}
    roots = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, *pruners)
    with torch.enable_grad(), trainable(model), _boxed(by_module), _hooks_restored(model), _not_in_place(model):
        try:
            # Its default arguments are shared between calls: give it fresh ones.
            graph = tp.DependencyGraph().build_dependency(
                model, example, forward_fn=forward, unwrapped_parameters=[], customized_pruners=pruners, verbose=False
            )
            with _bounded_groups():
                groups = list(graph.get_all_groups(root_module_types=roots))
        except Exception as error:
            # The forward pass itself ran just before, so this is an operation that torch-pruning cannot follow.
            raise unsupported("", model, f"holds an operation that torch-pruning cannot follow ({error!r})") from error
    output = tp.ops.OPTYPE.OUTPUT
    return [group for group in groups if all(dep.target.type != output for dep, _ in group)]


class EndlessGroupError(ValueError):
    """A group of channels that torch-pruning finds no end of."""


class _Opaque(torch.autograd.Function):
    """Depends on its input, and shows autograd nothing of how."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, result: Tensor) -> Tensor:
        ctx.shape = images.shape
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_zeros(ctx.shape), None


@contextmanager
def _bounded_groups() -> Iterator[None]:
    """
    Stop torch-pruning where a group does not end, and spare it what it would do again for every group.

    It goes on from every new set of indices, of which networks that slice and add again (RexNet, FocalNet) have endless
    numbers: that would take hours rather than fail. And it works out where concatenations and slices lead before each
    group, for a graph that may have been pruned since; this one is not.
    """
    from torch_pruning.dependency import Group, index_mapping

    add, update = Group.add_dep, index_mapping.update_index_mapping

    def add_dep(group: "Group", dep: Any, idxs: Any) -> None:
        if len(group) > _MOST_DEPENDENCIES:
            raise EndlessGroupError(f"more than {_MOST_DEPENDENCIES} dependencies in one group of channels")
        add(group, dep, idxs)

    Group.add_dep = add_dep
    index_mapping.update_index_mapping = lambda graph: None
    try:
        yield
    finally:
        Group.add_dep = add
        index_mapping.update_index_mapping = update


@contextmanager
def _hooks_restored(model: nn.Module) -> Iterator[None]:
    """torch-pruning leaves its hooks on a model whose forward pass fails; they would hold every later pass's graph."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, hooks in before.items():
            for key in [key for key in module._forward_hooks if key not in hooks]:
                del module._forward_hooks[key]


@contextmanager
def _not_in_place(model: nn.Module) -> Iterator[None]:
    """An activation that overwrites a view of what a norm gives would take the norm's place in autograd's graph."""
    modules: list[Any] = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    for module in modules:
        module.inplace = False
    try:
        yield
    finally:
        for module in modules:
            module.inplace = True


@contextmanager
def _boxed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run these modules without autograd's knowledge of their inside."""

    def hide(forward: Any) -> Any:
        def hidden(*args: Any, **kwargs: Any) -> Any:
            images = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            with torch.no_grad():
                result = forward(*args, **kwargs)
            if isinstance(result, Tensor):
                return _Opaque.apply(images, result)
            return (_Opaque.apply(images, result[0]), *result[1:])

        return hidden

    modules = [module for module in modules if "forward" not in vars(module)]
    for module in modules:
        module.forward = hide(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _tied(groups: list[Places], layers: Mapping[str, Layer]) -> list[Places]:
    """
    Tie channels that grouped convolutions can only lose together: whole groups, or the same ones of every group.

    Groups of channels whose channels are tied with one another's become one.
    """
    parents, fixed = _ties(groups, layers)
    if not parents and not fixed:
        return groups
    classes: dict[Channel, list[Channel]] = defaultdict(list)
    for number, places in enumerate(groups):
        for channel in range(len(next(iter(places.values())))):
            classes[_root(parents, (number, channel))].append((number, channel))
    units: dict[frozenset[int], list[list[Channel]]] = defaultdict(list)
    for members in classes.values():
        units[frozenset(number for number, _ in members)].append(members)
    merged = []
    for numbers, channels in units.items():
        if numbers & fixed:
            continue
        together: Places = {}
        for side in dict.fromkeys(side for number in sorted(numbers) for side in groups[number]):
            here = {number: groups[number][side] for number in numbers if side in groups[number]}
            together[side] = [[i for n, c in own if n in here for i in here[n][c]] for own in channels]
        merged.append(together)
    return merged


def _ties(groups: list[Places], layers: Mapping[str, Layer]) -> tuple[dict[Channel, Channel], set[int]]:
    """A forest of tied channels, and the groups with channels that are tied to what cannot go."""
    where: dict[tuple[str, str], dict[int, Channel]] = defaultdict(dict)
    for number, places in enumerate(groups):
        for (name, side), positions in places.items():
            if layers[name].kind == "grouped":
                where[name, side] |= {index: (number, c) for c, own in enumerate(positions) for index in own}
    parents: dict[Channel, Channel] = {}
    fixed: set[int] = set()
    for name, layer in layers.items():
        if layer.kind != "grouped":
            continue
        tied: dict[tuple[str, int], list[Channel | None]] = defaultdict(list)
        for side, share in (("in", layer.ins), ("out", layer.outs // layer.groups)):
            for index in range(layer.groups * share):
                key = ("group", index // share) if layer.loses_groups else (side, index % share)
                tied[key].append(where[name, side].get(index))
        for channels in tied.values():
            present = [channel for channel in channels if channel is not None]
            if len(present) < len(channels):  # the others are pixels of the image, or reach the logits
                fixed.update(number for number, _ in present)
            for channel in present[1:]:
                one, other = _root(parents, channel), _root(parents, present[0])
                parents[max(one, other)] = min(one, other)
    return parents, fixed


def _root(parents: Mapping[Channel, Channel], channel: Channel) -> Channel:
    while (parent := parents.get(channel, channel)) != channel:
        channel = parent
    return channel


def _slots(model: nn.Module, places: Places, layers: Mapping[str, Layer], order: Mapping[str, int]) -> tuple[Slot, ...]:
    """The places as slots in module order, channels in the order of the first layer that makes them."""
    keys = sorted(places, key=lambda key: (layers[key[0]].kind == "parameter", order[key[0]], key[1]))
    first = next(key for key in keys if key[1] != "in" and layers[key[0]].kind in PRODUCERS)
    channels = sorted(range(len(places[first])), key=lambda channel: places[first][channel])
    made: dict[int, tuple[tuple[int, ...], ...]] = {}
    for name, side in keys:
        positions = places[name, side]
        if id(positions) not in made:
            made[id(positions)] = tuple(tuple(sorted(positions[channel])) for channel in channels)
            indices = [index for own in positions for index in own]
            if len({len(own) for own in positions}) != 1 or len(set(indices)) != len(indices):
                raise unsupported(*owner(model, [name]), f"splits or mixes channels around {name!r}")
        # A unit that has only some outputs of a layer would leave the others behind.
        if side == "out" and len(positions) * len(positions[0]) != layers[name].outs:
            raise unsupported(*owner(model, [name]), f"splits or mixes channels around {name!r}")
    return tuple(Slot(*key, made[id(places[key])]) for key in keys)

"""Which channels of which layers are the same, found by following every one of them through a forward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .architectures import FoundAttention, channel_axis, unsupported
from .attacks import logits_of
from .layers import PRODUCERS, Layer, Slot, by_groups
from .operations import ChannelTrace


def couple(
    model: nn.Module, example: Tensor, layers: dict[str, Layer], attentions: Mapping[str, FoundAttention]
) -> dict[str, tuple[Slot, ...]]:
    """Slots of every set of coupled channels, by the name of its first member; without those that reach the logits."""
    modules = dict(model.named_modules())
    loose = {name: model.get_parameter(name) for name, layer in layers.items() if layer.kind == "parameter"}
    trace = ChannelTrace({n: p for n, p in loose.items() if not n.startswith(tuple(f"{a}." for a in attentions))})
    for name, layer in layers.items():
        if layer.kind in ("norm", "depthwise"):
            trace.reserve(f"{name} both", layer.outs)
        elif layer.kind in PRODUCERS:
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
    layers: dict[str, Layer],
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
            if side != "in" and layers[name].kind in PRODUCERS:
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
    model: nn.Module, name: str, channels: Tensor, layers: dict[str, Layer]
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


def _tie_groups(trace: ChannelTrace, name: str, layer: Layer) -> None:
    """A grouped convolution loses whole groups, or the same number of channels in every group: whatever is finer."""
    ins = trace.labels(f"{name} in").reshape(layer.groups, -1)
    outs = trace.labels(f"{name} out").reshape(layer.groups, -1)
    if by_groups(layer.groups, layer.ins):
        trace.tie(ins, ins[:, :1].expand_as(ins))
        trace.tie(outs, ins[:, :1].expand_as(outs))
    else:
        trace.tie(ins, ins[:1].expand_as(ins))
        trace.tie(outs, outs[:1].expand_as(outs))


@contextmanager
def _watched(
    model: nn.Module,
    trace: ChannelTrace,
    layers: Mapping[str, Layer],
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

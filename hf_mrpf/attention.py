"""Attention modules of a model: their sizes, and which rows and columns of their projections are which channels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .architectures import ATTENTIONS, LAYERS, AttentionKind, class_id, known_attention, unsupported
from .layers import Slot

# What else may stand inside an attention module: nothing that looks at single channels.
_INERT = (nn.Identity, nn.Dropout, nn.Softmax)


@dataclass(frozen=True)
class FoundAttention:
    """
    One attention module of a model, with its sizes.

    Attributes:
        name (`str`): `named_modules` name.
        heads (`int`): number of heads.
        dim (`int`): channels of each head.
        rows (`dict[str, tuple[str, int]]`): by `"q"`, `"k"`, `"v"` the layer and its first row; no `"q"` where it has
            a single row, which stays.
        out (`str`): the layer that reads the heads' outputs.
        heads_attribute (`tuple[str, str]`, *optional*): module and attribute that hold the number of heads.
        per_head (`dict[str, int]`): names of parameters with an entry for each head, and their axes.
    """

    name: str
    heads: int
    dim: int
    rows: dict[str, tuple[str, int]]
    out: str
    heads_attribute: tuple[str, str] | None
    per_head: dict[str, int]

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the layers that make queries, keys and values, each once."""
        return tuple(dict.fromkeys(layer for layer, _ in self.rows.values()))

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the projections that lose rows, as sensitivities know them: parts of a fused one by a suffix."""
        fused = len(self.projections) == 1
        return tuple(f"{layer}:{part}" if fused else layer for part, (layer, _) in self.rows.items())


def find_attention(model: nn.Module) -> dict[str, FoundAttention]:
    """
    Find the attention modules of a model by `named_modules` name; a ValueError names the first that is unknown or not
    as its class should be.
    """
    return {name: _sizes(name, model.get_submodule(name), kind) for name, kind in known_attention(model).items()}


def attention_slices(model: nn.Module) -> dict[str, tuple[str, slice]]:
    """Queries, keys and values of fused projections: by member name (`"blocks.0.attn.qkv:q"`) the layer and its rows.

    Attention that pruning does not know has none."""
    slices = {}
    for name, module in model.named_modules():
        kind = ATTENTIONS.get(class_id(module))
        if kind is None:
            continue
        attention = _sizes(name, module, kind)
        if len(attention.projections) == 1:
            size = attention.heads * attention.dim
            for part, (layer, first) in attention.rows.items():
                slices[f"{layer}:{part}"] = (layer, slice(first, first + size))
    return slices


def head_slots(attention: FoundAttention, heads: bool) -> tuple[Slot, ...]:
    """Rows and columns of each channel of all heads, or (`heads`) of each head."""
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
        slots += [Slot(name, "out", tuple((head,) for head in range(count))) for name in attention.per_head]
    return tuple(slots)


def removed_rows(attention: FoundAttention, kept: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], set[int]]]:
    """What goes of each (layer, side), given kept heads and each one's kept channels as in [`PruningPlan`]."""
    size, dim = attention.heads * attention.dim, attention.dim
    gone = {}
    for part in ("qk", "v"):
        rows = (head * dim + channel for head, own in zip(kept["heads"], kept[part], strict=True) for channel in own)
        gone[part] = set(range(size)) - set(rows)
    for part, (layer, first) in attention.rows.items():
        yield (layer, "out"), {first + row for row in gone["v" if part == "v" else "qk"]}
    yield (attention.out, "in"), gone["v"]
    for name in attention.per_head:
        yield (name, "out"), set(range(attention.heads)) - set(kept["heads"])


def head_parts(attention: FoundAttention, slots: Sequence[Slot], heads: bool) -> Iterator[tuple[str, list[Slot]]]:
    """What each importance of an attention unit is taken over."""
    if heads:
        layers = (*attention.projections, attention.out)
        yield attention.name, [slot for slot in slots if slot.layer in layers]
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


def _sizes(name: str, module: nn.Module, kind: AttentionKind) -> FoundAttention:
    """Check that a module is what its class says; anything more in it could be pruned wrongly."""
    modules = dict(module.named_modules())
    layers = {part: modules.get(getattr(kind, part)) for part in ("q", "k", "v", "out")}
    for part, layer in layers.items():
        if LAYERS.get(class_id(layer) if layer is not None else ("", "")) not in ("linear", "conv"):
            raise unsupported(name, module, f"has no linear layer {getattr(kind, part)!r} for its {part}")
    _refuse_more(name, module, kind)
    weights = {part: layer.weight for part, layer in layers.items()}  # type: ignore[union-attr]
    where = {part: f"{name}.{getattr(kind, part)}".lstrip(".") for part in layers}
    rows, inner = weights["v"].shape[0], weights["out"].shape[1]
    if kind.heads is None:
        if rows != 2 * inner + 1:
            raise unsupported(name, module, f"has {rows} rows for queries, keys and values, not 1 + 2 * {inner}")
        return FoundAttention(
            name, 1, inner, {"k": (where["k"], 1), "v": (where["v"], 1 + inner)}, where["out"], None, {}
        )
    fused = kind.q == kind.v
    path, _, attribute = kind.heads.rpartition(".")
    heads = getattr(modules.get(path), attribute, None)
    if type(heads) is not int or heads < 1 or inner % heads:
        raise unsupported(name, module, f"has {heads!r} heads ({kind.heads}) for {inner} channels")
    if rows != inner * (3 if fused else 1) or any(weights[part].shape[0] != rows for part in ("q", "k")):
        raise unsupported(name, module, "has other numbers of queries, keys and values")
    dim = inner // heads
    for child in module.modules():
        for scale in ("scale", "scaling"):
            value = getattr(child, scale, None)
            if isinstance(value, float) and abs(value * dim**0.5 - 1) > 1e-6:
                raise unsupported(name, module, f"has the softmax {scale} {value}, not head_dim ** -0.5 ({dim**-0.5})")
    parameters = dict(module.named_parameters())
    for entry, axis in kind.per_head:
        if entry not in parameters or parameters[entry].ndim <= axis or parameters[entry].shape[axis] != heads:
            raise unsupported(name, module, f"has no parameter {entry!r} with {heads} entries along axis {axis}")
    first = {"q": 0, "k": inner, "v": 2 * inner} if fused else {"q": 0, "k": 0, "v": 0}
    return FoundAttention(
        name,
        heads,
        dim,
        {part: (where[part], first[part]) for part in ("q", "k", "v")},
        where["out"],
        (f"{name}.{path}".strip("."), attribute),
        {f"{name}.{parameter}".lstrip("."): axis for parameter, axis in kind.per_head},
    )


def _refuse_more(name: str, module: nn.Module, kind: AttentionKind) -> None:
    known, per_head = {f"{path}." for path in (kind.q, kind.k, kind.v, kind.out)}, dict(kind.per_head)
    for path, _ in module.named_parameters():
        if path not in per_head and not path.startswith(tuple(known)):
            raise unsupported(name, module, f"has a parameter {path!r} that is not known of this class of attention")
    for path, child in module.named_modules():
        plain = isinstance(child, _INERT) or type(child) is nn.Module or next(child.children(), None) is not None
        if path and not plain and not any(entry.startswith(f"{path}.") for entry in (*known, *per_head)):
            raise unsupported(f"{name}.{path}", child, "stands inside attention and is not known there")

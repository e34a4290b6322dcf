"""The inside of attention: rows and columns of its projections, by head and channel."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .architectures import FoundAttention
from .layers import Slot


def head_slots(attention: FoundAttention, heads: bool) -> tuple[Slot, ...]:
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


def removed_rows(attention: FoundAttention, kept: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], set[int]]]:
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


def head_parts(attention: FoundAttention, slots: Sequence[Slot], heads: bool) -> Iterator[tuple[str, list[Slot]]]:
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

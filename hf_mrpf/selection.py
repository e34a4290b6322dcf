"""Which channels of a unit stay: the most important ones, each head of attention by its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .units import PruningUnit, UnitGraph


def importance_by_channel(graph: UnitGraph, unit: PruningUnit, importances: Mapping[str, Tensor]) -> list[float]:
    """
    Importance of each channel of a unit, where every head of attention chooses its own.

    Args:
        graph (`UnitGraph`): of the model.
        unit (`PruningUnit`): one of its units.
        importances (`Mapping[str, Tensor]`): by key of `graph.groups`.

    Returns:
        `list[float]`: of length `unit.width`. Heads keep what is best of each, so that their channels are compared by
        rank: the mean over heads of the best, of the second best, and so on.
    """
    if unit.kind != "attention":
        return importances[unit.name].tolist()
    heads = graph.attention[unit.name].heads
    parts = [importances[key] for part in ("qk", "v") if (key := f"{unit.name}:{part}") in importances]
    return torch.cat([part.reshape(heads, -1).sort(dim=1).values for part in parts]).mean(0).tolist()


def most_important(graph: UnitGraph, unit: PruningUnit, importances: Mapping[str, Tensor], count: int) -> Any:
    """
    Choose what a unit keeps: `count` channels, heads, or channels of each head, as in `PruningPlan.kept`.

    Arguments as for [`importance_by_channel`].
    """
    if unit.kind == "channels":
        return _ranked(importances[unit.name].tolist(), count)
    attention = graph.attention[unit.name]
    if unit.kind == "heads":
        kept = _ranked(importances[unit.name].tolist(), count)
        return {"heads": kept} | {part: [list(range(attention.dim)) for _ in kept] for part in ("qk", "v")}
    values = importances[f"{unit.name}:v"].reshape(attention.heads, -1).tolist()
    queries = values
    if f"{unit.name}:qk" in importances:
        queries = importances[f"{unit.name}:qk"].reshape(attention.heads, -1).tolist()
    return {
        "heads": list(range(attention.heads)),
        "qk": [_ranked(head, count) for head in queries],
        "v": [_ranked(head, count) for head in values],
    }


def _ranked(importances: list[float], count: int) -> list[int]:
    ranked = sorted(range(len(importances)), key=lambda channel: (-importances[channel], channel))
    return sorted(ranked[:count])

"""What a plan is asked for, against the units of a model: those to leave whole, scores of members, a size to reach."""

import logging
from collections.abc import Mapping, Sequence
from numbers import Real

from torch import nn

from .sensitivity import SCORED_MODULES, unit_sensitivity
from .units import PruningUnit, UnitGraph

LOGGER = logging.getLogger("hf_mrpf")


def free_units(model: nn.Module, graph: UnitGraph, ignore: Sequence[str]) -> list[PruningUnit]:
    """The units without a member in what `ignore` names; a ValueError names what keeps none whole."""
    if isinstance(ignore, str):
        raise ValueError(f"ignore is {ignore!r}; a list of names is needed, such as [{ignore!r}].")
    known = {name for name, _ in model.named_modules()}
    if unknown := [name for name in ignore if name not in known]:
        units = ", ".join(unit.name for unit in graph.units)
        raise ValueError(f"ignore names {unknown[0]!r}, which is no unit and no module. Units: {units}.")
    whole: set[str] = set()
    for name in ignore:
        inside = {
            unit.name
            for unit in graph.units
            if any(f"{member}.".startswith((f"{name}.", f"{name}:")) for member in unit.members)
        }
        if not inside and not (name and _holds_weights(model.get_submodule(name))):
            raise ValueError(
                f"ignore names {name!r}, a {type(model.get_submodule(name)).__name__} without a member of a unit "
                "inside, so that nothing would stay whole for it: name the layer that makes the channels. "
                f"Units: {', '.join(unit.name for unit in graph.units)}."
            )
        whole |= inside
    return [unit for unit in graph.units if unit.name not in whole]


def _holds_weights(module: nn.Module) -> bool:
    """Whether a module without a unit is one that is never pruned, as what makes the logits."""
    return any(isinstance(inside, SCORED_MODULES) for inside in module.modules())


def check_reachable(graph: UnitGraph, options: Mapping[str, list[int]], target: float, metric: str) -> None:
    """Refuse (ValueError) a target below what the smallest widths keep, by more than 1 %."""
    smallest = graph.size({name: widths[0] for name, widths in options.items()})[metric] / graph.size({})[metric]
    if not options or smallest > 1.01 * target:
        raise ValueError(
            f"target {target:g} cannot be met: the smallest fraction of {metric} that can be kept is {smallest:.4f}. "
            "Raise target or max_ratio, lower min_channels or round_to, or ignore fewer units."
        )


def warn_if_off(achieved: float, target: float, metric: str, multiple: int) -> None:
    """Say in the log that a plan keeps a fraction which is more than 1 % off the target."""
    if abs(achieved / target - 1) > 0.01:
        coarse = f" Widths are multiples of {multiple}: a smaller round_to has more sizes." if multiple > 1 else ""
        LOGGER.warning(
            "The plan keeps %.4f of the %s, which is %.1f %% off the target %g: the search found no widths that come "
            "nearer.%s", achieved, metric, 100 * abs(achieved / target - 1), target, coarse,
        )  # fmt: skip


def scores_by_unit(
    model: nn.Module, graph: UnitGraph, scores: Mapping[str, float], combine: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of members, and of units: those given, checked (ValueError), and those that they make together."""
    modules = {name for name, _ in model.named_modules()}
    for name, score in scores.items():
        if name.partition(":")[0] not in modules:
            raise ValueError(f"scores name {name!r}, which is no unit and no module of this model.")
        if not isinstance(score, Real) or isinstance(score, bool) or not score == score or abs(score) == float("inf"):
            raise ValueError(f"the score of {name!r} is {score!r}; a finite number is needed.")
    if combine == "joint":
        # Joint scores belong to units; one of a unit's first module alone would be mistaken for its unit's.
        if set(scores) != {unit.name for unit in graph.units}:
            raise ValueError(
                "combine 'joint' needs scores of all units by unit name, or batches and attack to measure."
            )
        return {}, {unit.name: float(scores[unit.name]) for unit in graph.units}
    by_unit = unit_sensitivity(scores, graph.units, combine)
    given_by_unit = set(scores) == {unit.name for unit in graph.units}
    return {} if given_by_unit else {name: float(score) for name, score in scores.items()}, by_unit

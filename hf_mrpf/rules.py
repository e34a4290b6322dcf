"""Rules that share out what to remove between units: pure functions of scores, widths and costs, no tensor."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

# Halving an interval of doubles more often than this changes nothing.
_HALVINGS = 100


def mrs(
    scores: Mapping[str, float],
    widths: Mapping[str, int],
    costs: Mapping[str, float],
    target: float,
    *,
    max_ratio: float = 0.85,
) -> dict[str, float]:
    """
    Remove less from the units that robustness hangs on: ratios fall with the logarithm of the score.

    Scores span orders of magnitude, so their logarithms are mapped linearly to shares, 1.5 for the lowest score and 0.5
    for the highest (1 for all where they are equal; scores of zero or less count as the lowest positive one). The ratio
    of a unit is `min(strength * share, max_ratio)`, with one strength for all that meets the target.

    Args:
        scores (`Mapping[str, float]`):
            Module robustness sensitivity of each unit, in nats.
        widths (`Mapping[str, int]`):
            Channels of each unit.
        costs (`Mapping[str, float]`):
            What each unit costs whole (MACs or parameters), taken to be linear in its width.
        target (`float`):
            Fraction of the summed cost to keep, in (0, 1), at least `1 - max_ratio`.
        max_ratio (`float`, *optional*, defaults to 0.85):
            Largest fraction of a unit's channels that may be removed, in (0, 1).

    Returns:
        `dict[str, float]`: fraction of channels to remove, in [0, max_ratio], by unit; a higher score never has a
        higher ratio. `sum(cost * (1 - ratio)) = target * sum(cost)`.

    Raises:
        ValueError: If a value is out of range or not finite, units differ between the arguments, or the target cannot
            be met.
    """
    check_problem(widths, costs, target, max_ratio)
    check_scores(scores, widths)
    positive = [score for score in scores.values() if score > 0]
    lowest = min(positive, default=1.0)
    logs = {unit: math.log(max(score, lowest)) for unit, score in scores.items()}
    low, high = min(logs.values()), max(logs.values())
    span = high - low
    shares = {unit: 1.5 - (value - low) / span if span > 0 else 1.0 for unit, value in logs.items()}

    def ratios(strength: float) -> dict[str, float]:
        return {unit: min(strength * share, max_ratio) for unit, share in shares.items()}

    # The smallest share is 0.5: from this strength on every unit is at its limit.
    return meet_cost(ratios, 0.0, 2 * max_ratio, costs, target)


def mrs_per_cost(
    scores: Mapping[str, float],
    widths: Mapping[str, int],
    costs: Mapping[str, float],
    target: float,
    *,
    max_ratio: float = 0.85,
) -> dict[str, float]:
    """
    Remove less from the units that robustness hangs on for what they cost: [`mrs`] of each score over its unit's cost.

    Costs are those of the target's metric, MACs where that is latency. A unit that costs nothing counts as the cheapest
    of those that do. Arguments, result and errors are those of [`mrs`], but it is the score over the cost that orders
    the ratios.
    """
    check_problem(widths, costs, target, max_ratio)
    check_scores(scores, widths)
    cheapest = min(cost for cost in costs.values() if cost > 0)
    prices = {unit: max(cost, cheapest) for unit, cost in costs.items()}
    worth = {unit: score / prices[unit] for unit, score in scores.items()}
    return mrs(worth, widths, costs, target, max_ratio=max_ratio)


def uniform(
    scores: Mapping[str, float] | None,
    widths: Mapping[str, int],
    costs: Mapping[str, float],
    target: float,
    *,
    max_ratio: float = 0.85,
) -> dict[str, float]:
    """
    Remove the same fraction from every unit: the control. Scores are not read; the rest is as for [`mrs`].

    Returns:
        `dict[str, float]`: `1 - target` for every unit.
    """
    check_problem(widths, costs, target, max_ratio)
    return dict.fromkeys(widths, 1 - target)


def global_importance(
    scores: Mapping[str, Sequence[float]],
    widths: Mapping[str, int],
    costs: Mapping[str, float],
    target: float,
    *,
    max_ratio: float = 0.85,
) -> dict[str, float]:
    """
    Remove the channels of least importance wherever they are: one threshold over all channels of all units.

    Args:
        scores (`Mapping[str, Sequence[float]]`):
            Importance of each channel, by unit: as many numbers as the unit is wide, comparable between units.

    The other arguments are those of [`mrs`].

    Returns:
        `dict[str, float]`: fraction of channels below the threshold, at most `max_ratio`. The channel that stands at
        the threshold is counted in part, so that the target is met exactly.
    """
    check_problem(widths, costs, target, max_ratio)
    order = channel_slices(scores, widths, max_ratio)
    return remove_least(order, widths, costs, (1 - target) * sum(costs.values()), max_ratio)


def channel_slices(
    scores: Mapping[str, Sequence[float]], widths: Mapping[str, int], max_ratio: float
) -> list[tuple[float, str, float]]:
    """
    Put the channels of all units in one order, the least important first.

    Arguments as for [`global_importance`].

    Returns:
        `list[tuple[float, str, float]]`: importance, unit, and the part of the unit's ratio that the channel is; what
        lies above `max_ratio` is left out.
    """
    same_units("scores", scores, widths)
    order = []
    for unit, importances in scores.items():
        if len(importances) != widths[unit]:
            raise ValueError(f"unit {unit!r} has {widths[unit]} channels but {len(importances)} importances.")
        for rank, importance in enumerate(sorted(importances, key=_finite(unit))):
            slice_ = min(1 / widths[unit], max_ratio - rank / widths[unit])
            if slice_ > 0:
                order.append((importance, unit, slice_))
    return sorted(order, key=lambda entry: entry[0])


def remove_least(
    order: Sequence[tuple[float, str, float]],
    widths: Mapping[str, int],
    costs: Mapping[str, float],
    to_remove: float,
    max_ratio: float,
) -> dict[str, float]:
    """Ratio by unit after channels went, in the order of [`channel_slices`], until `to_remove` of the cost is saved."""
    ratios = dict.fromkeys(widths, 0.0)
    for _, unit, slice_ in order:
        cost = costs[unit] * slice_
        part = 1.0 if cost <= to_remove else to_remove / cost
        ratios[unit] = min(ratios[unit] + part * slice_, max_ratio)
        to_remove -= part * cost
        if part < 1:
            break
    return ratios


def meet_cost(
    ratios: Callable[[float], dict[str, float]], low: float, high: float, costs: Mapping[str, float], target: float
) -> dict[str, float]:
    """Bisect the argument of `ratios`, which only removes more as it grows, until the kept cost is on target."""
    total = sum(costs.values())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        removed = ratios(middle)
        kept = sum(cost * (1 - removed[unit]) for unit, cost in costs.items())
        if kept > target * total:
            low = middle
        else:
            high = middle
    return ratios(high)


def check_problem(widths: Mapping[str, int], costs: Mapping[str, float], target: float, max_ratio: float) -> None:
    """Refuse (ValueError) what no allocation can work on."""
    if not widths:
        raise ValueError("there are no units to prune; at least one is needed.")
    for unit, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"the width of unit {unit!r} is {width!r}; an integer of at least 1 is needed.")
    same_units("costs", costs, widths)
    for unit, cost in costs.items():
        if not _is_number(cost) or cost < 0:
            raise ValueError(f"the cost of unit {unit!r} is {cost!r}; a finite number of at least 0 is needed.")
    if sum(costs.values()) <= 0:
        raise ValueError("all costs are 0; at least one unit must cost something.")
    for name, value in (("target", target), ("max_ratio", max_ratio)):
        if not _is_number(value) or not 0 < value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a number between 0 and 1, both excluded.")
    if target < 1 - max_ratio - 1e-12:
        raise ValueError(
            f"target {target:g} cannot be met: with max_ratio {max_ratio:g} at least {1 - max_ratio:g} of the cost is "
            f"kept. Raise target, or max_ratio to {1 - target:g} or more."
        )


def check_scores(scores: Mapping[str, float], widths: Mapping[str, int]) -> None:
    """Refuse (ValueError) scores that are not one finite number a unit."""
    same_units("scores", scores, widths)
    for unit, score in scores.items():
        if not _is_number(score):
            raise ValueError(f"the score of unit {unit!r} is {score!r}; a finite number is needed.")


def same_units(name: str, given: Mapping[str, object], widths: Mapping[str, int]) -> None:
    """Refuse (ValueError) a mapping called `name` that does not name every unit once."""
    if unknown := [unit for unit in given if unit not in widths]:
        raise ValueError(f"{name} names unknown units {unknown}; known units: {', '.join(widths)}.")
    if missing := [unit for unit in widths if unit not in given]:
        raise ValueError(f"{name} lacks units {missing}.")


def _finite(unit: str) -> Callable[[float], float]:
    def check(importance: float) -> float:
        if not _is_number(importance):
            raise ValueError(f"an importance of unit {unit!r} is {importance!r}; a finite number is needed.")
        return importance

    return check


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)

"""How much to remove from each unit: pure functions of scores, widths and costs, no tensor."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

Allocation = Callable[..., dict[str, float]]
Widths = dict[str, int]

# Halving an interval of doubles more often than this changes nothing.
_HALVINGS = 100
# Nominal targets nearer than this are the same to `meet_target`.
_CLOSE = 1e-6


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
    _check(widths, costs, target, max_ratio)
    _same_units("scores", scores, widths)
    for unit, score in scores.items():
        if not _is_number(score):
            raise ValueError(f"the score of unit {unit!r} is {score!r}; a finite number is needed.")
    positive = [score for score in scores.values() if score > 0]
    lowest = min(positive, default=1.0)
    logs = {unit: math.log(max(score, lowest)) for unit, score in scores.items()}
    low, high = min(logs.values()), max(logs.values())
    span = high - low
    shares = {unit: 1.5 - (value - low) / span if span > 0 else 1.0 for unit, value in logs.items()}

    def ratios(strength: float) -> dict[str, float]:
        return {unit: min(strength * share, max_ratio) for unit, share in shares.items()}

    # The smallest share is 0.5: from this strength on every unit is at its limit.
    return _meet(ratios, 0.0, 2 * max_ratio, costs, target)


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
    _check(widths, costs, target, max_ratio)
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
    _check(widths, costs, target, max_ratio)
    _same_units("scores", scores, widths)
    order = []
    for unit, importances in scores.items():
        if len(importances) != widths[unit]:
            raise ValueError(f"unit {unit!r} has {widths[unit]} channels but {len(importances)} importances.")
        for rank, importance in enumerate(sorted(importances, key=_finite(unit))):
            # One channel's slice of the ratio; what lies above max_ratio stays.
            slice_ = min(1 / widths[unit], max_ratio - rank / widths[unit])
            if slice_ > 0:
                order.append((importance, unit, slice_))
    order.sort(key=lambda entry: entry[0])
    to_remove = (1 - target) * sum(costs.values())
    ratios = dict.fromkeys(widths, 0.0)
    for _, unit, slice_ in order:
        cost = costs[unit] * slice_
        part = 1.0 if cost <= to_remove else to_remove / cost
        ratios[unit] = min(ratios[unit] + part * slice_, max_ratio)
        to_remove -= part * cost
        if part < 1:
            break
    return ratios


def get_allocation(name: str) -> Allocation:
    """The allocation function of that name; a ValueError lists the known ones."""
    if name not in ALLOCATIONS:
        raise ValueError(f"allocation is {name!r}; known allocations: {', '.join(ALLOCATIONS)}.")
    return ALLOCATIONS[name]


def allowed_widths(width: int, max_ratio: float, min_channels: int, round_to: int) -> list[int]:
    """
    List the widths that a unit may keep, increasing: multiples of `round_to` that remove at most `max_ratio` and keep
    at least `min_channels`; the width as it is where there is none.
    """
    # The epsilon keeps 1 - 0.9 from asking for 11 of 100 channels.
    least = max(min_channels, -int(-(width * (1 - max_ratio) - 1e-9) // 1), 1)
    multiples = [kept for kept in range(round_to, width + 1, round_to) if kept >= least]
    return multiples or [width]


def nearest_width(options: Sequence[int], wanted: float) -> int:
    """The allowed width nearest to `wanted`, of increasing ones; of two as near, the larger."""
    place = bisect_left(options, wanted)
    return min(options[max(place - 1, 0) : place + 1], key=lambda width: (abs(width - wanted), -width))


def meet_target(
    size: Callable[[Widths], int],
    options: Mapping[str, Sequence[int]],
    widths_at: Callable[[float], Widths],
    order: Mapping[str, float],
    wanted: float,
    *,
    lowest: float,
    to_come: Callable[[int], None] = lambda candidates: None,
) -> Widths:
    """
    Choose widths whose measured size is as near to `wanted` as whole channels allow.

    An allocation takes cost to be linear in widths, which it is not: its nominal target is bisected until the measured
    size lies on either side of the wanted one, then single channels lead from the one side to the other.

    Args:
        size (`Callable[[dict[str, int]], int]`): measured size at given widths.
        options (`Mapping[str, Sequence[int]]`): allowed widths of each unit, increasing.
        widths_at (`Callable[[float], dict[str, int]]`): allocation at a nominal target in (0, 1), which it grows with.
        order (`Mapping[str, float]`): units of low values give up a channel first.
        wanted (`float`): size to meet.
        lowest (`float`): smallest nominal target that the allocation takes.
        to_come (`Callable[[int], None]`, *optional*): told how many more candidates will be measured, once that is
            known.

    Returns:
        `dict[str, int]`: width of each unit.
    """
    small: Widths = {name: widths[0] for name, widths in options.items()}
    large: Widths = {name: widths[-1] for name, widths in options.items()}
    low, high = lowest, 1.0
    to_come(math.ceil(math.log2((high - low) / _CLOSE)))
    while high - low > _CLOSE:
        middle = (low + high) / 2
        widths = widths_at(middle)
        if size(widths) > wanted:
            high, large = middle, widths
        else:
            low, small = middle, widths
    steps = sorted(
        (rank, order[name], name, width)
        for name in large
        for rank, width in enumerate(sorted((w for w in options[name] if small[name] <= w < large[name]), reverse=True))
    )
    to_come(1 + len(steps))
    current = best = large
    gap = abs(size(best) - wanted)
    for _, _, name, width in steps:
        current = current | {name: width}
        if (closer := abs(size(current) - wanted)) < gap:
            best, gap = current, closer
    return nudged(size, options, best, wanted, to_come)


def nudged(
    size: Callable[[Widths], int],
    options: Mapping[str, Sequence[int]],
    widths: Widths,
    wanted: float,
    to_come: Callable[[int], None] = lambda candidates: None,
) -> Widths:
    """
    Where more than 0.5 % are missing, move single units to the next allowed width while that brings the size nearer.

    Arguments as for [`meet_target`]; `widths` are where to start, each an allowed one.
    """
    to_come(1)
    while (gap := abs(size(widths) - wanted)) > 0.005 * wanted:
        moves = [
            widths | {name: choices[position]}
            for name, choices in options.items()
            for position in (choices.index(widths[name]) - 1, choices.index(widths[name]) + 1)
            if 0 <= position < len(choices)
        ]
        to_come(len(moves) + 2)
        best = min(moves, key=lambda move: abs(size(move) - wanted), default=widths)
        if abs(size(best) - wanted) >= gap:
            break
        widths = best
    return widths


def _meet(
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


def _check(widths: Mapping[str, int], costs: Mapping[str, float], target: float, max_ratio: float) -> None:
    if not widths:
        raise ValueError("there are no units to prune; at least one is needed.")
    for unit, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"the width of unit {unit!r} is {width!r}; an integer of at least 1 is needed.")
    _same_units("costs", costs, widths)
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


def _same_units(name: str, given: Mapping[str, object], widths: Mapping[str, int]) -> None:
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


ALLOCATIONS: dict[str, Allocation] = {"mrs": mrs, "uniform": uniform, "global": global_importance}

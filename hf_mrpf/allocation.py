"""How much to remove from each unit: the rules by name, and widths that meet a target by one of them; no tensor."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from .controls import anti_mrs, shuffled_mrs
from .isomorphic import isomorphic
from .rules import global_importance, mrs, mrs_per_cost, uniform

Allocation = Callable[..., dict[str, float]]
Widths = dict[str, int]

# Nominal targets nearer than this are the same to `meet_target`.
_CLOSE = 1e-6


def get_allocation(name: str) -> Allocation:
    """The allocation function of that name; a ValueError lists the known ones."""
    if name not in ALLOCATIONS:
        raise ValueError(f"allocation is {name!r}; known allocations: {', '.join(ALLOCATIONS)}.")
    return ALLOCATIONS[name]


def reads(name: str) -> tuple[str, ...]:
    """
    What the allocation of that name reads beside widths and costs.

    Returns:
        `tuple[str, ...]`: as its scores either `"sensitivities"` of units or `"importances"` of channels, or neither;
        and of the keywords `"seed"` and `"structures"` (see `UnitGraph.structure`) those that it has.
    """
    return READS.get(name, ())


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
    Search widths whose measured size is near to `wanted`: within 1 % in all but networks of few sizes.

    An allocation takes cost to be linear in widths, which it is not: its nominal target is bisected until the measured
    size lies on either side of the wanted one, then single channels lead from the one side to the other. Of networks
    with few sizes the nearest of all may be missed.

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
    Where more than 0.5 % are missing, move units to the next allowed width while that brings the size nearer.

    One at a time, and two at once where no single one helps any more and 1 % is missing: small networks have few sizes.

    Arguments as for [`meet_target`]; `widths` are where to start, each an allowed one.
    """
    to_come(1)
    together = 1
    while together <= 2 and (gap := abs(size(widths) - wanted)) > 0.005 * together * wanted:
        steps = [
            (name, choices[position])
            for name, choices in options.items()
            for position in (choices.index(widths[name]) - 1, choices.index(widths[name]) + 1)
            if 0 <= position < len(choices)
        ]
        moves = [widths | dict(chosen) for chosen in itertools.combinations(steps, together)]
        to_come(len(moves) + 2)
        best = min(moves, key=lambda move: abs(size(move) - wanted), default=widths)
        if abs(size(best) - wanted) < gap:
            widths, together = best, 1
        else:
            together += 1
    return widths


ALLOCATIONS: dict[str, Allocation] = {
    "mrs": mrs,
    "uniform": uniform,
    "global": global_importance,
    "mrs_per_cost": mrs_per_cost,
    "isomorphic": isomorphic,
    "anti_mrs": anti_mrs,
    "shuffled_mrs": shuffled_mrs,
}
# One that is not named reads nothing, as `uniform`.
READS: dict[str, tuple[str, ...]] = {
    "mrs": ("sensitivities",),
    "mrs_per_cost": ("sensitivities",),
    "anti_mrs": ("sensitivities",),
    "shuffled_mrs": ("sensitivities", "seed"),
    "global": ("importances",),
    "isomorphic": ("importances", "structures"),
}

"""What `mrs` must be compared with: the same rule on the same scores, dealt to the wrong units."""

import random
from collections.abc import Mapping

from .rules import check_scores, mrs


def anti_mrs(
    scores: Mapping[str, float],
    widths: Mapping[str, int],
    costs: Mapping[str, float],
    target: float,
    *,
    max_ratio: float = 0.85,
) -> dict[str, float]:
    """
    Remove most from the units that robustness hangs on: the control that is bad where scores tell what to keep.

    [`mrs`] after the order of the scores is reversed: the unit with the highest score gets the lowest, the second
    highest the second lowest, and so on, so that the ratios spread just as far. Units with equal scores are ordered as
    they stand. Arguments, result and errors are those of [`mrs`].
    """
    check_scores(scores, widths)
    rising = sorted(scores, key=lambda unit: scores[unit])
    dealt = {unit: scores[other] for unit, other in zip(rising, reversed(rising), strict=True)}
    return mrs({unit: dealt[unit] for unit in scores}, widths, costs, target, max_ratio=max_ratio)


def shuffled_mrs(
    scores: Mapping[str, float],
    widths: Mapping[str, int],
    costs: Mapping[str, float],
    target: float,
    *,
    seed: int,
    max_ratio: float = 0.85,
) -> dict[str, float]:
    """
    Remove by the same scores, dealt to other units by a seed: the control for what any spread of ratios would do.

    Args:
        seed (`int`): the same seed deals the same way; in [`plan_pruning`] it is the plan's.

    The other arguments, result and errors are those of [`mrs`].
    """
    check_scores(scores, widths)
    values = list(scores.values())
    random.Random(seed).shuffle(values)
    return mrs(dict(zip(scores, values, strict=True)), widths, costs, target, max_ratio=max_ratio)

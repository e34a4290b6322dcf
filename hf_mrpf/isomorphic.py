"""Isomorphic Pruning: channels are ranked against those of units that are built alike."""

from collections.abc import Hashable, Mapping, Sequence

from .rules import channel_slices, check_problem, remove_least, same_units


def isomorphic(
    scores: Mapping[str, Sequence[float]],
    widths: Mapping[str, int],
    costs: Mapping[str, float],
    target: float,
    *,
    structures: Mapping[str, Hashable],
    max_ratio: float = 0.85,
) -> dict[str, float]:
    """
    Remove the least important channels among those of alike units, the same fraction of channels from every group.

    [Isomorphic Pruning](https://huggingface.co/papers/2407.04616): importances of different structures
    have different distributions, so a channel is only ranked within its group. Channels of all groups then go in the
    order of their quantile in the group, until the cost is met.

    Args:
        scores (`Mapping[str, Sequence[float]]`):
            Importance of each channel, by unit, comparable between units of one group.
        structures (`Mapping[str, Hashable]`):
            By unit, what is equal for units that are built alike; see `UnitGraph.structure`.

    The other arguments are those of [`mrs`].

    Returns:
        `dict[str, float]`: fraction of channels to remove, at most `max_ratio`, by unit. Fractions of groups differ by
        less than one channel of theirs; the last channel is counted in part, so that the target is met exactly.
    """
    check_problem(widths, costs, target, max_ratio)
    same_units("scores", scores, widths)
    same_units("structures", structures, widths)
    order = []
    for structure in dict.fromkeys(structures[unit] for unit in widths):
        group = {unit: width for unit, width in widths.items() if structures[unit] == structure}
        gone, total = 0.0, sum(group.values())
        for _, unit, slice_ in channel_slices({unit: scores[unit] for unit in group}, group, max_ratio):
            gone += slice_ * widths[unit]
            order.append((gone / total, unit, slice_))
    order.sort(key=lambda entry: entry[0])
    return remove_least(order, widths, costs, (1 - target) * sum(costs.values()), max_ratio)

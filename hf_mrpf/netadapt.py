"""NetAdapt: widths by a greedy search over measured losses."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from torch import nn

from .allocation import Widths
from .attacks import AttackConfig
from .pruned_copies import PrunedCopies, Sets, robust_loss

# About how many copies are measured, and the fewest steps in which the target is reached, however many units there are.
EVALUATIONS, STEPS = 128, 8


def netadapt(
    model: nn.Module,
    copies: PrunedCopies,
    batches: Sets,
    attack: AttackConfig,
    options: Mapping[str, Sequence[int]],
    target: float,
    seed: int,
) -> Widths:
    """
    Reach a cost in equal steps, each taken from the one unit whose narrowing raises the robust loss least.

    [NetAdapt](https://huggingface.co/papers/1804.03230), Alg. 1, with the loss under attack in the place of accuracy:
    in every step each unit by itself is narrowed just so far that the network gets cheaper by the step's share, and the
    proposal of the lowest loss is taken. A proposal is pruned, repaired in closed form, its BatchNorm statistics are
    measured again, and it is attacked anew. What the paper does besides, and this does not: the short-term fine-tuning
    of every proposal, and steps that get smaller.

    The target is reached in `max(8, 128 // units)` steps, so that about 128 proposals are measured, or 8 for each unit
    where there are more than 16. A unit that cannot give the whole share is not proposed; where none can, the step is
    what one of them can give at most.

    Arguments and result as for a function of `MEASURED` (see `measured_allocation.py`). The size of the result is
    `target` or less, by no more than the last unit's step between allowed widths.
    """
    widths = {name: choices[-1] for name, choices in options.items()}
    steps = max(STEPS, EVALUATIONS // len(options))
    share = (copies.size(widths) - target) / steps
    copies.to_come(steps * len(options))
    while (size := copies.size(widths)) > target:
        smallest = min(copies.size(widths | {name: choices[0]}) for name, choices in options.items())
        if smallest >= size:
            break
        proposals = _proposals(copies, options, widths, max(size - share, target, smallest))
        # A single one is taken whatever its loss.
        if len(proposals) > 1:
            losses = [robust_loss(copies.at(proposal), batches, attack, seed=seed) for proposal in proposals]
            proposals = [proposals[losses.index(min(losses))]]
        widths = proposals[0]
    return widths


def _proposals(copies: PrunedCopies, options: Mapping[str, Sequence[int]], widths: Widths, goal: float) -> list[Widths]:
    """For each unit that can bring the size to `goal` alone, the widths where it is as wide as that allows."""
    proposals = []
    for name, choices in options.items():
        sizes = [copies.size(widths | {name: width}) for width in choices]
        fitting = bisect_right(sizes, goal)
        if fitting:
            proposals.append(widths | {name: choices[fitting - 1]})
    return proposals

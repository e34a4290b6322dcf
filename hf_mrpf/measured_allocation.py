"""Allocations that measure what pruned copies lose, beside the pure functions of `allocation.py`: `MEASURED`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .allocation import ALLOCATIONS, Widths, nudged
from .attacks import AttackConfig
from .damage import damage
from .netadapt import netadapt
from .processes import Processes
from .progress import progress_bar
from .pruned_copies import PrunedCopies, Sets
from .units import UnitGraph

MeasuredAllocation = Callable[
    [nn.Module, PrunedCopies, Sets, AttackConfig, Mapping[str, Sequence[int]], float, int], Widths
]


def known_allocations() -> tuple[str, ...]:
    """The names of all allocations: keys of `ALLOCATIONS` and of `MEASURED`."""
    return (*ALLOCATIONS, *MEASURED)


def check_measurable(allocation: str, target_metric: str, round_to: int | str) -> None:
    """Refuse (ValueError) a measured allocation where widths are searched for by the clock as well."""
    if allocation not in MEASURED:
        return
    for option, value in (("target_metric", target_metric), ("round_to", round_to)):
        if value in ("latency", "auto"):
            raise ValueError(
                f"allocation {allocation!r} measures losses at one size, and {option} {value!r} would have it do so at "
                "every size that is timed. Give target_metric 'macs' or 'params' and a whole number as round_to, or "
                f"one of the allocations that measure nothing: {', '.join(ALLOCATIONS)}."
            )


def measured_widths(
    allocation: str,
    model: nn.Module,
    graph: UnitGraph,
    keep: Callable[[Widths], dict[str, Any]],
    calibration: tuple[Sets, AttackConfig],
    options: Mapping[str, Sequence[int]],
    metric: str,
    target: float,
    *,
    seed: int,
    processes: Processes,
    progress: bool = False,
) -> Widths:
    """
    Call a function of `MEASURED`, on the main process alone, and bring its widths to the target by single steps.

    A function of `MEASURED` is called as `(model, copies, batches, attack, options, target, seed)`:

    - `model` (`nn.Module`): the dense model, which must stay as it is.
    - `copies` ([`PrunedCopies`]): `copies.size(widths)` is the size to be brought to the target, MACs or parameters;
      `copies.at(widths)` a copy that is pruned, repaired and recalibrated; `copies.to_come(n)` feeds the progress bar.
    - `batches` (`list[tuple[Tensor, Tensor]]`): calibration sets `(images [N, 3, H, W] in [0, 1], labels [N])`.
    - `attack` ([`AttackConfig`]): what robustness is about.
    - `options` (`Mapping[str, Sequence[int]]`): allowed widths of each unit that may be pruned, increasing;
      `max_ratio`, `min_channels`, `round_to` and `ignore` are in them.
    - `target` (`float`): size to keep, in the units of `copies.size`; smaller than at the largest widths, larger than
      at the smallest.
    - `seed` (`int`): of everything random.

    It returns the width of each unit of `options`, one of its allowed ones. Being off the target by little is allowed.

    Args:
        allocation (`str`): a key of `MEASURED`.
        graph ([`UnitGraph`]), keep (`Callable`), metric (`str`): as for [`PrunedCopies`].
        calibration (`tuple`): `batches` and `attack`.
        processes ([`Processes`]): the main one measures on all images while the others wait, no longer than the
            timeout of their group (`--ddp_timeout`); all get its widths.
        progress (`bool`, *optional*, defaults to `False`): whether to show a bar of the copies.
        model, options, target, seed: as above.

    Returns:
        `dict[str, int]`: width of each unit.

    Raises:
        ValueError: On every process, where the function raises one or returns other than allowed widths. Whatever else
            it raises is a RuntimeError on the processes that wait.
    """
    smallest = {name: widths[0] for name, widths in options.items()}
    if graph.size(smallest)[metric] >= target:
        return smallest

    def measure() -> Widths:
        with progress_bar(0, allocation, "copy", shown=progress) as bar:
            copies = PrunedCopies(model, graph, keep, metric, *calibration, options, seed=seed, bar=bar)
            widths = MEASURED[allocation](model, copies, *calibration, options, target, seed)
            _check_widths(allocation, widths, options)
            found = nudged(copies.size, options, dict(widths), target)
            bar.total = bar.n
        return found

    return processes.on_main(measure)


def _check_widths(allocation: str, widths: Mapping[str, int], options: Mapping[str, Sequence[int]]) -> None:
    if set(widths) != set(options):
        raise ValueError(
            f"allocation {allocation!r} returned widths of {', '.join(widths)}; one of each of {', '.join(options)} is "
            "needed."
        )
    for name, width in widths.items():
        if width not in options[name]:
            raise ValueError(
                f"allocation {allocation!r} returned width {width!r} for unit {name!r}; one of its allowed widths is "
                f"needed: {', '.join(map(str, options[name]))}."
            )


MEASURED: dict[str, MeasuredAllocation] = {"netadapt": netadapt, "damage": damage}

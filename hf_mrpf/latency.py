"""Planning by the clock: candidates of a plan are cut on copies and timed in turns with the dense model."""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .allocation import Widths
from .efficiency import device_name, latency_rounds
from .processes import Processes
from .progress import progress_bar
from .results import METRIC_TITLES
from .units import METRICS, UnitGraph, cut

TARGET_METRICS = (*METRICS, "latency")
# What `round_to="auto"` chooses from.
MULTIPLES = (1, 4, 8, 16, 32)
# How far, relative to the target, a measured latency may be from it.
TOLERANCE = 0.1
# Candidates whose sizes differ by no more than this are compared at equal size.
_EQUAL = 0.02
# A multiple that saves no more than this of the time is not worth its coarser widths.
_NO_GAIN = 0.01
# A first measurement that is this near is worth a second, longer one, which alone decides: among noisy figures the
# search picks those that look right.
_NEAR = 0.04
_ATTEMPTS = 10


class Effort(NamedTuple):
    """How long to measure: `rounds` at least, then until `seconds` have passed or there are `most` rounds."""

    rounds: int
    seconds: float
    most: int


SEARCHING, DECIDING = Effort(11, 2.0, 201), Effort(21, 4.0, 401)


class Timing(NamedTuple):
    """
    How long a pruned model takes beside the dense one.

    Attributes:
        fraction (`float`): median over rounds of pruned time over dense time in the same round.
        quartiles (`tuple[float, float]`): of the same: half of the rounds lie between them.
        milliseconds (`dict[str, float]`): medians of the `"dense"` and of the `"pruned"` model.
        rounds (`int`): how many there were.
    """

    fraction: float
    quartiles: tuple[float, float]
    milliseconds: dict[str, float]
    rounds: int

    @classmethod
    def of(cls, dense: Sequence[float], pruned: Sequence[float]) -> "Timing":
        """The figures of rounds in milliseconds."""
        beside = [own / whole for own, whole in zip(pruned, dense, strict=True)]
        low, middle, high = statistics.quantiles(beside, n=4, method="inclusive")
        milliseconds = {"dense": statistics.median(dense), "pruned": statistics.median(pruned)}
        return cls(middle, (low, high), milliseconds, len(dense))


class Clock:
    """
    Times what is left of a model at given widths, on its device and in eager PyTorch.

    Args:
        model (`nn.Module`): the dense model; it stays as it is.
        graph ([`UnitGraph`]): its units.
        keep (`Callable[[dict[str, int]], dict[str, Any]]`): which channels stay at given widths, as in `PruningPlan`.
        images (`torch.Tensor` of shape `[N, C, H, W]`): what a pass is timed on.
        processes ([`Processes`]): the main one measures, and all get its figures.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: UnitGraph,
        keep: Callable[[Widths], dict[str, Any]],
        images: Tensor,
        processes: Processes,
    ):
        self.model, self.graph, self.keep, self.images, self.processes = model, graph, keep, images, processes

    def time(self, candidates: Sequence[Widths], effort: Effort) -> list[list[float]]:
        """Milliseconds of every round: of the dense model, then of each candidate."""
        # Else other processes of this machine might still plan on its cores.
        self.processes.gather(None)

        def measure() -> list[list[float]]:
            models = {"dense": self.model}
            for number, widths in enumerate(candidates):
                models[str(number)] = copy.deepcopy(self.model)
                cut(models[str(number)], self.graph, self.keep(widths))
            return list(latency_rounds(models, self.images, **effort._asdict()).values())

        return self.processes.on_main(measure)

    def describe(self) -> dict[str, Any]:
        """On what it times, for the record of a plan."""
        device = next(self.model.parameters()).device
        return {"device": self.processes.from_main(device_name(device)), "batch_size": len(self.images)}


class Candidates(NamedTuple):
    """
    Plans to choose from.

    Attributes:
        choose (`Callable[[float, int], dict[str, int]]`): widths, multiples of the second argument, that keep the first
            argument of the size, or as much as must be kept.
        share (`Callable[[dict[str, int]], float]`): fraction of the size kept at given widths.
        metric (`str`): which size: `"macs"` or `"params"`.
    """

    choose: Callable[[float, int], Widths]
    share: Callable[[Widths], float]
    metric: str


def plan_by_clock(
    clock: Clock,
    candidates: Candidates,
    *,
    target: float,
    target_metric: str,
    round_to: int | str,
    progress: bool = False,
) -> tuple[Widths, int, dict[str, Any]]:
    """
    Choose widths by measurement: the multiple that a device is fastest at, widths that meet a latency, or both.

    Args:
        clock ([`Clock`]): measures.
        candidates ([`Candidates`]): what to choose from.
        target (`float`), target_metric (`str`), round_to (`int` or `"auto"`): as in [`plan_pruning`].
        progress (`bool`, *optional*, defaults to `False`): whether to show a bar.

    Returns:
        `tuple[dict[str, int], int, dict[str, Any]]`: the widths, what they are multiples of, and what was measured, as
        JSON values (see `PruningPlan.latency`).

    Raises:
        ValueError: If no candidate's latency is within 10 % of the target, with the nearest one's.
    """
    record = clock.describe()
    with progress_bar(None, "latency", "candidate", shown=progress and clock.processes.is_main) as bar:
        if round_to == "auto":
            round_to, widths, timing, record["multiples"] = _chosen_multiple(clock, candidates, target)
            bar.update(len(record["multiples"]))
        multiple = int(round_to)
        if target_metric == "latency":
            tried = record["tried"] = []

            def time(nominal: float, effort: Effort) -> Timing:
                widths = candidates.choose(nominal, multiple)
                timing = Timing.of(*clock.time([widths], effort))
                tried.append({candidates.metric: candidates.share(widths)} | _figures(timing))
                bar.update()
                bar.set_postfix({"latency": f"{timing.fraction:.3f}"})
                return timing

            lowest = candidates.share(candidates.choose(0.0, multiple))
            nominal, timing = meet_latency(time, target, lowest)
            widths = candidates.choose(nominal, multiple)
            if not _within(timing, target, TOLERANCE):
                raise ValueError(_not_met(timing, target, candidates, widths, nominal <= lowest, record))
    return widths, multiple, record | _figures(timing) | {"milliseconds": timing.milliseconds}


def meet_latency(time: Callable[[float, Effort], Timing], target: float, lowest: float) -> tuple[float, Timing]:
    """
    Search the nominal size whose latency is nearest to a target, in few measurements, each of which may be noisy.

    Args:
        time (`Callable[[float, Effort], Timing]`): measures at a nominal size in (0, 1).
        target (`float`): fraction of the dense latency to keep.
        lowest (`float`): smallest nominal size.

    Returns:
        `tuple[float, Timing]`: the size, and its longer measurement, made after it was chosen. It may be far from the
        target: at `lowest` where nothing smaller is fast enough, else where latency jumps over the target.
    """
    # Where the dense model itself stands: no time needs to be taken for that.
    (low, fast), (high, slow) = (lowest, 0.0), (1.0, 1.0)
    first: dict[float, Timing] = {}
    nominal = lowest
    for attempt in range(_ATTEMPTS):
        timing = first[nominal] = time(nominal, SEARCHING)
        if _within(timing, target, _NEAR):
            timing = time(nominal, DECIDING)
            if _within(timing, target, TOLERANCE):
                return nominal, timing
            first[nominal] = timing
        if timing.fraction <= target:
            low, fast = nominal, timing.fraction
        elif nominal == lowest:
            break
        else:
            high, slow = nominal, timing.fraction
        # Latency is a line in places and a staircase in others: interpolating finds the one, halving the other.
        part = 0.5 if attempt % 2 else min(max((target - fast) / (slow - fast), 0.1), 0.9)
        nominal = low + part * (high - low)
    # Of plans that are as fast, the one that keeps the most.
    nearest = min(first, key=lambda tried: (abs(first[tried].fraction - target), -tried))
    return nearest, time(nearest, DECIDING)


def fastest_multiple(rounds: Mapping[int, Sequence[float]]) -> int:
    """
    The multiple whose candidate is the fastest; of those that tie with it, the smallest, which leaves most choice.

    It ties where the fastest gains no more than 1 %, or the spread of the rounds leaves open whether it does: within a
    95 % confidence interval of the median.

    Args:
        rounds (`Mapping[int, Sequence[float]]`): times by multiple, of the same rounds.
    """
    fastest = min(rounds, key=lambda multiple: statistics.median(rounds[multiple]))

    def ties(times: Sequence[float]) -> bool:
        # Within a round, so that a machine which slows down meanwhile does not blur the difference.
        beside = sorted(own / best for own, best in zip(times, rounds[fastest], strict=True))
        # By the binomial distribution: how many of so many rounds may lie below a median.
        lowest = math.floor((len(beside) - 1.96 * math.sqrt(len(beside))) / 2)
        return beside[max(lowest, 0)] <= 1 + _NO_GAIN

    return min(multiple for multiple, times in rounds.items() if ties(times))


def _chosen_multiple(
    clock: Clock, candidates: Candidates, target: float
) -> tuple[int, Widths, Timing, dict[str, dict[str, Any]]]:
    every = {multiple: candidates.choose(target, multiple) for multiple in MULTIPLES}
    shares = {multiple: candidates.share(widths) for multiple, widths in every.items()}
    # A network too narrow for large multiples misses the target by whole steps: faster, perhaps, but at another size.
    equal = {multiple: every[multiple] for multiple in MULTIPLES if abs(shares[multiple] / shares[1] - 1) <= _EQUAL}
    dense, *measured = clock.time(list(equal.values()), DECIDING)
    rounds = dict(zip(equal, measured, strict=True))
    multiple = fastest_multiple(rounds)
    timings = {number: Timing.of(dense, times) for number, times in rounds.items()}
    table = {
        str(number): {candidates.metric: shares[number]} | (_figures(timings[number]) if number in timings else {})
        for number in MULTIPLES
    }
    return multiple, equal[multiple], timings[multiple], table


def _figures(timing: Timing) -> dict[str, Any]:
    return {"fraction": timing.fraction, "quartiles": list(timing.quartiles), "rounds": timing.rounds}


def _within(timing: Timing, target: float, tolerance: float) -> bool:
    return abs(timing.fraction / target - 1) <= tolerance


def _not_met(
    timing: Timing, target: float, candidates: Candidates, widths: Widths, smallest: bool, record: Mapping[str, Any]
) -> str:
    low, high = timing.quartiles
    limits, advice = "", f"Give target {timing.fraction:.2g}, another latency_batch_size, or a smaller round_to."
    if smallest:
        limits = ", the fewest that max_ratio, min_channels, round_to and ignore allow"
    if smallest and timing.fraction > target:
        advice = "Raise target, or latency_batch_size: at small batches latency hardly falls with size."
    return (
        f"target {target:g} of the latency cannot be met within {TOLERANCE:.0%}: the nearest plan takes "
        f"{timing.fraction:.3f} of the dense model's time ({timing.milliseconds['pruned']:.3g} of "
        f"{timing.milliseconds['dense']:.3g} ms; half of the rounds between {low:.3f} and {high:.3f}) with "
        f"{candidates.share(widths):.1%} of its {METRIC_TITLES[candidates.metric]}{limits}, at batch "
        f"{record['batch_size']} on {record['device']}. {advice}"
    )

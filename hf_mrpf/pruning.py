"""Plan how many and which channels to keep, and remove the others."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .allocation import Widths, allowed_widths, get_allocation, meet_target, nearest_width, reads
from .attacks import AttackConfig
from .calibration import attacked_batches
from .efficiency import count_macs, count_parameters
from .fingerprint import weights_sha256
from .importance import get_importance
from .latency import TARGET_METRICS, Candidates, Clock, plan_by_clock
from .layers import skeleton
from .measured_allocation import MEASURED, check_measurable, known_allocations, measured_widths
from .modeling import PrunedForImageClassification, check_class, describe_pruning
from .plan import PruningPlan, check_fits, removed_fraction, trace_for
from .plan_inputs import check_reachable, free_units, scores_by_unit, warn_if_off
from .processes import Processes
from .progress import progress_bar
from .report import package_versions
from .selection import importance_by_channel, most_important
from .sensitivity import (
    COMBINERS,
    SensitivityResult,
    check_finite_weights,
    module_robustness_sensitivity,
)
from .units import METRICS, check_removal, cut, trace_units

Batches = Iterable[tuple[Tensor, Tensor]]


def plan_pruning(
    model: nn.Module,
    example: Tensor,
    *,
    target: float = 0.5,
    target_metric: str = "macs",
    allocation: str = "mrs",
    scores: Mapping[str, float] | Callable[[], Mapping[str, float]] | None = None,
    combine: str = "sum",
    importance: str = "magnitude",
    batches: Batches | None = None,
    attack: AttackConfig | None = None,
    max_ratio: float = 0.85,
    min_channels: int = 4,
    round_to: int | str = 1,
    latency_batch_size: int = 1,
    ignore: Sequence[str] = (),
    heads: bool = False,
    seed: int = 0,
    distributed: bool = False,
    progress: bool = False,
) -> PruningPlan:
    """
    Plan which channels to remove so that a fraction of the cost stays. The model is not changed.

    The cost of every candidate is counted exactly from the layers' shapes, without pruning a copy. Widths are
    searched for that meet the target within 1 %. Small networks, and multiples of `round_to`, have few sizes: where the
    nearest that was found is farther off, a warning in the log says so. A target of latency, and the choice of
    `round_to="auto"`, are measured: candidates are cut on copies and timed on the model's device in eager PyTorch,
    forward passes in turns with the model's own, so let nothing else run there meanwhile.

    Args:
        model (`nn.Module`):
            Model that takes pixels in [0, 1] and returns logits, or an output with `.logits`.
        example (`torch.Tensor` of shape `[N, 3, H, W]`):
            Images of the size that counts; their values do not matter.
        target (`float`, *optional*, defaults to 0.5):
            Fraction of `target_metric` to KEEP, in (0, 1).
        target_metric (`str`, *optional*, defaults to `"macs"`):
            `"macs"` (multiply-accumulates per image), `"params"`, or `"latency"`: the time of a forward pass, as the
            median over interleaved rounds of its fraction of the model's own, met within 10 %. The multiply-accumulates
            that this takes are searched for.
        allocation (`str`, *optional*, defaults to `"mrs"`):
            How much each unit gives: a key of `ALLOCATIONS`, or of `MEASURED`. `"mrs"`, `"mrs_per_cost"` and the
            controls `"anti_mrs"` and `"shuffled_mrs"` read sensitivities, `"global"` and `"isomorphic"` importances.
            The measured ones, such as `"netadapt"`, need `batches` and `attack` for the losses of pruned copies, and
            go with neither a target of latency nor `round_to="auto"`; on several processes the first one measures.
        scores (`Mapping[str, float]` or `Callable`, *optional*):
            Sensitivities in nats of every member by module name (combined per unit), or of every unit by unit name
            (taken as they are); or a function without arguments that measures them, called once all else that is asked
            for is known to be possible. Where the allocation reads them and they are not given, they are measured on
            `batches` with `attack`.
        combine (`str`, *optional*, defaults to `"sum"`):
            How members' scores make a unit's: `"sum"`, `"max"`, `"mean"`, or `"joint"`, which perturbs all members of a
            unit together and so needs `batches` and `attack`, or scores by unit name.
        importance (`str`, *optional*, defaults to `"magnitude"`):
            A key of `IMPORTANCES`: which channels of a unit go first. `"taylor"`, `"hessian"` and `"fisher"` need
            `batches` and `attack`.
        batches (`Iterable[tuple[Tensor, Tensor]]`, *optional*):
            Calibration sets `(images [N, 3, H, W] in [0, 1], labels [N])`.
        attack ([`AttackConfig`], *optional*):
            Makes the adversarial images on which sensitivities and gradients are taken.
        max_ratio (`float`, *optional*, defaults to 0.85):
            Largest fraction of a unit's channels that may be removed, in (0, 1).
        min_channels (`int`, *optional*, defaults to 4):
            Fewest channels kept in a unit (a narrower unit keeps all), at least 1.
        round_to (`int` or `"auto"`, *optional*, defaults to 1):
            Kept widths are multiples of this; a unit too narrow for one keeps all its channels. `"auto"` times plans of
            equal size in multiples of 1, 4, 8, 16 and 32, and takes the fastest; of those that tie with it within the
            spread of the rounds, the smallest.
        latency_batch_size (`int`, *optional*, defaults to 1):
            Images per timed pass: 1 is the answer to one request, larger ones are throughput.
        ignore (`Sequence[str]`, *optional*):
            Units to leave whole: unit names, or names of modules with a member inside, such as `"layer4"`.
        heads (`bool`, *optional*, defaults to `False`):
            Whether attention loses whole heads (at least one stays), instead of the same number of channels of every
            head. `min_channels` and `round_to` are not about heads.
        seed (`int`, *optional*, defaults to 0):
            Of random importances, of the attack's starts, and of how `"shuffled_mrs"` deals.
        distributed (`bool`, *optional*, defaults to `False`):
            Whether every process of the group makes this same call: each then takes a share of the images, and all get
            the same plan.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars: of the sensitivities, where they are measured here, and of the candidate
            widths that the search measures.

    Returns:
        [`PruningPlan`].

    Raises:
        ValueError: If an option is unknown or out of range, sensitivities are needed and neither `scores` nor `batches`
            with `attack` is given, weights are not finite, the model cannot be pruned rightly or was loaded by the
            code beside its weights, or the target cannot be met (the message says the smallest fraction that can, or
            the nearest latency).
    """
    if allocation not in known_allocations():
        raise ValueError(f"allocation is {allocation!r}; known allocations: {', '.join(known_allocations())}.")
    score_channels = get_importance(importance)
    _check_options(target, target_metric, combine, max_ratio, min_channels, round_to, latency_batch_size, seed, heads)
    calibration = None if batches is None or attack is None else (list(batches), attack)
    read = reads(allocation)
    if calibration is None and "sensitivities" in read and scores is None:
        raise ValueError(
            f"allocation {allocation!r} needs scores, or batches and attack to measure them on; none or only one was "
            "given."
        )
    check_measurable(allocation, target_metric, round_to)
    if calibration is None and allocation in MEASURED:
        raise ValueError(
            f"allocation {allocation!r} needs batches and attack to measure losses on; none or only one was given."
        )
    if not callable(scores):
        _check_scores(scores)
    check_class(model)
    if not _sums_are_finite(model):
        check_finite_weights(model)
    graph = trace_units(model, example, heads=heads)
    free = free_units(model, graph, ignore)
    before = graph.size({})
    by_clock = target_metric == "latency" or round_to == "auto"
    metric = "macs" if target_metric == "latency" else target_metric

    def options_at(multiple: int) -> dict[str, list[int]]:
        limits = {unit.name: (1, 1) if unit.kind == "heads" else (min_channels, multiple) for unit in free}
        return {unit.name: allowed_widths(unit.width, max_ratio, *limits[unit.name]) for unit in free}

    if target_metric != "latency":
        check_reachable(graph, options_at(1 if round_to == "auto" else int(round_to)), target, metric)
    elif not free:
        raise ValueError(
            f"target {target:g} of the latency cannot be met: no unit is left that may be pruned. Ignore fewer units."
        )
    processes = Processes.of(distributed)
    # Before the sensitivities, which take longest. Nothing is attacked unless the importance reads it.
    attacked = _attacked(model, calibration, importance, seed, processes)
    importances = score_channels(model, graph.groups, attacked, seed, processes)

    module_scores: dict[str, float] = {}
    unit_scores: dict[str, float] = {}
    if callable(scores):
        scores = scores()
        _check_scores(scores)
    if scores is None and "sensitivities" in read and calibration is not None:
        groups = {unit.name: unit.members for unit in graph.units} if combine == "joint" else None
        scores = module_robustness_sensitivity(
            model, *calibration, seed=seed, groups=groups, distributed=distributed, progress=progress
        )
    if scores is not None:
        module_scores, unit_scores = scores_by_unit(model, graph, scores, combine)

    order = {unit.name: unit_scores.get(unit.name, 0.0) for unit in free}
    given_scores: Mapping[str, Any] = order
    if "importances" in read:
        given_scores = {unit.name: importance_by_channel(graph, unit, importances) for unit in free}
    costs = {unit.name: graph.touching(unit, metric) for unit in free}
    free_widths = {unit.name: unit.width for unit in free}
    keywords = {"seed": seed, "structures": {unit.name: graph.structure(unit) for unit in free}}
    more = {name: value for name, value in keywords.items() if name in read}

    def choose(fraction: float, multiple: int) -> Widths:
        allocate, options, wanted = get_allocation(allocation), options_at(multiple), fraction * before[metric]
        smallest = {name: widths[0] for name, widths in options.items()}
        if graph.size(smallest)[metric] >= wanted:
            return smallest

        def widths_at(nominal: float) -> Widths:
            ratios = allocate(given_scores, free_widths, costs, nominal, max_ratio=max_ratio, **more)
            return {
                name: nearest_width(options[name], free_widths[name] * (1 - ratio)) for name, ratio in ratios.items()
            }

        # One bar a search: a search by the clock makes many, and has a bar of its own.
        bar = progress_bar(0, "pruning search", "candidate", shown=progress and processes.is_main and not by_clock)

        def to_come(candidates: int) -> None:
            bar.total += candidates

        def size(candidate: Widths) -> int:
            bar.update()
            return graph.size(candidate)[metric]

        with bar:
            widths = meet_target(size, options, widths_at, order, wanted, lowest=1 - max_ratio, to_come=to_come)
            bar.total = bar.n
        return widths

    def keep(widths: Widths) -> dict[str, Any]:
        return {
            unit.name: most_important(graph, unit, importances, widths.get(unit.name, unit.width))
            for unit in graph.units
        }

    latency = None
    if by_clock:
        noise = torch.Generator().manual_seed(0)
        images = torch.rand(latency_batch_size, *example.shape[1:], generator=noise, device="cpu")
        candidates = Candidates(choose, lambda widths: graph.size(widths)[metric] / before[metric], metric)
        widths, multiple, latency = plan_by_clock(
            Clock(model, graph, keep, images, processes), candidates,
            target=target, target_metric=target_metric, round_to=round_to, progress=progress,
        )  # fmt: skip
    elif allocation in MEASURED and calibration is not None:
        multiple = int(round_to)
        widths = measured_widths(
            allocation, model, graph, keep, calibration, options_at(multiple), metric, target * before[metric],
            seed=seed, processes=processes, progress=progress,
        )  # fmt: skip
    else:
        multiple = int(round_to)
        widths = choose(target, multiple)
    after, kept = graph.size(widths), keep(widths)
    achieved = {name: after[name] / before[name] for name in METRICS}
    if target_metric != "latency" and processes.is_main:
        warn_if_off(achieved[metric], target, metric, multiple)
    return PruningPlan(
        target=float(target),
        target_metric=target_metric,
        allocation=allocation,
        combine=combine,
        importance=importance,
        max_ratio=float(max_ratio),
        min_channels=min_channels,
        round_to=multiple,
        ignore=tuple(ignore),
        seed=seed,
        units=graph.units,
        scores=unit_scores,
        module_scores=module_scores,
        ratios={unit.name: removed_fraction(unit, kept[unit.name]) for unit in graph.units},
        kept=kept,
        before=before,
        after=after,
        achieved=achieved | ({"latency": latency["fraction"]} if latency else {}),
        example_shape=(1, *example.shape[1:]),
        sensitivity=_measurement(scores) if isinstance(scores, SensitivityResult) else None,
        versions=package_versions(),
        weights_sha256=weights_sha256(model),
        dense_size=dense_size(model, example),
        latency=latency,
    )


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """
    Remove the channels that a plan does not keep, in place. What stays computes exactly what it computed before.

    Removal alone: it needs no data and repairs nothing. Everything is checked before the first cut. Parameters become
    new tensors, so make the optimizer afterwards; modes, devices, dtypes and gradients' flags stay.

    Args:
        model (`nn.Module`): the model that was planned on, or one of the same widths.
        plan ([`PruningPlan`]): what to keep.

    Returns:
        `nn.Module`: `model`.

    Raises:
        ValueError: If the model's units are not those of the plan, or it cannot be pruned rightly, was loaded by the
            code beside its weights, or (a [`PrunedForImageClassification`], whose `config.pruning` says afterwards
            what is left) cannot be saved again.

    Warns:
        UserWarning: If the weights are not those that the plan was made on.
    """
    if not isinstance(plan, PruningPlan):
        raise ValueError(f"plan is a {type(plan).__name__}; a PruningPlan is needed (PruningPlan.load reads a file).")
    check_class(model)
    graph = trace_for(plan, model)
    check_fits(plan, graph)
    # At the very widths of the plan: those that planning tried were others.
    check_removal(model, torch.zeros(plan.example_shape, device="cpu"), graph, plan.kept)
    if weights_sha256(model) != plan.weights_sha256:
        warnings.warn(
            "the model's weights are not those that the plan was made on: its choice of channels may not suit them.",
            stacklevel=2,
        )
    recorded = _recorded(model)
    if recorded:
        # On shapes alone, so that what could not be saved is refused while nothing is cut.
        smaller = skeleton(model)
        cut(smaller, graph, plan.kept)
        for part in _recorded(smaller):
            describe_pruning(part)
    cut(model, graph, plan.kept)
    for part in recorded:
        part.update_pruning_record()
    return model


def _recorded(model: nn.Module) -> list[PrunedForImageClassification]:
    return [part for part in model.modules() if isinstance(part, PrunedForImageClassification)]


def _check_options(
    target: float,
    target_metric: str,
    combine: str,
    max_ratio: float,
    min_channels: int,
    round_to: int | str,
    latency_batch_size: int,
    seed: int,
    heads: bool,
) -> None:
    for name, value in (("target", target), ("max_ratio", max_ratio)):
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < 1:
            hint = (
                " It is the fraction KEPT." if name == "target" else " It is the largest fraction REMOVED from a unit."
            )
            raise ValueError(f"{name} is {value!r}; it must be a number between 0 and 1, both excluded.{hint}")
    if target_metric not in TARGET_METRICS:
        raise ValueError(f"target_metric is {target_metric!r}; known metrics: {', '.join(TARGET_METRICS)}.")
    if combine not in (*COMBINERS, "joint"):
        raise ValueError(f"combine is {combine!r}; known: {', '.join(COMBINERS)}, joint.")
    if not isinstance(heads, bool):
        raise ValueError(f"heads is {heads!r}; True or False is needed.")
    for name, number, least in (
        ("min_channels", min_channels, 1),
        ("round_to", 1 if round_to == "auto" else round_to, 1),
        ("latency_batch_size", latency_batch_size, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            other = ", or 'auto'," if name == "round_to" else ""
            raise ValueError(f"{name} is {number!r}; an integer of at least {least}{other} is needed.")


def _check_scores(scores: Any) -> None:
    if not isinstance(scores, Mapping | None):
        raise ValueError(
            f"scores are a {type(scores).__name__}; a mapping of the names of members, or of units, to numbers is "
            "needed, such as module_robustness_sensitivity returns."
        )


def _attacked(
    model: nn.Module, calibration: tuple[list, AttackConfig] | None, importance: str, seed: int, processes: Processes
) -> Iterator[tuple[Tensor, Tensor]]:
    if calibration is None:
        raise ValueError(f"importance {importance!r} needs batches and attack; none or only one was given.")
    for part in attacked_batches(model, *calibration, seed=seed, processes=processes):
        yield part.adversarial, part.labels


def _sums_are_finite(model: nn.Module) -> bool:
    """Whether every weight is plainly finite: far faster than a look at each, which names one that is not."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    with torch.no_grad():
        return all(tensor.sum().isfinite() for tensor in tensors)


def _measurement(scores: SensitivityResult) -> dict[str, Any]:
    return {"settings": scores.settings, "per_set": list(scores.per_set), "spearman": scores.spearman}


def dense_size(model: nn.Module, example: Tensor) -> dict[str, int] | None:
    """What the dense network of a pruned model's recipe costs; None where the model is dense, or has no recipe."""
    if not isinstance(model, PrunedForImageClassification) or describe_pruning(model) is None:
        return None
    config = copy.deepcopy(model.config)
    config.pruning = None
    with torch.device("meta"):
        dense = PrunedForImageClassification(config)
        images = torch.zeros(1, *example.shape[1:])
    return {"macs": count_macs(dense, images), "params": count_parameters(dense)}

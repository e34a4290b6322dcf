"""Plan how many and which channels to keep, and remove the others."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .allocation import get_allocation
from .architectures import refresh
from .attacks import AttackConfig, keyed_start, pgd_attack
from .importance import get_importance
from .sensitivity import COMBINERS, check_finite_weights, module_robustness_sensitivity, unit_sensitivity
from .units import METRICS, PruningUnit, UnitGraph, trace_units

FORMAT_VERSION = 1

Widths = dict[str, int]
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PruningPlan:
    """
    Which channels of which units stay, and all that led to it. Made by [`plan_pruning`], applied by [`prune`].

    Attributes:
        target (`float`): fraction of `target_metric` to keep, as asked for.
        target_metric (`str`): `"macs"` or `"params"`.
        allocation, combine, importance (`str`): names of the functions used.
        max_ratio (`float`), min_channels (`int`), round_to (`int`), ignore (`tuple[str, ...]`), seed (`int`): settings.
        units (`tuple[PruningUnit, ...]`): all units of the model, in its order.
        scores (`dict[str, float]`): nats by unit; empty where the allocation reads none and none were given.
        module_scores (`dict[str, float]`): nats by module, where unit scores were combined from them.
        ratios (`dict[str, float]`): fraction of channels removed, by unit.
        kept (`dict[str, list[int]]`): channels kept, by unit: increasing indices into the model that was planned on.
        before, after (`dict[str, int]`): `"macs"` per image and `"params"` of the model before and after.
        achieved (`dict[str, float]`): fractions kept, `after / before`.
        example_shape (`tuple[int, ...]`): shape of one input batch, `[1, 3, H, W]`.
        sensitivity (`dict`, *optional*): `settings`, `per_set` scores and mean `spearman` of the sets, where measured.
        versions (`dict[str, str]`): of the libraries that made the plan.
        weights_sha256 (`str`): of the weights that were planned on.

    Raises:
        ValueError: If the fields contradict each other, such as kept indices outside a unit.
    """

    target: float
    target_metric: str
    allocation: str
    combine: str
    importance: str
    max_ratio: float
    min_channels: int
    round_to: int
    ignore: tuple[str, ...]
    seed: int
    units: tuple[PruningUnit, ...]
    scores: dict[str, float]
    module_scores: dict[str, float]
    ratios: dict[str, float]
    kept: dict[str, list[int]]
    before: dict[str, int]
    after: dict[str, int]
    achieved: dict[str, float]
    example_shape: tuple[int, ...]
    sensitivity: dict[str, Any] | None
    versions: dict[str, str]
    weights_sha256: str

    def __post_init__(self) -> None:
        widths = {unit.name: unit.width for unit in self.units}
        if len(widths) != len(self.units):
            raise ValueError("units: two units have one name.")
        for key in ("kept", "ratios"):
            if set(getattr(self, key)) != set(widths):
                raise ValueError(f"{key}: must name every unit once: {', '.join(widths)}.")
        for name, indices in self.kept.items():
            if not indices or any(not _is_int(index) for index in indices) or list(indices) != sorted(set(indices)):
                raise ValueError(f"kept: unit {name!r} needs a non-empty list of increasing integers.")
            if indices[0] < 0 or indices[-1] >= widths[name]:
                raise ValueError(f"kept: unit {name!r} has channels 0 to {widths[name] - 1} only.")

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {"format_version": FORMAT_VERSION} | json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "pruning plan") -> "PruningPlan":
        """
        Make a plan of what [`PruningPlan.to_dict`] gave.

        Args:
            values (`Mapping[str, Any]`): all keys, and no other.
            source (`str`, *optional*, defaults to `"pruning plan"`): what error messages call it.

        Raises:
            ValueError: With `source` and the key at fault.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{source}: a JSON object is needed, not {type(values).__name__}.")
        version = values.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(
                f"{source}: format_version is {version!r}; this version of hf_mrpf reads {FORMAT_VERSION}. "
                "Make the plan again with plan_pruning."
            )
        given = {key: value for key, value in values.items() if key != "format_version"}
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"{source}: unknown key {unknown[0]!r}; known keys: {', '.join(names)}.")
        for name in names:
            if name not in given:
                raise ValueError(f"{source}: key {name!r} is missing.")
            what, fits = _FIELD_TYPES[name]
            if not fits(given[name]):
                raise ValueError(f"{source}: key {name!r} must be {what}.")
        try:
            return cls(
                **given
                | {
                    "units": tuple(
                        PruningUnit(**unit | {"members": tuple(unit["members"])}) for unit in given["units"]
                    ),
                    "ignore": tuple(given["ignore"]),
                    "example_shape": tuple(given["example_shape"]),
                }
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON to the file `path`, whose folder exists; returns the path."""
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """
        Read a plan that [`PruningPlan.save`] wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: With the file and the key at fault.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: this is no JSON file ({error}).") from error
        return cls.from_dict(values, source=str(path))


def plan_pruning(
    model: nn.Module,
    example: Tensor,
    *,
    target: float = 0.5,
    target_metric: str = "macs",
    allocation: str = "mrs",
    scores: Mapping[str, float] | None = None,
    combine: str = "sum",
    importance: str = "magnitude",
    batches: Batches | None = None,
    attack: AttackConfig | None = None,
    max_ratio: float = 0.85,
    min_channels: int = 4,
    round_to: int = 1,
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> PruningPlan:
    """
    Plan which channels to remove so that a fraction of the cost stays. The model is not changed.

    The cost of every candidate is counted exactly from the layers' shapes, without pruning a copy. The target is met
    within 1 %, or as near as whole channels (multiples of `round_to`) allow.

    Args:
        model (`nn.Module`):
            Model that takes pixels in [0, 1] and returns logits, or an output with `.logits`.
        example (`torch.Tensor` of shape `[N, 3, H, W]`):
            Images of the size that counts; their values do not matter.
        target (`float`, *optional*, defaults to 0.5):
            Fraction of `target_metric` to KEEP, in (0, 1).
        target_metric (`str`, *optional*, defaults to `"macs"`):
            `"macs"` (multiply-accumulates per image) or `"params"`.
        allocation (`str`, *optional*, defaults to `"mrs"`):
            A key of `ALLOCATIONS`: how much each unit gives. `"mrs"` reads sensitivities, `"global"` importances.
        scores (`Mapping[str, float]`, *optional*):
            Sensitivities in nats of every member by module name (combined per unit), or of every unit by unit name (taken
            as they are). Where `"mrs"` needs them and they are not given, they are measured on `batches` with `attack`.
        combine (`str`, *optional*, defaults to `"sum"`):
            How members' scores make a unit's: `"sum"`, `"max"`, `"mean"`, or `"joint"`, which perturbs all members of a
            unit together and so needs `batches` and `attack`, or scores by unit name.
        importance (`str`, *optional*, defaults to `"magnitude"`):
            A key of `IMPORTANCES`: which channels of a unit go first. `"taylor"` and `"hessian"` need `batches` and
            `attack`.
        batches (`Iterable[tuple[Tensor, Tensor]]`, *optional*):
            Calibration sets `(images [N, 3, H, W] in [0, 1], labels [N])`.
        attack ([`AttackConfig`], *optional*):
            Makes the adversarial images on which sensitivities and gradients are taken.
        max_ratio (`float`, *optional*, defaults to 0.85):
            Largest fraction of a unit's channels that may be removed, in (0, 1).
        min_channels (`int`, *optional*, defaults to 4):
            Fewest channels kept in a unit (a narrower unit keeps all), at least 1.
        round_to (`int`, *optional*, defaults to 1):
            Kept widths are multiples of this; a unit too narrow for one keeps all its channels.
        ignore (`Sequence[str]`, *optional*):
            Units to leave whole: unit names, or names of modules with a member inside, such as `"layer4"`.
        seed (`int`, *optional*, defaults to 0):
            Of random importances and of the attack's starts.

    Returns:
        [`PruningPlan`].

    Raises:
        ValueError: If an option is unknown or out of range, sensitivities are needed and neither `scores` nor `batches`
            with `attack` is given, weights are not finite, the model cannot be pruned rightly, or the target cannot be met
            (the message says the smallest fraction that can).
    """
    allocate, score_channels = get_allocation(allocation), get_importance(importance)
    _check_options(target, target_metric, combine, max_ratio, min_channels, round_to, seed)
    data_driven = importance in ("taylor", "hessian")
    sets = None if batches is None else list(batches)
    if (sets is None or attack is None) and ((allocation == "mrs" and scores is None) or data_driven):
        purpose = f"importance {importance!r}" if data_driven else "allocation 'mrs'"
        given = "batches and attack" if data_driven else "scores, or batches and attack to measure them on"
        raise ValueError(f"{purpose} needs {given}; none or only one was given.")
    check_finite_weights(model)
    graph = trace_units(model, example)
    free = _free_units(model, graph, ignore)
    before = graph.size({})
    options = {unit.name: _widths_allowed(unit.width, max_ratio, min_channels, round_to) for unit in free}
    _check_reachable(graph, options, target, target_metric)

    module_scores: dict[str, float] = {}
    unit_scores: dict[str, float] = {}
    measured = None
    if scores is not None or allocation == "mrs":
        if scores is None:
            groups = {unit.name: unit.members for unit in graph.units} if combine == "joint" else None
            scores = module_robustness_sensitivity(model, sets, attack, seed=seed, groups=groups)  # type: ignore[arg-type]
        module_scores, unit_scores = _scores_by_unit(model, graph, scores, combine)
        measured = _measurement(scores)
    importances = score_channels(
        model, graph.groups, _attacked(model, sets or (), attack, seed) if data_driven else (), seed
    )

    order = {unit.name: unit_scores.get(unit.name, 0.0) for unit in free}
    given_scores = {name: importances[name].tolist() for name in order} if allocation == "global" else order
    costs = {unit.name: graph.touching(unit, target_metric) for unit in free}
    free_widths = {unit.name: unit.width for unit in free}

    def widths_at(nominal: float) -> Widths:
        ratios = allocate(given_scores, free_widths, costs, nominal, max_ratio=max_ratio)
        return {name: _nearest(options[name], free_widths[name] * (1 - ratio)) for name, ratio in ratios.items()}

    widths = _meet_target(graph, options, widths_at, order, target * before[target_metric], target_metric, max_ratio)
    after = graph.size(widths)
    kept = {
        unit.name: _most_important(importances[unit.name].tolist(), widths.get(unit.name, unit.width))
        for unit in graph.units
    }
    return PruningPlan(
        target=float(target),
        target_metric=target_metric,
        allocation=allocation,
        combine=combine,
        importance=importance,
        max_ratio=float(max_ratio),
        min_channels=min_channels,
        round_to=round_to,
        ignore=tuple(ignore),
        seed=seed,
        units=graph.units,
        scores=unit_scores,
        module_scores=module_scores,
        ratios={unit.name: 1 - len(kept[unit.name]) / unit.width for unit in graph.units},
        kept=kept,
        before=before,
        after=after,
        achieved={metric: after[metric] / before[metric] for metric in METRICS},
        example_shape=(1, *example.shape[1:]),
        sensitivity=measured,
        versions=_versions(),
        weights_sha256=weights_sha256(model),
    )


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """
    Remove the channels that a plan does not keep, in place. What stays computes exactly what it computed before.

    Removal alone: it needs no data and repairs nothing. Everything is checked before the first cut. Parameters become new
    tensors, so make the optimizer afterwards; modes, devices, dtypes and gradients' flags stay.

    Args:
        model (`nn.Module`): the model that was planned on, or one of the same widths.
        plan ([`PruningPlan`]): what to keep.

    Returns:
        `nn.Module`: `model`.

    Raises:
        ValueError: If the model's units are not those of the plan.

    Warns:
        UserWarning: If the weights are not those that the plan was made on.
    """
    graph = trace_units(model, torch.zeros(plan.example_shape))
    check_fits(plan, graph)
    if weights_sha256(model) != plan.weights_sha256:
        warnings.warn(
            "the model's weights are not those that the plan was made on: its choice of channels may not suit them.",
            stacklevel=2,
        )
    import torch_pruning as tp

    cut: dict[tuple[str, str], Callable[[nn.Module, list[int]], nn.Module]] = {
        ("conv", "out"): tp.prune_conv_out_channels,
        ("conv", "in"): tp.prune_conv_in_channels,
        ("depthwise", "both"): tp.prune_depthwise_conv_out_channels,
        ("linear", "out"): tp.prune_linear_out_channels,
        ("linear", "in"): tp.prune_linear_in_channels,
        ("norm", "both"): tp.prune_batchnorm_out_channels,
    }
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # Each side of each layer is cut once, by indices into the dense layer, so no cut can shift another's indices.
    for (layer, side), indices in graph.removed_positions(plan.kept).items():
        cut[graph.layers[layer].kind, side](model.get_submodule(layer), indices)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    return refresh(model)


def check_fits(plan: PruningPlan, graph: UnitGraph) -> None:
    """Refuse a plan that was made for other units: a ValueError that names the first difference."""
    planned = {unit.name: (unit.width, unit.members) for unit in plan.units}
    present = {unit.name: (unit.width, unit.members) for unit in graph.units}
    for name in planned | present:
        if planned.get(name) != present.get(name):
            raise ValueError(
                f"the plan is not for this model: unit {name!r} is {_describe(planned.get(name))} in the plan and "
                f"{_describe(present.get(name))} in the model. Plan again with plan_pruning on this model."
            )


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_options(
    target: float, target_metric: str, combine: str, max_ratio: float, min_channels: int, round_to: int, seed: int
) -> None:
    for name, value in (("target", target), ("max_ratio", max_ratio)):
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < 1:
            hint = (
                " It is the fraction KEPT." if name == "target" else " It is the largest fraction REMOVED from a unit."
            )
            raise ValueError(f"{name} is {value!r}; it must be a number between 0 and 1, both excluded.{hint}")
    if target_metric not in METRICS:
        raise ValueError(f"target_metric is {target_metric!r}; known metrics: {', '.join(METRICS)}.")
    if combine not in (*COMBINERS, "joint"):
        raise ValueError(f"combine is {combine!r}; known: {', '.join(COMBINERS)}, joint.")
    for name, number, least in (("min_channels", min_channels, 1), ("round_to", round_to, 1), ("seed", seed, 0)):
        if not _is_int(number) or number < least:
            raise ValueError(f"{name} is {number!r}; an integer of at least {least} is needed.")


def _free_units(model: nn.Module, graph: UnitGraph, ignore: Sequence[str]) -> list[PruningUnit]:
    if isinstance(ignore, str):
        raise ValueError(f"ignore is {ignore!r}; a list of names is needed, such as [{ignore!r}].")
    known = {name for name, _ in model.named_modules()}
    if unknown := [name for name in ignore if name not in known]:
        units = ", ".join(unit.name for unit in graph.units)
        raise ValueError(f"ignore names {unknown[0]!r}, which is no unit and no module. Units: {units}.")
    return [
        unit
        for unit in graph.units
        if not any(member == name or member.startswith(f"{name}.") for name in ignore for member in unit.members)
    ]


def _widths_allowed(width: int, max_ratio: float, min_channels: int, round_to: int) -> list[int]:
    # The epsilon keeps 1 - 0.9 from asking for 11 of 100 channels.
    least = max(min_channels, -int(-(width * (1 - max_ratio) - 1e-9) // 1), 1)
    multiples = [kept for kept in range(round_to, width + 1, round_to) if kept >= least]
    return multiples or [width]


def _check_reachable(graph: UnitGraph, options: Mapping[str, list[int]], target: float, metric: str) -> None:
    smallest = graph.size({name: widths[0] for name, widths in options.items()})[metric] / graph.size({})[metric]
    if not options or smallest > 1.01 * target:
        raise ValueError(
            f"target {target:g} cannot be met: the smallest fraction of {metric} that can be kept is {smallest:.4f}. Raise "
            "target or max_ratio, lower min_channels or round_to, or ignore fewer units."
        )


def _nearest(options: Sequence[int], wanted: float) -> int:
    return min(options, key=lambda width: (abs(width - wanted), -width))


def _meet_target(
    graph: UnitGraph,
    options: Mapping[str, list[int]],
    widths_at: Callable[[float], Widths],
    order: Mapping[str, float],
    wanted: float,
    metric: str,
    max_ratio: float,
) -> Widths:
    """Bisect the nominal target between too little and too much, then walk from one to the other channel by channel."""
    small: Widths = {name: widths[0] for name, widths in options.items()}
    large: Widths = {name: widths[-1] for name, widths in options.items()}
    low, high = 1 - max_ratio, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        widths = widths_at(middle)
        if graph.size(widths)[metric] > wanted:
            high, large = middle, widths
        else:
            low, small = middle, widths
    steps = sorted(
        (rank, order[name], name, width)
        for name in large
        for rank, width in enumerate(sorted((w for w in options[name] if small[name] <= w < large[name]), reverse=True))
    )
    best, gap = dict(large), graph.size(large)[metric] - wanted
    current, blocked = dict(large), set()
    for _, _, name, width in steps:
        excess = graph.size(current | {name: width})[metric] - wanted
        if name in blocked:
            continue
        if abs(excess) < abs(gap):
            best, gap = current | {name: width}, excess
        if excess >= 0:
            current[name] = width
        else:
            blocked.add(name)
    return _nudged(graph, options, best, wanted, metric)


def _nudged(graph: UnitGraph, options: Mapping[str, list[int]], widths: Widths, wanted: float, metric: str) -> Widths:
    """Where wide steps left a gap, move single units to the next width while that brings the cost nearer."""
    while (gap := abs(graph.size(widths)[metric] - wanted)) > 0.005 * wanted:
        moves = [
            widths | {name: choices[position]}
            for name, choices in options.items()
            for position in (choices.index(widths[name]) - 1, choices.index(widths[name]) + 1)
            if 0 <= position < len(choices)
        ]
        best = min(moves, key=lambda move: abs(graph.size(move)[metric] - wanted), default=widths)
        if abs(graph.size(best)[metric] - wanted) >= gap:
            break
        widths = best
    return widths


def _scores_by_unit(
    model: nn.Module, graph: UnitGraph, scores: Mapping[str, float], combine: str
) -> tuple[dict[str, float], dict[str, float]]:
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


def _measurement(scores: Mapping[str, float]) -> dict[str, Any] | None:
    """What a SensitivityResult knows of how it was measured; nothing of a plain dict."""
    if not hasattr(scores, "settings"):
        return None
    return {"settings": scores.settings, "per_set": list(scores.per_set), "spearman": scores.spearman}  # type: ignore[attr-defined]


def _attacked(model: nn.Module, sets: Batches, attack: AttackConfig | None, seed: int) -> Batches:
    first = 0
    device = next(model.parameters()).device
    for images, labels in sets:
        assert attack is not None
        images, labels = images.to(device), labels.to(device)
        indices = range(first, first + len(images))
        start = keyed_start(images, indices, attack, seed) if attack.random_start else None
        first += len(images)
        yield pgd_attack(model, images, labels, attack, start=start), labels


def _most_important(importances: list[float], count: int) -> list[int]:
    ranked = sorted(range(len(importances)), key=lambda channel: (-importances[channel], channel))
    return sorted(ranked[:count])


def _versions() -> dict[str, str]:
    def version(distribution: str) -> str:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return "not installed"

    names = ("hf-mrpf", "torch", "timm", "transformers", "torch-pruning")
    return {name.replace("-", "_"): version(name) for name in names}


def _describe(unit: tuple[int, tuple[str, ...]] | None) -> str:
    return "absent" if unit is None else f"{unit[0]} channels wide with members {', '.join(unit[1])}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _mapping_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(isinstance(k, str) and fits(v) for k, v in value.items())


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(fits(entry) for entry in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_unit(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {field.name for field in fields(PruningUnit)}
        and _is_text(value["name"])
        and value["kind"] == "channels"
        and _is_int(value["width"])
        and value["width"] > 0
        and _list_of(_is_text)(value["members"])
        and _is_int(value["cost"])
    )


_TEXT = ("a string", _is_text)
_NUMBER = ("a number", _is_number)
_INTEGER = ("an integer", _is_int)
_NUMBERS = ("an object of numbers", _mapping_of(_is_number))
_INTEGERS = ("an object of integers", _mapping_of(_is_int))
_FIELD_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "target": _NUMBER,
    "target_metric": _TEXT,
    "allocation": _TEXT,
    "combine": _TEXT,
    "importance": _TEXT,
    "max_ratio": _NUMBER,
    "min_channels": _INTEGER,
    "round_to": _INTEGER,
    "ignore": ("a list of strings", _list_of(_is_text)),
    "seed": _INTEGER,
    "units": ("a list of units (name, kind 'channels', width, members, cost)", _list_of(_is_unit)),
    "scores": _NUMBERS,
    "module_scores": _NUMBERS,
    "ratios": _NUMBERS,
    "kept": ("an object of lists of integers", _mapping_of(_list_of(_is_int))),
    "before": _INTEGERS,
    "after": _INTEGERS,
    "achieved": _NUMBERS,
    "example_shape": (
        "four positive integers",
        lambda shape: _list_of(_is_int)(shape) and len(shape) == 4 and min(shape) > 0,
    ),
    "sensitivity": ("an object or null", lambda value: value is None or isinstance(value, Mapping)),
    "versions": ("an object of strings", _mapping_of(_is_text)),
    "weights_sha256": _TEXT,
}

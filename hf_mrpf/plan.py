"""The pruning plan: which channels stay, what led to it, and its JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .plan_fields import FIELD_TYPES, is_int
from .rounds import compose_kept, overall_target, shares_left
from .units import PruningUnit, UnitGraph, trace_units

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PruningPlan:
    """
    Which channels of which units stay, and all that led to it. Made by [`plan_pruning`], applied by [`prune`].

    Attributes:
        target (`float`): fraction of `target_metric` to keep, as asked for.
        target_metric (`str`): `"macs"`, `"params"` or `"latency"`.
        allocation, combine, importance (`str`): names of the functions used.
        max_ratio (`float`), min_channels (`int`), round_to (`int`), ignore (`tuple[str, ...]`), seed (`int`): settings.
        units (`tuple[PruningUnit, ...]`): all units of the model, in its order.
        scores (`dict[str, float]`): nats by unit; empty where the allocation reads none and none were given.
        module_scores (`dict[str, float]`): nats by module, where unit scores were combined from them.
        ratios (`dict[str, float]`): fraction of channels removed, by unit.
        kept (`dict`): channels kept, by unit: increasing indices into the model that was planned on. For attention and
            heads `{"heads": [...], "qk": [[...], ...], "v": [[...], ...]}`: heads, and of each kept head the channels
            of its queries and keys and those of its values.
        before, after (`dict[str, int]`): `"macs"` per image and `"params"` of the model before and after.
        achieved (`dict[str, float]`): fractions kept, `after / before`, and `"latency"` where it was measured.
        example_shape (`tuple[int, ...]`): shape of one input batch, `[1, 3, H, W]`.
        sensitivity (`dict`, *optional*): `settings`, `per_set` scores and mean `spearman` of the sets, where measured.
        versions (`dict[str, str]`): of the libraries that made the plan.
        weights_sha256 (`str`): of the weights that were planned on.
        dense_size (`dict[str, int]`, *optional*): where the model that was planned on had been pruned already, `"macs"`
            and `"params"` of the dense network that it came from; None for a dense one, or one whose past is not known.
        latency (`dict`, *optional*): where the target or `round_to` was found by measurement: `fraction`, the median
            over `rounds` of the pruned time as a fraction of the dense one's in the same round, and its `quartiles`;
            `milliseconds` of both, `batch_size`, `device`; `tried`, candidates of the search for the target in order,
            and `multiples`, what `round_to="auto"` compared (without `fraction`: not of equal size).

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
    kept: dict[str, Any]
    before: dict[str, int]
    after: dict[str, int]
    achieved: dict[str, float]
    example_shape: tuple[int, ...]
    sensitivity: dict[str, Any] | None
    versions: dict[str, str]
    weights_sha256: str
    dense_size: dict[str, int] | None = None
    latency: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        widths = {unit.name: unit.width for unit in self.units}
        kinds = {unit.name: unit.kind for unit in self.units}
        if len(widths) != len(self.units):
            raise ValueError("units: two units have one name.")
        for key in ("kept", "ratios"):
            if set(getattr(self, key)) != set(widths):
                raise ValueError(f"{key}: must name every unit once: {', '.join(widths)}.")
        for name, kept in self.kept.items():
            if kinds[name] == "channels":
                _check_indices(name, kept, widths[name])
                continue
            if not isinstance(kept, Mapping) or set(kept) != {"heads", "qk", "v"}:
                raise ValueError(f"kept: unit {name!r} is attention and needs an object of 'heads', 'qk' and 'v'.")
            heads = widths[name] if kinds[name] == "heads" else None
            _check_indices(name, kept["heads"], heads)
            for part in ("qk", "v"):
                if not isinstance(kept[part], list | tuple) or len(kept[part]) != len(kept["heads"]):
                    raise ValueError(f"kept: unit {name!r} needs one list of channels in {part!r} for each kept head.")
                for indices in kept[part]:
                    _check_indices(name, indices, widths[name] if kinds[name] == "attention" else None)
            if len({len(indices) for part in ("qk", "v") for indices in kept[part]}) != 1:
                raise ValueError(f"kept: every head of unit {name!r} needs the same number of channels.")

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
        if set(values) == {"rounds", "kept"}:
            return cls._from_rounds(values, source)
        return cls._from_single(values, source)

    @classmethod
    def _from_rounds(cls, values: Mapping[str, Any], source: str) -> "PruningPlan":
        if not isinstance(values["rounds"], list) or not values["rounds"]:
            raise ValueError(f"{source}: key 'rounds' must be a list of plans.")
        if values["kept"] is None:
            raise ValueError(
                f"{source}: its rounds cut units in ways that no single plan has. Make a plan of each entry of "
                "'rounds' with PruningPlan.from_dict and apply them in order."
            )
        # Each is a plan by itself: rounds inside rounds are refused.
        plans = [
            cls._from_single(plan, f"{source}: round {number}") for number, plan in enumerate(values["rounds"], start=1)
        ]
        plan = cls.of_rounds(plans, source=source)
        if plan.to_dict()["kept"] != values["kept"]:
            raise ValueError(f"{source}: key 'kept' is not what the rounds leave of the first model.")
        return plan

    @classmethod
    def of_rounds(cls, plans: Sequence["PruningPlan"], *, source: str = "pruning plans") -> "PruningPlan":
        """
        One plan that removes at once what several removed one after another.

        Settings, scores and hash are the first one's: they are about the model that all indices are about. Target, kept
        channels and sizes are those that were reached in all; so is the latency, the product of what was measured.

        Args:
            plans (`Sequence[PruningPlan]`): in the order in which they were applied, at least one.
            source (`str`, *optional*, defaults to `"pruning plans"`): what error messages call them.

        Raises:
            ValueError: where a plan does not start from the units that the one before it has left. These change where a
                grouped convolution loses whole groups in one round and channels of every group in another.
        """
        if not plans:
            raise ValueError(f"{source}: there are none; at least one plan is needed.")
        first, last = plans[0], plans[-1]
        for number, (earlier, later) in enumerate(pairwise(plans), start=2):
            for unit in later.units:
                left = _width_left(unit, earlier.kept.get(unit.name))
                if unit.width != left:
                    raise ValueError(
                        f"{source}: round {number} starts from {unit.width} channels of unit {unit.name!r}, and the "
                        f"round before it left {left}, so no single plan leaves the same."
                    )
        try:
            kept = compose_kept([plan.kept for plan in plans])
            target, metric = overall_target(plans)
            achieved = shares_left(plans)
        except (ValueError, KeyError, ZeroDivisionError) as error:
            raise ValueError(f"{source}: the rounds do not go together ({error}).") from error
        ratios = {unit.name: removed_fraction(unit, kept[unit.name]) for unit in first.units}
        return replace(
            first,
            target=target,
            target_metric=metric,
            kept=kept,
            ratios=ratios,
            after=last.after,
            achieved=achieved,
            latency=first.latency if len(plans) == 1 else None,
        )

    @classmethod
    def _from_single(cls, values: Any, source: str) -> "PruningPlan":
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
            if name in ("dense_size", "latency") and name not in given:  # a plan of the first release
                continue
            if name not in given:
                raise ValueError(f"{source}: key {name!r} is missing.")
            what, fits = FIELD_TYPES[name]
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
        Read a plan that [`PruningPlan.save`] wrote, or the plans of several rounds, as the one of [`of_rounds`].

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: With the file and the key at fault.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: this is no JSON file ({error}).") from error
        return cls.from_dict(values, source=str(path))


def check_fits(plan: PruningPlan, graph: UnitGraph) -> None:
    """Refuse a plan that was made for other units: a ValueError that names the first difference."""
    planned = {unit.name: (unit.width, unit.members) for unit in plan.units}
    present = {unit.name: (unit.width, unit.members) for unit in graph.units}
    kinds = {unit.name: unit.kind for unit in plan.units}
    for name, attention in graph.attention.items():
        kept = plan.kept.get(name)
        if isinstance(kept, Mapping) and (
            kept["heads"][-1] >= attention.heads
            or max(indices[-1] for part in ("qk", "v") for indices in kept[part]) >= attention.dim
            or ("q" not in attention.rows and kept["qk"] != kept["v"])
            or (kinds.get(name) == "attention" and len(kept["heads"]) != attention.heads)
            or (kinds.get(name) == "heads" and len(kept["v"][0]) != attention.dim)
        ):
            raise ValueError(
                f"the plan is not for this model: unit {name!r} has {attention.heads} heads of {attention.dim} channels"
                f"{'' if 'q' in attention.rows else ', its keys and values go together'}. Plan again with plan_pruning."
            )
    for name in planned | present:
        if planned.get(name) != present.get(name):
            raise ValueError(
                f"the plan is not for this model: unit {name!r} is {_describe(planned.get(name))} in the plan and "
                f"{_describe(present.get(name))} in the model. Plan again with plan_pruning on this model."
            )


def removed_fraction(unit: PruningUnit, kept: Any) -> float:
    """Fraction of a unit's channels (those of one head, or heads) that are not in `kept`."""
    if unit.kind == "attention":
        kept = kept["v"][0]
    elif unit.kind == "heads":
        kept = kept["heads"]
    return 1 - len(kept) / unit.width


def _width_left(unit: PruningUnit, kept: Any) -> int:
    """How wide a unit of the next round is, by what the round before kept of it; 0 where that knew no such unit."""
    if isinstance(kept, Mapping):
        return len(kept["heads"] if unit.kind == "heads" else kept["v"][0])
    return len(kept or ())


def trace_for(plan: PruningPlan, model: nn.Module) -> UnitGraph:
    """The units of a model as the plan cuts them: channels of heads, or whole heads."""
    heads = any(unit.kind == "heads" for unit in plan.units)
    return trace_units(model, torch.zeros(plan.example_shape, device="cpu"), heads=heads, check=False)


def _describe(unit: tuple[int, tuple[str, ...]] | None) -> str:
    return "absent" if unit is None else f"{unit[0]} channels wide with members {', '.join(unit[1])}"


def _check_indices(name: str, indices: Any, width: int | None) -> None:
    given = isinstance(indices, list | tuple) and indices and all(is_int(index) for index in indices)
    if not given or list(indices) != sorted(set(indices)):
        raise ValueError(f"kept: unit {name!r} needs a non-empty list of increasing integers.")
    if indices[0] < 0 or (width is not None and indices[-1] >= width):
        most = "" if width is None else f" to {width - 1}"
        raise ValueError(f"kept: unit {name!r} has channels 0{most} only.")

"""Model cards: everything a card says in one typed object, a table for terminal and page, and a Jinja template."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .results import (
    METRIC_TITLES,
    ResultRow,
    accuracy_text,
    attack_title,
    markdown_table,
    measured,
    results_table,
    table_cells,
)
from .rounds import round_cells
from .tokens import without_tokens

__all__ = ["CardInfo", "PlanSummary", "ResultRow", "render_card", "results_table"]

TEMPLATE = Path(__file__).with_name("model_card_template.md")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class PlanSummary:
    """
    What the card says of a `PruningPlan`, see `from_plan`.

    Args:
        allocation (`str`), importance (`str`), target_metric (`str`), target (`float`):
            Settings of the plan; `target` is the fraction kept.
        achieved (`dict[str, float]`):
            Fraction kept, by metric.
        units (`list[dict]`):
            For each unit `name`, `width` (channels before), `removed` (fraction) and `score` (nats, or None).
        gamma (`float`, *optional*), spearman (`float`, *optional*):
            Radius of the weight perturbation, and agreement of the scores of disjoint calibration sets, where scores
            were measured.
        rounds (`int`, *optional*, defaults to `1`):
            How many times the model was pruned; units and scores are then those of the first round, all else is of all
            rounds together.
        of_last_round (`bool`, *optional*, defaults to `False`):
            Whether units, scores and what was removed are those of the last round, as there is no single plan that does
            the same as all.
        of_dense (`dict[str, float]`, *optional*):
            Where the model had been pruned before: fraction of the dense network kept in all, by metric.
        latency (`dict`, *optional*):
            `PruningPlan.latency`: how the fraction of the latency was measured.
    """

    allocation: str
    importance: str
    target_metric: str
    target: float
    achieved: dict[str, float]
    units: list[dict[str, Any]]
    gamma: float | None = None
    spearman: float | None = None
    rounds: int = 1
    of_last_round: bool = False
    of_dense: dict[str, float] | None = None
    latency: dict[str, Any] | None = None

    @classmethod
    def from_plan(cls, plan: Any, *, rounds: int = 1, of_last_round: bool = False) -> Self:
        """Take what the card needs of a `PruningPlan`; of several `rounds`, of the one plan that does the same."""
        sensitivity = plan.sensitivity or {}
        units = [
            {
                "name": unit.name,
                "width": unit.width,
                "removed": plan.ratios[unit.name],
                "score": plan.scores.get(unit.name),
            }
            for unit in plan.units
        ]
        return cls(
            allocation=plan.allocation,
            importance=plan.importance,
            target_metric=plan.target_metric,
            target=plan.target,
            achieved=dict(plan.achieved),
            units=units,
            gamma=sensitivity.get("settings", {}).get("gamma"),
            spearman=sensitivity.get("spearman"),
            rounds=rounds,
            of_last_round=of_last_round,
            of_dense=plan.dense_size and {name: plan.after[name] / size for name, size in plan.dense_size.items()},
            latency=plan.latency,
        )


@dataclass(frozen=True)
class CardInfo:
    """
    Everything a model card says, as JSON-ready values. Only the first two are needed: without rows and plan the card is
    the short one of a bare model push.

    Local paths and tokens in any text are shortened or masked by `render_card`.

    Args:
        model_name (`str`):
            Name of the model, without owner.
        backbone (`str`):
            Architecture, such as `"timm/resnet18"`.
        repo_id (`str`, *optional*):
            Hub id for the load snippet. Defaults to a placeholder.
        base_model (`str`, *optional*):
            Hub id of the model that training started from.
        image_size (`int`, *optional*), class_names (`list[str]`, *optional*):
            Facts about the model.
        dataset_id (`str`, *optional*), dataset_name (`str`, *optional*), dataset_config (`str`, *optional*),
        dataset_split (`str`, *optional*, defaults to `"test"`):
            Data set of the figures: Hub id or another short name, name to print, configuration, split.
        dataset_on_hub (`bool`, *optional*, defaults to `False`):
            Whether `dataset_id` is a data set on the Hub, to be linked from the card's metadata.
        rows (`list[ResultRow]`, *optional*):
            The results; the last row is the model that the card is of.
        control (`ResultRow`, *optional*):
            A model that was not trained against attacks, under the same one: what the attack alone is worth.
        plan (`PlanSummary`, *optional*):
            How it was pruned.
        of_dense (`dict[str, float]`, *optional*):
            Of a pruned model, what it keeps of its dense network, by metric; told where no `plan` tells it.
        rounds (`list[dict]`, *optional*):
            What each of several rounds of pruning left, as `rounds.round_rows` gives it.
        recovery (`str`, *optional*):
            What was done between the rounds, such as `"5 epochs of trades"`.
        pruning_steps (`dict[str, dict[str, float]]`, *optional*):
            `accuracy` and `robust_accuracy` on the validation split before and after each step of pruning, in the last
            round where there were several.
        selection (`dict[str, dict[str, float]]`, *optional*):
            `best` and `last` checkpoint of fine-tuning, with their validation figures.
        training (`dict[str, Any]`, *optional*):
            Settings of the fine-tuning, name to value.
        figure (`str`, *optional*):
            File name of the picture of the plan, beside the card.
        notes (`list[str]`, *optional*):
            What a reader of the figures must know, such as that the images are a JPEG-coded copy.
        limits (`list[str]`, *optional*):
            Further limits of this model, beside those of every card.
        versions (`dict[str, str]`, *optional*), seed (`int`, *optional*), command (`str`, *optional*):
            How to do it again.
        license (`str`, *optional*, defaults to `"apache-2.0"`):
            Licence id of the Hub.
    """

    model_name: str
    backbone: str
    repo_id: str | None = None
    base_model: str | None = None
    image_size: int | None = None
    class_names: list[str] = field(default_factory=list)
    dataset_id: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "test"
    dataset_on_hub: bool = False
    rows: list[ResultRow] = field(default_factory=list)
    control: ResultRow | None = None
    plan: PlanSummary | None = None
    of_dense: dict[str, float] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    recovery: str | None = None
    pruning_steps: dict[str, dict[str, float]] = field(default_factory=dict)
    selection: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    figure: str | None = None
    notes: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    command: str | None = None
    license: str = "apache-2.0"

    def __post_init__(self) -> None:
        if self.rows and not self.dataset_id:
            raise ValueError("rows are figures on a data set; give dataset_id (a Hub id, or a short name).")
        for name in ("base_model", "repo_id"):
            value = getattr(self, name)
            if value is not None and not HUB_ID.fullmatch(value):
                raise ValueError(f"{name} is {value!r}; it must look like a Hub id (owner/name), and be no path.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content; `from_dict` is the inverse."""
        return json.loads(json.dumps(asdict(self), allow_nan=False))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises a ValueError that names keys that are unknown."""
        if unknown := sorted(content.keys() - {item.name for item in fields(cls)}):
            raise ValueError(f"This is no card information: unknown keys {unknown}.")
        values = dict(content)
        values["rows"] = [ResultRow.from_dict(row) for row in content.get("rows", ())]
        values["control"] = ResultRow.from_dict(content["control"]) if content.get("control") else None
        values["plan"] = PlanSummary(**content["plan"]) if content.get("plan") else None
        return cls(**values)


def render_card(info: CardInfo) -> ModelCard:
    """
    Render the card of a model.

    Args:
        info ([`CardInfo`]):
            What it says.

    Returns:
        `huggingface_hub.ModelCard`: `card.save(path)` writes it, `card.validate()` asks the Hub whether it is valid.

    Raises:
        `ValueError`: the rows were measured in different ways and cannot stand in one table.
    """
    info = CardInfo.from_dict(_public(info.to_dict()))
    return ModelCard.from_template(
        _metadata(info),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        info=info,
        final=info.rows[-1] if info.rows else None,
        results=markdown_table(table_cells(info.rows)) if info.rows else "",
        measured=measured(info.rows[-1]) if info.rows else "",
        figures=_figures_text,
        units=markdown_table(_unit_cells(info.plan)) if info.plan else "",
        rounds=markdown_table(round_cells(info.rounds)) if info.rounds else "",
        rounds_measured=any(row["figures"] for row in info.rounds),
        steps_images=_images_text(info.pruning_steps),
        steps=markdown_table(_step_cells(info.pruning_steps)),
        selection=markdown_table(_step_cells(info.selection)),
        settings=markdown_table([["setting", "value"], *([key, str(value)] for key, value in info.training.items())]),
        kept=_kept_text(info.plan.achieved) if info.plan else "",
        kept_of_dense=_kept_text((info.plan.of_dense if info.plan else info.of_dense) or {}),
    )


def _unit_cells(plan: PlanSummary) -> list[list[str]]:
    table = [["unit", "channels", "MRS (nats)", "removed"]]
    for unit in plan.units:
        score = "" if unit["score"] is None else f"{unit['score']:.3g}"
        table.append([f"`{unit['name']}`", str(unit["width"]), score, f"{100 * unit['removed']:.0f} %"])
    return table


def _step_cells(steps: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    table = [["", "clean", "robust"]]
    for name, figures in steps.items():
        values = (_figure(figures, key) for key in ("accuracy", "robust_accuracy"))
        epoch = f" (epoch {figures['epoch']:g})" if "epoch" in figures else ""
        table.append([f"{name}{epoch}", *("" if value is None else f"{100 * value:.1f} %" for value in values)])
    return table


def _figure(figures: Mapping[str, float], key: str) -> float | None:
    """A figure by its own name, that of an evaluation, or that of the first of several splits."""
    of_splits = (
        value
        for name, value in figures.items()
        if name.startswith("eval_")
        and name.endswith(f"_{key}")
        and not name.endswith((f"_robust_{key}", f"_train_{key}"))
    )
    return figures.get(key, figures.get(f"eval_{key}", next(of_splits, None)))


def _metadata(info: CardInfo) -> ModelCardData:
    return ModelCardData(
        license=info.license,
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=info.base_model,
        datasets=[info.dataset_id] if info.dataset_on_hub and info.dataset_id else None,
        metrics=["accuracy"] if info.rows else None,
        model_name=info.model_name if info.rows else None,
        tags=["hf_mrpf", "adversarial-robustness", "pruning", "image-classification"],
        eval_results=_eval_results(info, info.rows[-1]) if info.rows else None,
    )


def _eval_results(info: CardInfo, row: ResultRow) -> list[EvalResult]:
    # The Hub merges results on one data set and keeps the data set's arguments of the first alone: everything that
    # tells two figures apart is in the metric's own name and arguments.
    results = []
    for name, accuracy in row.accuracies.items():
        low, high = row.intervals[name]
        arguments: dict[str, Any] = {"n": row.num_samples, "seed": row.seed, "wilson_95": [float(low), float(high)]}
        title = "Accuracy"
        if name != "clean":
            title = f"Robust accuracy ({attack_title(name, row.settings.get(name))}, {row.norm}, eps {row.eps:.4g})"
            arguments |= {"attack": name, "eps": float(row.eps), "norm": row.norm, **row.settings.get(name, {})}
        results.append(
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=str(info.dataset_id),
                dataset_name=info.dataset_name or str(info.dataset_id),
                dataset_config=info.dataset_config,
                dataset_split=info.dataset_split,
                metric_type="accuracy",
                metric_name=title,
                metric_value=float(accuracy),
                metric_args=arguments,
            )
        )
    return results


def _images_text(steps: Mapping[str, Mapping[str, float]]) -> str:
    counts = {int(figures["num_samples"]) for figures in steps.values() if "num_samples" in figures}
    return f" ({counts.pop()} images)" if len(counts) == 1 else ""


def _figures_text(row: ResultRow) -> str:
    titles = {name: f"under {attack_title(name, row.settings.get(name))}" for name in row.accuracies} | {
        "clean": "clean"
    }
    return " and ".join(f"{accuracy_text(row, name)} {titles[name]}" for name in row.accuracies)


def _kept_text(kept: Mapping[str, float]) -> str:
    return " and ".join(f"{100 * value:.1f} % of the {METRIC_TITLES.get(key, key)}" for key, value in kept.items())


def _public(value: Any) -> Any:
    """The same JSON value without tokens and with local paths cut down to their last part."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    value = without_tokens(value)
    return re.sub(r"(?<![\w:/.…])(?:~|\.{1,2}|[A-Za-z]:)?(?:[/\\][\w.+@-]+)+[/\\]([\w.+@-]+)", r"…/\1", value)

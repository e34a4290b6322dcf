"""One line a stage, `[stage] name=value ...`, of the same figures that its `stage.json` holds."""

import json
from collections.abc import Mapping
from typing import Any

from .plan import PruningPlan
from .report import RobustnessReport

WHOLE = {"macs": 1.0, "params": 1.0}


def stage_line(stage: str, figures: Mapping[str, Any], note: str = "") -> str:
    """
    A stage in one line, for eyes and for `grep`.

    Args:
        stage (`str`): its name.
        figures (`Mapping[str, Any]`): numbers (shares and accuracies in [0, 1], times in seconds) and short texts.
        note (`str`, *optional*): words before the figures, such as `"kept from before"`.

    Returns:
        `str`: `[stage] note name=value name=value`; a text with blanks is in double quotes, None is left out.
    """
    pairs = (f"{name}={_text(value)}" for name, value in figures.items() if value is not None)
    return " ".join([f"[{stage}]", *([note] if note else []), *pairs])


def training_figures(objective: str, result: Mapping[str, Any], kept: Mapping[str, float] = WHOLE) -> dict[str, Any]:
    """
    What a training was and gave.

    Args:
        objective (`str`): its name.
        result (`Mapping[str, Any]`): `epochs`, and of a training `steps`, `seconds`, `resumed_from`, `warnings`, `best`
            and `last`, where there are such.
        kept (`Mapping[str, float]`, *optional*): `macs` and `params` as fractions of the dense model's.

    Returns:
        `dict[str, Any]`: `clean` and `robust` are validation accuracies of the best evaluation, that of `best_epoch`,
        or of the last where that was `loaded`; `last_robust` that of the last; `overfitting` is what was noticed.
    """
    last = result.get("last") or {}
    best = last if result.get("loaded") == "last" else result.get("best") or {}
    kinds = [warning["kind"] for warning in result.get("warnings", ())]
    return {
        "objective": objective if result["epochs"] else None,
        "epochs": result["epochs"],
        "steps": result.get("steps"),
        "seconds": result.get("seconds"),
        "resumed_from": result.get("resumed_from"),
        **kept,
        "clean": best.get("eval_accuracy"),
        "robust": best.get("eval_robust_accuracy"),
        "best_epoch": None if result.get("loaded") == "last" else best.get("epoch"),
        "last_robust": last.get("eval_robust_accuracy"),
        "overfitting": "+".join(kinds) or None,
        "start": result.get("start"),
    }


def pruning_figures(plan: PruningPlan, result: Mapping[str, Any], dense: Mapping[str, int]) -> dict[str, Any]:
    """
    What a pruning kept and cost.

    Args:
        plan ([`PruningPlan`]): the plan that was applied.
        result (`Mapping[str, Any]`): `seconds`, and `steps`, the trainer's `pruning_report`.
        dense (`Mapping[str, int]`): `macs` and `params` of the dense model, that before the first round.

    Returns:
        `dict[str, Any]`: `macs` and `params` as fractions of the dense model's; where it was measured, `latency` as one
        of the model's that this round began with, the quartiles of its rounds, and what widths are multiples of;
        `clean` and `robust` are validation accuracies after the last step, `<step>_robust` those after each one before.
    """
    steps = list(result["steps"].items())
    last = steps[-1][1] if steps else {}
    latency = {}
    if plan.latency is not None:
        low, high = plan.latency["quartiles"]
        latency = {"latency": plan.latency["fraction"], "latency_quartiles": f"{low:.4f}..{high:.4f}"}
        latency |= {"latency_batch_size": plan.latency["batch_size"], "round_to": plan.round_to}
    return {
        "allocation": plan.allocation,
        "seconds": result["seconds"],
        **{name: plan.after[name] / dense[name] for name in WHOLE},
        **latency,
        "clean": last.get("accuracy"),
        "robust": last.get("robust_accuracy"),
        **{f"{step}_robust": figures["robust_accuracy"] for step, figures in steps[:-1]},
    }


def pruned_before(result: Mapping[str, Any] | None) -> dict[str, float]:
    """`macs` and `params` kept by the pruning of which this is the `stage.json`; nothing where it does not say."""
    figures = (result or {}).get("figures", {})
    return {name: figures[name] for name in WHOLE if name in figures}


def evaluation_figures(model: str, report: RobustnessReport) -> dict[str, Any]:
    """A model's accuracies on the test images, clean and by attack."""
    return {"model": model, "n": report.num_samples, "clean": report.clean_accuracy, **report.attacks}


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = str(value)
        return text if text and not any(letter.isspace() or letter in '"=' for letter in text) else json.dumps(text)
    return str(value) if isinstance(value, int) else f"{value:.4f}".rstrip("0").rstrip(".")

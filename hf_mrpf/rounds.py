"""Pruning in several rounds: what each of them aims at, and what they keep together. Pure functions, no tensor."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# A round whose aim is met before it starts still needs a fraction below 1; nearest widths then remove nothing.
ALMOST_ALL = 0.999


def fraction_after(target: float, number: int, rounds: int) -> float:
    """Fraction of the dense model's cost to be kept after round `number` (1 to `rounds`): steps of equal proportion."""
    return target ** (number / rounds)


def round_target(target: float, number: int, rounds: int, kept: float) -> float:
    """
    The fraction that one round keeps of the model which it starts from.

    What earlier rounds kept is taken as it was measured, so that whole channels which missed one round's aim are made
    up for in the next, and the last round meets `target` itself.

    Args:
        target (`float`):
            Fraction of the dense model's cost to keep in the end, in (0, 1).
        number (`int`), rounds (`int`):
            Which round this is, from 1, and how many there are.
        kept (`float`):
            Fraction of the dense model's cost that the rounds before have left; 1 before the first.

    Returns:
        `float`: in (0, 1); close to 1 where earlier rounds went beyond this one's aim.

    Raises:
        ValueError: for a round that there is not.
    """
    if not 1 <= number <= rounds:
        raise ValueError(f"round {number} of {rounds}: rounds are counted from 1 to {rounds}.")
    wanted = fraction_after(target, number, rounds) / kept
    return wanted if wanted < 1 else ALMOST_ALL


def share_left(plans: Sequence[Any], metric: str) -> float:
    """Fraction of the first model's `metric` that plans leave, applied in order; all of it where there are none."""
    if not plans:
        return 1.0
    if metric == "latency":  # measured beside the model that each round began with
        return math.prod(plan.achieved[metric] for plan in plans)
    return plans[-1].after[metric] / plans[0].before[metric]


def shares_left(plans: Sequence[Any]) -> dict[str, float]:
    """[`share_left`] of every metric that all of at least one plan know."""
    timed = all("latency" in plan.achieved for plan in plans)
    return {name: share_left(plans, name) for name in (*plans[-1].after, *(("latency",) if timed else ()))}


def overall_target(plans: Sequence[Any]) -> tuple[float, str]:
    """
    Fraction of the first model that plans, applied in order, were to keep in the end, and its metric.

    Where the last one aims at a latency and an earlier one has none, it is what they keep of the multiply-accumulates.
    """
    *earlier, last = plans
    if last.target_metric == "latency" and any("latency" not in plan.achieved for plan in earlier):
        return share_left(plans, "macs"), "macs"
    return last.target * share_left(earlier, last.target_metric), last.target_metric


def stage_names(rounds: int) -> list[tuple[str, str]]:
    """Names of the stages of each round: that of its pruning, that of the training after it."""
    earlier = [(f"pruned-{number}", f"recovered-{number}") for number in range(1, rounds)]
    return [*earlier, ("pruned", "fine-tuned")]


def compose_kept(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    What rounds of pruning keep of the model that the first one started from.

    Args:
        rounds (`Sequence[Mapping]`):
            `kept` of each round, as in [`PruningPlan`]: each indexes what the round before has left.

    Returns:
        `dict`: `kept` of one removal that leaves the same.

    Raises:
        ValueError: where a round has other units than the one before, or names a channel that was gone.
    """
    kept = dict(rounds[0])
    for number, later in enumerate(rounds[1:], start=2):
        if differing := sorted(kept.keys() ^ later.keys()):
            raise ValueError(f"round {number} and those before it have not the same units: {differing[0]!r}.")
        try:
            kept = {unit: _composed(before, later[unit]) for unit, before in kept.items()}
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"round {number} keeps channels that the rounds before it did not leave.") from error
    return kept


def round_rows(plans: Sequence[Any], figures: Sequence[Mapping[str, Mapping[str, float]]] = ()) -> list[dict[str, Any]]:
    """
    What a card says of each round, as JSON values.

    Args:
        plans (`Sequence[PruningPlan]`):
            Those that were applied, in order.
        figures (`Sequence[Mapping]`, *optional*):
            For each round `"pruned"` and `"trained"`, with `accuracy` and `robust_accuracy` on the validation split
            before and after the training that followed, as far as they were measured.

    Returns:
        `list[dict]`: for each round `after` (sizes), `kept` (fractions of the first model) and its `figures`.
    """
    first = plans[0].before
    measured = figures or [{} for _ in plans]
    return [
        {
            "after": dict(plan.after),
            "kept": {name: size / first[name] for name, size in plan.after.items()},
            "figures": {name: dict(values) for name, values in own.items()},
        }
        for plan, own in zip(plans, measured, strict=True)
    ]


def round_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of the table of rounds, heading first; what was not measured is blank, a column of blanks left out."""
    heading, columns = ["round"], [[str(number) for number in range(1, len(rows) + 1)]]
    for name, title in (("macs", "MACs"), ("params", "parameters")):
        heading.append(title)
        columns.append([f"{row['after'][name]:,} ({100 * row['kept'][name]:.1f} %)" for row in rows])
    for stage in ("pruned", "trained"):
        for name, title in (("accuracy", "clean"), ("robust_accuracy", "robust")):
            values = [row["figures"].get(stage, {}).get(name) for row in rows]
            if any(value is not None for value in values):
                heading.append(f"{stage}: {title}")
                columns.append(["" if value is None else f"{100 * value:.1f} %" for value in values])
    return [heading, *map(list, zip(*columns, strict=True))]


def _composed(before: Any, after: Any) -> Any:
    """Indices `after` into the entries of `before`; for attention, heads first and then the channels of each."""
    if not isinstance(before, Mapping):
        return [before[index] for index in after]
    heads = after["heads"]
    parts = {
        part: [
            [before[part][head][index] for index in indices] for head, indices in zip(heads, after[part], strict=True)
        ]
        for part in ("qk", "v")
    }
    return {"heads": [before["heads"][head] for head in heads]} | parts

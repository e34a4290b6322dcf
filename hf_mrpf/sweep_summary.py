"""What the table of a sweep says of several seeds: means, spreads, differences by seed; and tables of them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import attack_title, markdown_table
from .sweep import TITLES, Cell
from .sweep_config import DENSE_AXES
from .sweep_table import Row

ROBUST = "pgd20"
# The model that each kind of cell is about, in its results.
MODEL_OF = {"dense": "dense", "pruned": "fine-tuned", "dense-longer": "dense", "from-scratch": "dense"}


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (of a sample; None for a single value) and values of what was measured several times."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of at least one value."""
        found = tuple(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, found)

    def text(self, sign: bool = False) -> str:
        """`45.4 ± 0.8`; without the spread where there is none."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:{'+' if sign else ''}.1f}{spread}"


def rows_of(cells: Iterable[Cell], finished: Mapping[str, Row]) -> list[Row]:
    """
    The finished rows of these cells, in their order, one for each place that a run has in the grid.

    Axes and starts are those of the cells: another sweep may have written the row, under labels of its own.
    """
    rows = []
    for cell in cells:
        if cell.name in finished:
            start = {"start": cell.start.name} if cell.start else {}
            rows += [finished[cell.name] | {"axes": axes} | start for axes in (cell.axes, *cell.others)]
    return rows


def percent(row: Row, attack: str, model: str | None = None) -> float:
    """Accuracy of a row's model, in percent."""
    return 100 * row["results"]["models"][model or MODEL_OF[row["kind"]]][attack]


def removed(row: Row) -> float:
    """What a pruned row's model has lost of the metric of its target, in percent of the dense one, as measured."""
    metric = row["settings"].get("target_metric", "macs")
    return 100 * (1 - row["results"]["kept"][metric])


def grouped(rows: Iterable[Row], axes: Sequence[str]) -> dict[tuple, list[Row]]:
    """Rows that agree in `axes`, by their values of them, in order of appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["axes"].get(axis) for axis in axes), []).append(row)
    return groups


def agreeing(rows: Iterable[Row], axes: Sequence[str], values: tuple) -> list[Row]:
    """Rows with these values of `axes`; a dense model or its control, which has fewer axes, agrees in those it has."""
    wanted = dict(zip(axes, values, strict=True))
    return [row for row in rows if all(row["axes"].get(axis, label) == label for axis, label in wanted.items())]


def varying(rows: Iterable[Row], *but: str) -> list[str]:
    """The axes in which rows differ, but for the seed and those named."""
    return differing((row["axes"] for row in rows), *but)


def differing(places: Iterable[Mapping[str, Any]], *but: str) -> list[str]:
    """The axes in which places of a grid differ, but for the seed and those named."""
    values: dict[str, set] = {}
    for place in places:
        for axis, label in place.items():
            values.setdefault(axis, set()).add(label)
    return [axis for axis, found in values.items() if len(found) > 1 and axis not in ("seed", *but)]


def paired_by_seed(rows: Sequence[Row], others: Sequence[Row], attack: str) -> Spread | None:
    """
    Accuracy of `rows` minus that of `others`, in points, seed by seed; None where they have no seed in common.

    Raises:
        ValueError: where two rows of one seed are of different images, or a seed has several rows.
    """
    by_seed = {row["axes"].get("seed"): row for row in others}
    if len(by_seed) < len(others):
        raise ValueError("Rows that are compared with others by seed must have one row a seed.")
    pairs = [(row, by_seed[row["axes"].get("seed")]) for row in rows if row["axes"].get("seed") in by_seed]
    for row, other in pairs:
        if row["results"]["images"] != other["results"]["images"]:
            raise ValueError(f"{row['cell']} and {other['cell']} were measured on different images.")
    return Spread.of(percent(a, attack) - percent(b, attack) for a, b in pairs) if pairs else None


def summary_table(rows: Sequence[Row], *, against: Mapping[str, Any] | None = None) -> str:
    """
    The table of a sweep in Markdown: a block for each dense model with its controls, a line for each setting.

    Args:
        rows (`Sequence[Row]`): finished rows.
        against (`Mapping[str, Any]`, *optional*): values of axes that name, among the lines that else agree, the one
            that the others are compared with, seed by seed. Without it that is the dense model with the same extra
            epochs, where there is one.

    Returns:
        `str`: with a line below that says how it was measured; a sentence where there is nothing to show.
    """
    pruned = [row for row in rows if row["kind"] == "pruned"]
    if not pruned:
        return "No pruned cell has finished yet: there is nothing to show."
    shared = [axis for axis in varying(rows) if axis in DENSE_AXES]
    own = [axis for axis in varying(pruned) if axis not in DENSE_AXES]
    attacks = list(dict.fromkeys(("clean", ROBUST)))
    versus = TITLES["dense-longer"]
    if against:  # a number says nothing without its axis
        versus = ", ".join(label if isinstance(label, str) else f"{axis} {label}" for axis, label in against.items())
    heading = [*shared, *(own or ["model"]), *map(attack_title, attacks), "pruned only", "MACs", "parameters"]
    lines = [[*heading, f"{attack_title(ROBUST)} minus {versus}", "seeds"]]
    for label, block in grouped(rows, shared).items():
        cells = [row for row in block if row["kind"] == "pruned"]
        longer = [row for row in block if row["kind"] == "dense-longer"]
        scratch = grouped([row for row in block if row["kind"] == "from-scratch"], own)
        if cells:
            parents = {row["start"]: row for row in cells}
            lines.append(_line(label, ["dense"], own, list(parents.values()), attacks, model="dense"))
        if longer:
            lines.append(_line(label, [TITLES["dense-longer"]], own, longer, attacks))
        for values, group in grouped(cells, own).items():
            others = _reference(group, pruned, longer, against)
            lines.append(_line(label, values or ["pruned, fine-tuned"], own, group, attacks, others))
            if values in scratch:
                name = f"{' '.join(map(str, values))}: {TITLES['from-scratch']}".lstrip(" :")
                lines.append(_line(label, [name], own, scratch[values], attacks, others))
    return f"{markdown_table(lines)}\n\n{how_measured(pruned)}"


def how_measured(rows: Sequence[Row]) -> str:
    """On what, and under which attack, in one sentence."""
    return (
        f"Accuracies in percent on {images_of(rows)} images of the {rows[0]['results']['split']} split, "
        f"{attack_title(ROBUST)} at {balls_of(rows)}; mean ± standard deviation over seeds; differences in points, "
        f"seed by seed. `pruned only` is {attack_title(ROBUST)} before fine-tuning. MACs and parameters are measured, "
        "with their share of the dense."
    )


def balls_of(rows: Iterable[Row]) -> str:
    """The balls of the attacks: `linf eps 0.0314, l2 eps 0.5`."""
    found = sorted({(row["results"]["norm"], row["results"]["eps"]) for row in rows}, reverse=True)
    return ", ".join(f"{norm} eps {eps:.3g}" for norm, eps in found)


def images_of(rows: Iterable[Row]) -> str:
    """How many images accuracies are of: `1,000 or 10,000`."""
    return " or ".join(f"{count:,}" for count in sorted({row["results"]["num_samples"] for row in rows}))


def _reference(group: list[Row], pruned: list[Row], longer: list[Row], against: Mapping[str, Any] | None) -> list[Row]:
    if not against:
        return longer
    wanted = {axis: label for axis, label in group[0]["axes"].items() if axis != "seed"} | dict(against)
    return [row for row in pruned if all(row["axes"].get(axis) == label for axis, label in wanted.items())]


def _line(
    label: tuple,
    values: Iterable[Any],
    own: Sequence[str],
    rows: list[Row],
    attacks: Sequence[str],
    others: list[Row] | None = None,
    model: str | None = None,
) -> list[str]:
    names = [str(value) for value in values]
    names += [""] * (max(len(own), 1) - len(names))
    figures = [Spread.of(percent(row, attack, model) for row in rows).text() for attack in attacks]
    fine_tuned = rows[0]["kind"] == "pruned" and model is None
    pruned = Spread.of(percent(row, ROBUST, "pruned") for row in rows).text() if fine_tuned else ""
    costs = [_cost(rows, size, model) for size in ("macs", "parameters")]
    change = paired_by_seed(rows, others, ROBUST) if others and others[0]["cell"] != rows[0]["cell"] else None
    seeds = len({row["axes"].get("seed") for row in rows})
    gain = change.text(sign=True) if change else ""
    if change and len(change.values) < seeds:
        gain += f" ({len(change.values)} of {seeds} seeds)"  # where the other has not finished
    return [*map(str, label), *names, *figures, pruned, *costs, gain, str(seeds)]


def _cost(rows: list[Row], size: str, model: str | None) -> str:
    mean = statistics.fmean(row["results"]["models"][model or MODEL_OF[row["kind"]]][size] for row in rows)
    dense = [row["results"]["models"]["dense"][size] for row in rows if row["kind"] == "pruned" and model is None]
    share = f" ({100 * mean / statistics.fmean(dense):.1f} %)" if dense else ""
    text = f"{mean / 1e6:.3g} M" if mean >= 1e6 else f"{mean / 1e3:.3g} k"
    return f"{text}{share}"

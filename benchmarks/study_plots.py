"""Pictures of the rows of allocation_study.py: readable in print and with any colour vision."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_tables import (
    WAYS,
    Place,
    Row,
    differences,
    headroom_rows,
    interval,
    mean_robust,
    of,
    recovery_rows,
    rule_rows,
    select,
    standard_error,
)

from hf_mrpf.sweep_figures import COLOURS, MARKERS, STROKES

STEPS = (0, 20)
TRAINED = {0: "no training", 20: "20 steps"}
METRICS = {"macs": "MACs", "params": "parameters", "latency": "latency"}


def title(place: Place) -> str:
    """`narrow_vgg, 30 % of MACs`."""
    return f"{place[0]}, {100 * place[2]:g} % of {METRICS[place[1]]}"


def headroom(rows: list[Row], places: list[Place]) -> Figure | None:
    """Each random allocation minus `uniform`, by place and steps of training."""
    lines = []
    for place in places:
        for steps in STEPS:
            mine = headroom_rows(rows, place, steps)
            names = sorted({row["allocation"] for row in mine} - {"uniform"})
            if names and select(mine, allocation="uniform"):
                level = mean_robust(mine, "uniform")
                gains = [100 * (mean_robust(mine, name) - level) for name in names]
                lines.append((f"{title(place)}, {TRAINED[steps]}", steps, gains))
    if not lines:
        return None
    figure, axes = empty(1, width=7.5, height=1.2 + 0.34 * len(lines))
    panel = axes[0]
    for number, (_, steps, gains) in enumerate(lines):
        style = STEPS.index(steps)
        # Spread by rank, so that equal ones do not hide each other.
        spots = [number + 0.45 * (rank / max(1, len(gains) - 1) - 0.5) for rank in range(len(gains))]
        panel.plot(gains, spots, MARKERS[style], color=COLOURS[style], markersize=5, markerfacecolor="none")
    panel.set_yticks(range(len(lines)), [name for name, *_ in lines], fontsize=8)
    panel.set_ylim(len(lines) - 0.5, -0.5)
    zero(panel, "x")
    panel.set_xlabel("PGD-20 accuracy minus uniform (points)")
    panel.set_title("16 random allocations of equal cost, 2,000 validation images", fontsize=10)
    return figure


def rules(rows: list[Row], places: list[Place]) -> Figure | None:
    """Each rule minus `uniform`, with two standard errors, a panel for each place."""
    chosen = [place for place in places if any(line[1] is not None for line in rule_rows(rows, place))]
    if not chosen:
        return None
    columns = min(2, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure, axes = empty(len(chosen), width=1.2 + 4.2 * columns, height=0.4 + 3.9 * lines, columns=columns)
    for panel, place in zip(axes, chosen, strict=True):
        mine = select(of(rows, place), phase=("rules", "headroom"))
        found: dict[str, dict[int, tuple[float, float]]] = {}
        for name in sorted({row["allocation"] for row in select(mine, phase="rules")}):
            for steps in STEPS:
                own = select(mine, allocation=name, steps=steps)
                uniform = select(mine, allocation="uniform", steps=steps)
                if gained := differences(own, uniform):
                    found.setdefault(name, {})[steps] = fmean(gained), standard_error(own, uniform)
        names = sorted(found, key=lambda name: found[name][min(found[name])][0])
        for style, steps in enumerate(STEPS):
            spots = [(place, *found[name][steps]) for place, name in enumerate(names) if steps in found[name]]
            if spots:
                height, gains, errors = zip(*spots, strict=True)
                panel.errorbar(
                    gains, [place + 0.2 * style - 0.1 for place in height], xerr=[2 * error for error in errors],
                    fmt=MARKERS[style], color=COLOURS[style], label=TRAINED[steps], markersize=5, capsize=2,
                )  # fmt: skip
        panel.set_yticks(range(len(names)), names)
        zero(panel, "x")
        panel.set_xlabel("PGD-20 accuracy minus uniform (points)")
        panel.set_title(title(place), fontsize=10)
    known: dict[str, Any] = {}
    for panel in axes:
        known |= {name: mark for mark, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), frameon=False, ncols=2, loc="outside lower center")
    return figure


def recovery(rows: list[Row], places: list[Place]) -> Figure | None:
    """Accuracy against steps of fine-tuning, a line for each way."""
    chosen = [place for place in places if select(of(rows, place), phase="recovery")]
    if not chosen:
        return None
    figure, axes = empty(len(chosen), width=1.2 + 4.4 * len(chosen), height=3.8)
    for panel, place in zip(axes, chosen, strict=True):
        lines = recovery_rows(rows, place)
        for style, way in enumerate(WAYS):
            known = [(line[0], line[1 + style]) for line in lines if line[1 + style] is not None]
            if known:
                panel.plot(
                    *zip(*known, strict=True), marker=MARKERS[style], linestyle=STROKES[style], color=COLOURS[style],
                    label=way, markersize=5,
                )  # fmt: skip
        panel.set_xscale("symlog", linthresh=5)
        panel.set_xticks([line[0] for line in lines], [str(line[0]) for line in lines])
        panel.set_xlim(left=-0.5)
        panel.set_xlabel("steps of fine-tuning")
        panel.set_ylabel("PGD-20 accuracy (%)")
        panel.set_title(f"{title(place)}, uniform", fontsize=10)
        panel.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def primary(rows: list[Row], places: list[Place]) -> Figure | None:
    """What the study was about."""
    return on_test(rows, places, "primary")


def confirmation(rows: list[Row], places: list[Place]) -> Figure | None:
    """What the screening made likely."""
    return on_test(rows, places, "confirmation")


def on_test(rows: list[Row], places: list[Place], phase: str) -> Figure | None:
    """Each seed's gain over `uniform`, with the t-interval of their mean, a panel for each place."""
    found: dict[Place, dict[str, list[float]]] = {}
    for place in places:
        mine = select(of(rows, place), phase=phase)
        for arm in sorted({row["allocation"] for row in mine} - {"uniform"}):
            gained = differences(select(mine, allocation=arm), select(mine, allocation="uniform"))
            if len(gained) > 1:
                found.setdefault(place, {})[arm] = gained
    if not found:
        return None
    arms = max(map(len, found.values()))
    columns = min(2, len(found))
    lines = math.ceil(len(found) / columns)
    figure, axes = empty(len(found), 1.2 + 4.8 * columns, (1.6 + 0.6 * arms) * lines, columns=columns)
    for panel, (place, gains) in zip(axes, found.items(), strict=True):
        for height, values in enumerate(gains.values()):
            mean, half, _ = interval(values)
            panel.errorbar([mean], [height], xerr=[half], fmt=MARKERS[0], color=COLOURS[0], capsize=3)
            panel.plot(values, [height + 0.2] * len(values), "|", color=COLOURS[4], markersize=8)
        panel.set_yticks(range(len(gains)), list(gains))
        panel.set_ylim(-0.5, len(gains) - 0.3)
        zero(panel, "x")
        panel.set_xlabel("PGD-20 minus uniform (points): mean, 95 % interval, seeds", fontsize=8)
        seeds = max(map(len, gains.values()))
        panel.set_title(f"{phase}: {title(place)}, 20 steps,\n{seeds} seeds, all test images", fontsize=9)
    return figure


def empty(panels: int, width: float, height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of panels, in inches; side by side, or in so many columns."""
    figure, columns = Figure(figsize=(width, height), layout="constrained"), columns or panels
    places = [figure.add_subplot(math.ceil(panels / columns), columns, number + 1) for number in range(panels)]
    for panel in places:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, places


def zero(panel: Any, axis: str) -> None:
    """The line that `uniform` is."""
    line = panel.axvline if axis == "x" else panel.axhline
    line(0, color="0.5", linewidth=1, zorder=0)


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Writes `allocation_study_<what>.png`, of what there are rows of."""
    places = sorted({(row["network"], row["metric"], row["target"]) for row in rows}, reverse=True)
    written = []
    for picture in (headroom, rules, recovery, primary, confirmation):
        if figure := picture(rows, places):
            written.append(folder / f"allocation_study_{picture.__name__}.png")
            figure.savefig(written[-1], dpi=110)
    return written

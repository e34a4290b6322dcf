"""The figures of a sweep: readable in print and with any colour vision, means with their spread over seeds."""

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .results import METRIC_TITLES, attack_title
from .sweep import TITLES
from .sweep_config import DENSE_AXES
from .sweep_summary import (
    ROBUST,
    Spread,
    agreeing,
    balls_of,
    differing,
    grouped,
    images_of,
    percent,
    removed,
    varying,
)  # fmt: skip
from .sweep_table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito but yellow, which is too light for a line; black last, for the dense controls have it.
# Markers and strokes differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)))
CLEAN, UNDER_ATTACK = COLOURS[0], COLOURS[1]
PANEL = 3.6  # inches
ASIDE = 10  # points to the left of the dense model, at which the first control stands
NO_SENSITIVITIES = "No cell holds sensitivities of layers: let the sweep prune by the allocation mrs."


def sparsity_figure(rows: Sequence[Row], lines: Sequence[str]) -> "Figure":
    """
    Clean and robust accuracy against what was removed: a line for each value of the axes `lines`.

    A line begins at its dense model; a star set aside from there is that model after the same extra epochs, and hollow
    marks are shapes trained from scratch. What else differs but seed and target makes columns of panels, robust
    accuracy below.
    """
    pruned = _pruned(rows)
    across = varying(pruned, *lines, "target")
    panels, names = list(grouped(pruned, across)), list(grouped(pruned, lines))
    if len(panels) > 1:
        figure, axes = _panels(2, len(panels), sharex=True)
    else:  # side by side, as wide as a page
        figure, axes = _panels(1, 2)
        axes = axes.reshape(2, 1)
    for column, title in enumerate(panels):
        inside = agreeing(rows, across, title)
        for line, attack in enumerate(("clean", ROBUST)):
            panel = axes[line][column]
            for values, group in grouped(_of("pruned", inside), lines).items():
                _line(panel, group, attack, names.index(values), _words(values))
            _controls(panel, inside, lines, names, attack)
            panel.set_ylabel(f"{_accuracy(attack)} (%)" if column == 0 else "")
            if line == 0 or len(panels) == 1:
                panel.set_title(_words(title) or _common(pruned, *lines), fontsize=10)
            if line == 1 or len(panels) == 1:
                panel.set_xlabel(f"{_metrics(pruned)} removed (%)")
    _legend(figure)
    return _noted(figure, [row for row in rows if row["kind"] != "dense"], "mean ± standard deviation")


def dots_figure(rows: Sequence[Row], dots: str) -> "Figure":
    """
    Clean and robust accuracy for each value of the axis `dots`, in a grid of panels over the axes that else differ.

    Raises:
        ValueError: where more than two further axes differ, with their names.
    """
    pruned = _pruned(rows)
    further = further_axes([row["axes"] for row in pruned], dots)
    down, across = (further[:1], further[1:]) if len(further) == 2 else ([], further)
    panel_rows, panel_columns = list(grouped(pruned, down)), list(grouped(pruned, across))
    names = [values[0] for values in grouped(pruned, [dots])]
    height = 0.9 + 0.42 * len(names)
    figure, axes = _panels(len(panel_rows), len(panel_columns), height=height, sharex=True, sharey=True)
    for line, upper in enumerate(panel_rows):
        for column, left in enumerate(panel_columns):
            panel, inside = axes[line][column], agreeing(pruned, [*down, *across], (*upper, *left))
            for attack in ("clean", ROBUST):
                _dots(panel, inside, dots, names, attack)
            panel.set_title(_words((*upper, *left)) or _common(pruned, dots), fontsize=10)
            panel.set_yticks(range(len(names)), [str(name) for name in names])
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.set_xlabel("accuracy (%)" if line == len(panel_rows) - 1 else "")
    _legend(figure)
    return _noted(figure, pruned, "mean ± standard deviation")


def further_axes(places: Iterable[Mapping[str, Any]], dots: str) -> list[str]:
    """
    The axes of a grid that panels of dots are over.

    Raises:
        ValueError: where more than two differ, with their names.
    """
    further = differing(places, dots)
    if len(further) > 2:
        raise ValueError(f"A grid of panels has two axes, and {', '.join(further)} differ: pick values with --set.")
    return further


def layers_figure(rows: Sequence[Row], lines: Sequence[str]) -> "Figure":
    """
    Module Robustness Sensitivity of each layer on a log axis, from the input to the output: a line for each value of
    the axes `lines`, the geometric mean over seeds, with bars from the least to the greatest.

    A line is broken at a layer that its networks lack, and where the score is zero or less for some seed: a hollow mark
    below all others stands for it.

    Raises:
        ValueError: where no row holds sensitivities, which plans by `mrs` alone have.
    """
    pruned = [row for row in _pruned(rows) if row["results"].get("module_scores")]
    if not pruned:
        raise ValueError(NO_SENSITIVITIES)
    panels, names = grouped(pruned, varying(pruned, *lines)), list(grouped(pruned, lines))
    layers = max(len(row["results"]["module_scores"]) for row in pruned)
    figure, axes = _panels(1, len(panels), width=max(1.6 * PANEL, 1.2 + 0.19 * layers), height=4.2)
    for column, (title, inside) in enumerate(panels.items()):
        panel = axes[0][column]
        modules = list(dict.fromkeys(name for row in inside for name in row["results"]["module_scores"]))
        panel.set_yscale("log")
        floor = _floor(panel, inside)
        for values, group in grouped(inside, lines).items():
            _layers(panel, group, modules, names.index(values), _words(values), floor)
        panel.set_title(_words(title) or _common(pruned, *lines), fontsize=10)
        panel.set_xticks(range(len(modules)), [name.removeprefix("backbone.") for name in modules], rotation=90)
        panel.tick_params(axis="x", labelsize=8)
        panel.set_xlim(-0.7, len(modules) - 0.3)
        panel.set_xlabel("layer, from the input to the output")
        panel.set_ylabel("robust criticality, MRS (nats, log scale)" if column == 0 else "")
    _legend(figure)
    return _noted(figure, pruned, "geometric mean, bars from the least to the greatest,", accuracy=False)


def _line(panel: "Axes", group: list[Row], attack: str, style: int, label: str) -> None:
    parents = {row["start"]: percent(row, attack, "dense") for row in group}
    places, spreads = [0.0], [Spread.of(parents.values())]
    for same in grouped(group, ["target"]).values():
        places.append(statistics.fmean(removed(row) for row in same))
        spreads.append(Spread.of(percent(row, attack) for row in same))
    order = sorted(range(len(places)), key=places.__getitem__)
    _marks(
        panel, [places[i] for i in order], [spreads[i] for i in order], style, label, linestyle=_style(STROKES, style)
    )


def _controls(panel: "Axes", inside: list[Row], lines: Sequence[str], names: list[tuple], attack: str) -> None:
    from matplotlib.transforms import ScaledTranslation

    stars = grouped(_of("dense-longer", inside), [axis for axis in lines if axis in DENSE_AXES])
    panel.set_xmargin(0.05 + 0.05 * len(stars))
    for number, (values, group) in enumerate(stars.items()):
        point = Spread.of(percent(row, attack) for row in group)
        label = f"{_words(values)}: {TITLES['dense-longer']}".removeprefix(": ")
        # Beside the dense model, whose bar would cover the star's.
        aside = ScaledTranslation(-ASIDE * (number + 1) / 72, 0, panel.figure.dpi_scale_trans)
        panel.errorbar(
            [0], [point.mean], yerr=point.deviation, fmt="*", color="black", markersize=11, label=label, zorder=5,
            markerfacecolor=_style(("black", "white", "0.6"), number), capsize=2.5, transform=panel.transData + aside,
        )  # fmt: skip
        # The limits of a panel follow no bar that is moved.
        panel.update_datalim([(0, point.mean + sign * (point.deviation or 0.0)) for sign in (-1, 1)])
    pruned = {row["cell"]: row for row in _of("pruned", inside)}
    for values, group in grouped(_of("from-scratch", inside), lines).items():
        known = [row for row in group if row["start"] in pruned]
        points = list(grouped(known, ["target"]).values())
        places = [statistics.fmean(removed(pruned[row["start"]]) for row in same) for same in points]
        spreads = [Spread.of(percent(row, attack) for row in same) for same in points]
        label = f"{_words(values)}: {TITLES['from-scratch']}"
        _marks(panel, places, spreads, names.index(values), label, linestyle="none", hollow=True)


def _dots(panel: "Axes", inside: list[Row], dots: str, names: list, attack: str) -> None:
    clean = attack == "clean"
    colour, shift = (CLEAN, -0.14) if clean else (UNDER_ATTACK, 0.14)
    for (name,), group in grouped(inside, [dots]).items():
        point = Spread.of(percent(row, attack) for row in group)
        panel.errorbar(
            [point.mean], [names.index(name) + shift], xerr=point.deviation, fmt="s" if clean else "o", color=colour,
            markerfacecolor="white" if clean else colour, capsize=2.5, markersize=6, label=_accuracy(attack),
        )  # fmt: skip
    parents = {row["start"]: percent(row, attack, "dense") for row in inside}
    if parents:
        stroke = "--" if clean else ":"
        panel.axvline(
            statistics.fmean(parents.values()), color=colour, linestyle=stroke, linewidth=1.3, zorder=0,
            label=f"dense, {_accuracy(attack)}",
        )  # fmt: skip


def _floor(panel: "Axes", rows: Iterable[Row]) -> float:
    """Where marks of scores of zero or less stand, for which a log axis has no place; its axis reaches down to them."""
    scores = [score for row in rows for score in row["results"]["module_scores"].values()]
    positive = [score for score in scores if score > 0]
    low, high = min(positive, default=1.0), max(positive, default=1.0)
    margin = max(1.4, (high / low) ** 0.07)
    if len(positive) < len(scores):
        panel.set_ylim(low / margin**2, high * margin)
        # No number beside the hollow marks, whose height means nothing.
        formatter = panel.yaxis.get_major_formatter()
        panel.yaxis.set_major_formatter(lambda value, _: formatter(value) if value > low / margin else "")
    return low / margin


def _layers(panel: "Axes", group: list[Row], modules: list[str], style: int, label: str, floor: float) -> None:
    found = [[row["results"]["module_scores"].get(name, math.nan) for row in group] for name in modules]
    # A line ends at what is not a number, and begins again after it.
    kept = [scores if all(score > 0 for score in scores) else [] for scores in found]
    means = [statistics.geometric_mean(scores) if scores else math.nan for scores in kept]
    below = [mean - min(scores, default=math.nan) for mean, scores in zip(means, kept, strict=True)]
    above = [max(scores, default=math.nan) - mean for mean, scores in zip(means, kept, strict=True)]
    bars = [[max(value, 0.0) for value in side] for side in (below, above)] if len(group) > 1 else None
    look = {"color": _style(COLOURS, style), "marker": _style(MARKERS, style), "markersize": 5}
    panel.errorbar(
        range(len(modules)), means, yerr=bars, linestyle=_style(STROKES, style), linewidth=1.2, capsize=2, label=label,
        **look,
    )  # fmt: skip
    if rest := [place for place, scores in enumerate(found) if any(score <= 0 for score in scores)]:
        (dots,) = panel.plot(rest, [floor] * len(rest), linestyle="none", label="zero or less for some seed", **look)
        dots.set_markerfacecolor("white")


def _marks(
    panel: "Axes",
    places: Sequence[float],
    spreads: Sequence[Spread],
    style: int,
    label: str,
    *,
    linestyle: Any,
    hollow: bool = False,
) -> None:
    colour = _style(COLOURS, style)
    # Where there is one seed no bar is drawn: one of no length would say that seeds agree.
    bars = [math.nan if spread.deviation is None else spread.deviation for spread in spreads]
    panel.errorbar(
        places, [spread.mean for spread in spreads], yerr=bars,
        color=colour, marker=_style(MARKERS, style), linestyle=linestyle, capsize=2.5, markersize=7 if hollow else 5.5,
        linewidth=1.4, markerfacecolor="white" if hollow else colour, label=label,
    )  # fmt: skip


def _panels(
    down: int, across: int, *, width: float = PANEL, height: float = 0.78 * PANEL, **shared: Any
) -> tuple["Figure", Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install hf-mrpf[plots]") from error
    figure = Figure(figsize=(0.6 + width * across, 1.2 + height * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **shared)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.88", linewidth=0.7)
        panel.set_axisbelow(True)
    return figure, axes


def _legend(figure: "Figure") -> None:
    """What is in any panel, once: the dots of one series are drawn one by one."""
    found = [panel.get_legend_handles_labels() for panel in figure.axes]
    once = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    widest = 0.6 + 0.075 * max(map(len, once))  # inches, for the mark and for letters of 9 points
    columns = max(1, min(len(once), int(figure.get_figwidth() / widest)))
    figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=columns, fontsize=9, frameon=False)


def _noted(figure: "Figure", rows: Sequence[Row], spread: str, *, accuracy: bool = True) -> "Figure":
    axes = sorted({axis for row in rows for axis in row["axes"]} - {"seed"})
    points = [each for kind in {row["kind"] for row in rows} for each in grouped(_of(kind, rows), axes).values()]
    least, most = (pick(len(each) for each in points) for pick in (min, max))
    seeds = f"{least} to {most} seeds" if least < most else f"{most} seeds"
    over = "one seed" if most == 1 else f"{spread} over {seeds}{', no bar where there is one' if least == 1 else ''}"
    ball = balls_of(rows)
    accuracies = f"n = {images_of(rows)} test images, {attack_title(ROBUST)} in {ball}; "
    tested = accuracies if accuracy else f"attacks in {ball}; "
    width = int(figure.get_figwidth() / 0.068)  # letters of 8.5 points
    figure.supxlabel(textwrap.fill(f"{tested}{over}", width), fontsize=8.5, color="0.3")
    return figure


def _pruned(rows: Iterable[Row]) -> list[Row]:
    found = _of("pruned", rows)
    if not found:
        raise ValueError("No pruned cell has finished yet: there is nothing to draw.")
    return found


def _of(kind: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _words(values: tuple) -> str:
    return ", ".join(str(value) for value in values)


def _common(rows: Sequence[Row], *but: str) -> str:
    """What a figure without panels is of: architecture and data, where they are named."""
    axes = [axis for axis in ("architecture", "data") if axis not in but]
    return _words(tuple(rows[0]["axes"][axis] for axis in axes if axis in rows[0]["axes"]))


def _accuracy(attack: str) -> str:
    return "clean accuracy" if attack == "clean" else f"{attack_title(attack)} accuracy"


def _metrics(rows: Iterable[Row]) -> str:
    found = dict.fromkeys(METRIC_TITLES[row["settings"].get("target_metric", "macs")] for row in rows)
    return " or ".join(found)


def _style(choices: Sequence[Any], number: int) -> Any:
    # From the eighth on a colour comes back, and with it another marker and another stroke.
    turn = 0 if choices is COLOURS else number // len(COLOURS)
    return choices[(number + turn) % len(choices)]


KINDS: dict[str, Callable[..., "Figure"]] = {
    "lines": sparsity_figure,
    "dots": dots_figure,
    "layers": layers_figure,
}

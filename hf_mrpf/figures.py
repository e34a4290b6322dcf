"""The picture of a pruning plan: how critical each unit is, and how much of it was removed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .results import METRIC_TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermillion of Okabe and Ito: told apart with any colour vision, and by their grey level in print.
SCORE_COLOUR, RATIO_COLOUR = "#0072B2", "#D55E00"
LONGEST_NAME = 40


class Plan(Protocol):
    """What the picture reads of a `PruningPlan`."""

    units: Sequence[Any]  # PruningUnit, or a dict with "name" and "width"
    scores: Mapping[str, float] | None  # nats
    ratios: Mapping[str, float]  # fraction of channels removed
    achieved: Mapping[str, float]  # fraction kept, by metric


def plot_sensitivity(plan: Plan, path: str | Path) -> Path:
    """Draw a pruning plan and save the picture (`mrs.png`).

    Args:
        plan (`PruningPlan`):
            Plan to draw, with or without scores.
        path (`str` or `Path`):
            File to write in a folder that exists; the ending chooses the format (png, pdf, svg).

    Returns:
        `Path`: the file written.

    Raises:
        `ImportError`: matplotlib is missing (`pip install hf-mrpf[plots]`).
    """
    figure = sensitivity_figure(plan)
    figure.savefig(path, dpi=150)
    return Path(path)


def sensitivity_figure(plan: Plan) -> "Figure":
    """Lay out the picture: one row a unit from the input down to the output.

    The left panel holds the score in nats on a log axis (a hollow dot at the left where it is zero or less), the right
    panel the share of channels removed. Without any score, as in a uniform plan, the right panel stands alone. The
    height grows with the number of units, so that 50 read as well as 5.

    Returns:
        `matplotlib.figure.Figure`: not shown, not saved, and unknown to pyplot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install hf-mrpf[plots]") from error

    names = [_field(unit, "name") for unit in plan.units]
    if not names:
        raise ValueError("The plan holds no units, so there is nothing to draw.")
    labels = [f"{_shortened(name)}  ({_field(unit, 'width')})" for name, unit in zip(names, plan.units, strict=True)]
    scores = plan.scores or {}
    figure = Figure(figsize=(9, 1.5 + 0.24 * len(names)), layout="constrained")
    if any(name in scores for name in names):
        score_axes, ratio_axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
        _draw_scores(score_axes, names, scores)
    else:
        score_axes = ratio_axes = figure.subplots(1, 1)
    _draw_ratios(ratio_axes, [plan.ratios.get(name, 0.0) for name in names])
    score_axes.set_yticks(range(len(names)), labels)
    score_axes.set_ylim(len(names) - 0.5, -0.5)
    score_axes.text(-0.01, 1, "unit  (channels)", transform=score_axes.transAxes, ha="right", va="bottom")
    for axes in figure.axes:
        axes.tick_params(axis="y", length=0, pad=6)
        axes.tick_params(axis="x", labeltop=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="0.85")
        for row in range(0, len(names), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="0.955", zorder=0)
    kept = ", ".join(f"{value:.1%} of {METRIC_TITLES.get(key, key)}" for key, value in plan.achieved.items())
    figure.suptitle(f"Pruning plan: {kept} kept" if kept else "Pruning plan", fontsize=12)
    return figure


def _draw_scores(axes: "Axes", names: list[str], scores: Mapping[str, float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    # Dots, not bars: a log axis has no zero for a bar to start from.
    rows = {row: scores[name] for row, name in enumerate(names) if name in scores}
    positive = {row: score for row, score in rows.items() if score > 0}
    rest = [row for row in rows if row not in positive]
    low, high = min(positive.values(), default=1.0), max(positive.values(), default=1.0)
    margin = max(1.4, (high / low) ** 0.07)
    axes.set_xscale("log")
    axes.set_xlim(low / margin ** (2 if rest else 1), high * margin)
    # No number left of the hollow dots, whose place means nothing.
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value > low / margin else "")
    if not positive:
        axes.set_xticks([])
        axes.set_xticks([], minor=True)
    elif high / low < 30:  # one power of ten or none in sight
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("robust criticality, MRS (nats, log scale)")
    axes.plot(list(positive.values()), list(positive), "o", color=SCORE_COLOUR)
    if rest:
        (dots,) = axes.plot([low / margin] * len(rest), rest, "o", color=SCORE_COLOUR, label="zero or less")
        dots.set_markerfacecolor("white")
        axes.legend(loc="best", fontsize=8.5)


def _draw_ratios(axes: "Axes", ratios: list[float]) -> None:
    percent = [100 * ratio for ratio in ratios]
    bars = axes.barh(range(len(percent)), percent, height=0.68, color=RATIO_COLOUR)
    axes.bar_label(bars, [f"{value:.0f}" for value in percent], padding=3, fontsize=8.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("channels removed (%)")


def _field(unit: Any, name: str) -> Any:
    return unit[name] if isinstance(unit, Mapping) else getattr(unit, name)


def _shortened(name: str) -> str:
    """Both ends of a long name: the start says where in the network, the end which layer."""
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"

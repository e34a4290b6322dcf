"""The picture shows every unit's score and ratio, whatever is missing."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from hf_mrpf.figures import plot_sensitivity, sensitivity_figure

pytest.importorskip("matplotlib")


def _plan(count=4, scores=None, as_dicts=False):
    names = [f"layer1.{index}.conv1" for index in range(count)]
    units = [{"name": name, "width": 16 + index} for index, name in enumerate(names)]
    if scores is None:
        scores = {name: 10.0 ** (-index % 4) for index, name in enumerate(names)}
    return SimpleNamespace(
        units=units if as_dicts else [SimpleNamespace(**unit) for unit in units],
        scores=scores,
        ratios={name: index / count for index, name in enumerate(names)},
        achieved={"macs": 0.498, "params": 0.263},
    )


def _labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize("as_dicts", [True, False])
def test_both_panels_show_the_plan(as_dicts):
    plan = _plan(as_dicts=as_dicts)
    figure = sensitivity_figure(plan)
    scores, ratios = figure.axes
    assert scores.get_xscale() == "log" and "nats" in scores.get_xlabel()
    (dots,) = scores.get_lines()
    assert list(dots.get_xdata()) == list(plan.scores.values()) and list(dots.get_ydata()) == [0, 1, 2, 3]
    assert [bar.get_width() for bar in ratios.patches if bar.get_height() < 1] == [0, 25, 50, 75]
    assert ratios.get_xlim() == (0, 100) and ratios.get_xlabel() == "channels removed (%)"
    assert _labels(scores) == [f"layer1.{index}.conv1  ({16 + index})" for index in range(4)]
    bottom, top = scores.get_ylim()
    assert bottom > top, "the first unit stands at the top"
    assert scores.get_ylim() == ratios.get_ylim()
    assert figure.get_suptitle() == "Pruning plan: 49.8% of MACs, 26.3% of parameters kept"


@pytest.mark.parametrize("scores", [{}, {"another": 1.0}])
def test_without_scores_the_ratios_stand_alone(scores):
    (axes,) = sensitivity_figure(_plan(scores=scores)).axes
    assert axes.get_xlabel() == "channels removed (%)" and len(_labels(axes)) == 4


def test_scores_of_zero_are_hollow_and_inside_the_axis():
    names = [f"layer1.{index}.conv1" for index in range(3)]
    figure = sensitivity_figure(_plan(3, scores={names[0]: 0.5, names[1]: 0.0, names[2]: 0.02}))
    full, hollow = figure.axes[0].get_lines()
    assert list(full.get_ydata()) == [0, 2] and list(hollow.get_ydata()) == [1]
    assert hollow.get_markerfacecolor() == "white" and hollow.get_label() == "zero or less"
    assert figure.axes[0].get_legend() is not None
    low, _ = figure.axes[0].get_xlim()
    assert low < hollow.get_xdata()[0] < 0.02

    nothing = sensitivity_figure(_plan(3, scores=dict.fromkeys(names, 0.0))).axes[0]
    assert len(nothing.get_xticks()) == 0, "no tick may suggest a value"


def test_a_narrow_range_of_scores_still_has_numbers():
    names = [f"layer1.{index}.conv1" for index in range(3)]
    axes = sensitivity_figure(_plan(3, scores=dict(zip(names, (0.31, 0.42, 0.55), strict=True)))).axes[0]
    low, high = axes.get_xlim()
    visible = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert "0.3" in visible and "0.5" in visible


@pytest.mark.parametrize("count", [1, 50])
def test_every_label_is_legible(count):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = sensitivity_figure(_plan(count))
    FigureCanvasAgg(figure).draw()  # lays out
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes)), "labels overlap"
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.y1 <= figure.bbox.height for box in boxes), "labels are cut off"
    assert all(label.get_fontsize() >= 8 for label in figure.axes[0].get_yticklabels())


def test_long_names_keep_both_ends():
    plan = _plan(1)
    name = "backbone.encoder.layer.2.transformer.layer.0.attention.attention.query"
    plan.units[0].name, plan.ratios = name, {name: 0.5}
    (label,) = _labels(sensitivity_figure(plan).axes[0])
    assert label.startswith("backbone.encoder") and "…" in label and label.endswith("attention.query  (16)")
    assert len(label) < 50


def test_file_is_written_and_pyplot_untouched(tmp_path):
    from matplotlib import image, pyplot

    path = plot_sensitivity(_plan(6), tmp_path / "mrs.png")
    pixels = image.imread(path)
    assert path == tmp_path / "mrs.png" and pixels.shape[1] == 1350
    orange = np.abs(pixels[..., :3] - np.array([0xD5, 0x5E, 0x00]) / 255).max(-1) < 0.02
    blue = np.abs(pixels[..., :3] - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02
    assert orange.sum() > 1000 and blue.sum() > 100
    assert pyplot.get_fignums() == []


def test_bad_plans_and_a_missing_matplotlib(monkeypatch):
    with pytest.raises(ValueError, match="no units"):
        sensitivity_figure(_plan(0))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install hf-mrpf\[plots\]"):
        plot_sensitivity(_plan(), "mrs.png")

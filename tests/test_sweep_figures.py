"""What is drawn and printed of a sweep is what its rows say: means, spreads, controls, differences by seed."""

import math
import statistics

import pytest
from sweep_runs_made import GRID, MACS, PARAMETERS, made_rows

from hf_mrpf.sweep import sweep_cells
from hf_mrpf.sweep_config import read_config
from hf_mrpf.sweep_figures import COLOURS, MARKERS, STROKES, _style, dots_figure, layers_figure, sparsity_figure
from hf_mrpf.sweep_show import show_rows
from hf_mrpf.sweep_summary import Spread, paired_by_seed, rows_of, summary_table

pytest.importorskip("matplotlib")


@pytest.fixture
def made(tmp_path):
    """Config and finished rows of the grid, with changes."""

    def make(*overrides):
        (tmp_path / "grid.yaml").write_text(GRID)
        config = read_config(tmp_path / "grid.yaml", overrides=[f"output_dir={tmp_path}", *overrides])
        return config, made_rows(sweep_cells(config), tmp_path)

    return make


def containers(axes):
    """Places, means and half lengths of the bars of each series, by its label."""
    found = {}
    for series in axes.containers:
        line, _, bars = series
        places, means = list(line.get_xdata()), list(line.get_ydata())
        direction = 0 if series.has_xerr else 1
        # A bar that is not drawn has no ends.
        segments = [b for bar in bars for b in bar.get_segments()]
        lengths = [abs(b[1][direction] - b[0][direction]) / 2 if len(b) else None for b in segments]
        found.setdefault(series.get_label(), []).append((places, means, lengths, line))
    return found


def test_lines_go_from_the_dense_model_to_the_sparsest_with_the_spread_over_seeds(made):
    _, rows = made()
    figure = sparsity_figure(rows, ["importance"])
    clean, robust = figure.axes
    assert clean.get_title() == robust.get_title() == "narrow"
    assert clean.get_ylabel() == "clean accuracy (%)" and robust.get_ylabel() == "PGD-20 accuracy (%)"
    assert robust.get_xlabel() == "MACs removed (%)"
    ((places, means, lengths, line),) = containers(robust)["magnitude"]
    assert places == pytest.approx([0, 50, 75])
    # Seeds differ by 2 points in everything.
    assert means == pytest.approx([41, 36, 33.5])
    assert lengths == pytest.approx([statistics.stdev([0, 2])] * 3)
    ((_, other, _, second),) = containers(robust)["random"]
    assert other == pytest.approx([41, 31, 28.5])
    assert line.get_color() != second.get_color() and line.get_marker() != second.get_marker()
    assert line.get_linestyle() != second.get_linestyle()
    assert containers(clean)["magnitude"][0][1] == pytest.approx([82, 72, 67])


def test_controls_stand_beside_the_lines(made):
    _, rows = made()
    for row in rows:  # a bar that is longer than any other
        if row["kind"] == "dense-longer" and row["axes"]["seed"]:
            row["results"]["models"]["dense"]["clean"] += 0.2
    figure = sparsity_figure(rows, ["importance"])
    figure.canvas.draw()
    robust = containers(figure.axes[1])
    ((places, means, _, star),) = robust["dense, same extra epochs"]
    assert (places, means) == ([0], [pytest.approx(43)]) and star.get_marker() == "*"
    at, own = (line.get_transform().transform((0, 43)) for line in (star, robust["magnitude"][0][3]))
    assert own[0] - at[0] > 5 and own[1] == at[1], "set aside from the dense model, at its height"
    ((_, (mean,), (length,), _),) = containers(figure.axes[0])["dense, same extra epochs"]
    assert figure.axes[0].get_ylim()[0] < mean - length and mean + length < figure.axes[0].get_ylim()[1]
    ((places, means, _, hollow),) = robust["magnitude: shape from scratch, equal compute"]
    assert places == pytest.approx([50, 75]) and means == pytest.approx([36, 36])
    assert hollow.get_markerfacecolor() == "white" and hollow.get_linestyle() == "None"


def test_what_else_differs_makes_panels_and_one_seed_has_no_spread(made):
    _, rows = made("grid.allocation=[mrs, uniform]", "grid.seed=[0]")
    figure = sparsity_figure(rows, ["importance"])
    assert [panel.get_title() for panel in figure.axes] == ["mrs", "uniform", "", ""]
    assert figure.get_supxlabel().endswith("one seed")
    assert "n = 100 test images, PGD-20 in linf eps 0.1" in figure.get_supxlabel()
    ((_, _, lengths, _),) = containers(figure.axes[2])["magnitude"]
    assert lengths == [None] * 3


def test_a_point_of_one_seed_among_points_of_several_has_no_bar_and_the_caption_says_so(made):
    _, rows = made("grid.seed=[0, 1, 2]")
    lone = [row for row in rows if row["axes"]["seed"] == 0 or row["axes"].get("target") != 0.25]
    figure = sparsity_figure(lone, ["importance"])
    ((_, _, lengths, _),) = containers(figure.axes[1])["magnitude"]
    assert lengths[0] == lengths[1] == pytest.approx(2) and lengths[2] is None
    told = "mean ± standard deviation over 1 to 3 seeds, no bar where there is one"
    assert told in " ".join(figure.get_supxlabel().split())
    figure = dots_figure([row for row in lone if row["axes"].get("target") != 0.25], "importance")
    assert "over 3 seeds" in figure.get_supxlabel() and "no bar" not in figure.get_supxlabel()
    # A control that lacks a seed is a point as well.
    some = [row for row in rows if row["kind"] != "dense-longer" or row["axes"]["seed"] > 0]
    assert "over 2 to 3 seeds" in sparsity_figure(some, ["importance"]).get_supxlabel()


def test_every_norm_stands_with_its_own_radius(made):
    _, rows = made("grid.data={a: , b: {norm: l2, eps: 0.5}}", "controls={}")
    for row in rows:
        if row["axes"]["data"] == "b":
            row["results"].update(norm="l2", eps=0.5)
    assert "PGD-20 at linf eps 0.1, l2 eps 0.5; " in summary_table(rows)
    assert "in linf eps 0.1, l2 eps 0.5; " in " ".join(sparsity_figure(rows, ["importance"]).get_supxlabel().split())


def test_lines_of_two_axes_begin_at_dense_models_of_their_own(made):
    _, rows = made("grid.optim=[sgd, adam]", "grid.seed=[0]")
    for row in rows:
        if row["kind"] == "pruned" and row["axes"]["optim"] == "adam":
            row["results"]["models"]["dense"]["pgd20"] = 0.1
    robust = containers(sparsity_figure(rows, ["optim", "importance"]).axes[1])
    assert [robust[f"{optim}, random"][0][1][0] for optim in ("sgd", "adam")] == pytest.approx([40, 10])
    stars = [robust[f"{optim}: dense, same extra epochs"][0][3] for optim in ("sgd", "adam")]
    assert [star.get_markerfacecolor() for star in stars] == ["black", "white"]
    first, second = (star.get_transform().transform((0, 40))[0] for star in stars)
    assert first - second > 5, "both can be seen"


def test_dots_stand_in_a_grid_over_two_axes(made):
    _, rows = made("grid.data={digits: , letters: {dataset_name: emnist}}", "grid.target=[0.5]")
    figure = dots_figure(rows, "importance")
    assert [panel.get_title() for panel in figure.axes] == ["digits", "letters"]
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["magnitude", "random"]
    found = containers(panel)
    assert [point[0] for point, *_ in found["PGD-20 accuracy"]] == pytest.approx([36, 31])
    assert [point[0] for point, *_ in found["clean accuracy"]] == pytest.approx([72, 62])
    looks = {found[name][0][3].get_marker() for name in ("clean accuracy", "PGD-20 accuracy")}
    assert looks == {"s", "o"}
    _, rows = made("grid.data={digits: , letters: {dataset_name: emnist}}", "grid.allocation=[mrs, uniform]")
    with pytest.raises(ValueError, match=r"A grid of panels has two axes, and .*allocation.* differ"):
        dots_figure(rows, "importance")


def test_layers_stand_on_a_log_axis_from_input_to_output(made):
    _, rows = made("grid.importance=[magnitude]", "grid.target=[0.5]", "grid.data={digits: , letters: }")
    for row in rows:
        if row["kind"] == "pruned":
            factor = 4.0 if row["axes"]["seed"] else 1.0
            row["results"]["module_scores"] = {n: factor * s for n, s in row["results"]["module_scores"].items()}
            if row["axes"]["data"] == "letters":
                row["results"]["module_scores"]["layer1.conv"] = -0.1
    (panel,) = layers_figure(rows, ["data"]).axes
    assert panel.get_yscale() == "log" and "MRS (nats" in panel.get_ylabel()
    assert [label.get_text() for label in panel.get_xticklabels()] == ["layer0.conv", "layer1.conv", "layer2.conv"]
    found = containers(panel)
    ((places, means, lengths, _),) = found["digits"]
    assert places == [0, 1, 2] and means == pytest.approx([0.2, 0.02, 0.002]), "geometric mean of 1 and 4"
    assert lengths[0] == pytest.approx(0.15), "from the least, 0.1, to the greatest, 0.4"
    ((places, means, _, _),) = found["letters"]
    assert places == [0, 1, 2] and means == pytest.approx([0.2, math.nan, 0.002], nan_ok=True), "the line is broken"
    (hollow,) = [line for line in panel.lines if line.get_label() == "zero or less for some seed"]
    assert list(hollow.get_xdata()) == [1] and hollow.get_markerfacecolor() == "white"
    floor = hollow.get_ydata()[0]
    assert panel.get_ylim()[0] < floor < 0.001, "below all scores"
    told = panel.yaxis.get_major_formatter()
    assert told(floor, None) == "" and "10^{-2}" in told(0.01, None)
    # A layer that one network lacks is a break without a mark.
    for row in rows:
        if row["kind"] == "pruned" and row["axes"]["data"] == "letters":
            del row["results"]["module_scores"]["layer1.conv"]
    (panel,) = layers_figure(rows, ["data"]).axes
    assert containers(panel)["letters"][0][1] == pytest.approx([0.2, math.nan, 0.002], nan_ok=True)
    assert "zero or less for some seed" not in panel.get_legend_handles_labels()[1]
    for row in rows:
        row["results"].pop("module_scores", None)
    with pytest.raises(ValueError, match="allocation mrs"):
        layers_figure(rows, ["data"])


def test_nothing_is_cut_off_or_covers_another(made, tmp_path):
    _, rows = made("grid.importance=[magnitude, random, taylor, hessian, lamp, fisher]")
    _, other = made("grid.data={digits: , letters: {dataset_name: emnist}}", "grid.target=[0.5]")
    plans = [row for row in rows if row["axes"].get("importance") in (None, "magnitude")]
    for figure in (
        sparsity_figure(rows, ["importance"]),
        sparsity_figure(other, ["importance"]),
        dots_figure(other, "importance"),
        layers_figure(plans, ["target"]),
    ):
        figure.savefig(tmp_path / "figure.png")
        texts = [figure._supxlabel, *figure.legends[0].get_texts(), *(panel.title for panel in figure.axes)]
        texts += [panel.xaxis.label for panel in figure.axes] + [panel.yaxis.label for panel in figure.axes]
        for text in filter(lambda text: text.get_text(), texts):
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0, text.get_text()
            assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, text.get_text()
        legend = figure.legends[0].get_window_extent()
        assert not any(panel.get_window_extent().overlaps(legend) for panel in figure.axes)


def test_the_first_seven_series_differ_in_colour_marker_and_stroke():
    for choices in (COLOURS, MARKERS, STROKES):
        assert len(set(map(str, choices))) == 7
    looks = {tuple(str(_style(choices, number)) for choices in (COLOURS, MARKERS, STROKES)) for number in range(49)}
    assert len(looks) == 49, "further ones differ in two of the three"
    assert "#000000" not in COLOURS[:6], "the dense controls are black"
    # Of Okabe and Ito's palette, without its yellow.
    assert set(COLOURS) <= {"#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"}


def table_of(text):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return lines[0], lines[2:]


def test_a_table_has_the_dense_model_the_controls_and_every_setting(made):
    _, rows = made()
    heading, lines = table_of(summary_table(rows))
    assert heading[:4] == ["importance", "target", "clean", "PGD-20"]
    assert heading[-2:] == ["PGD-20 minus dense, same extra epochs", "seeds"]
    names = [tuple(line[:2]) for line in lines]
    assert names[:3] == [("dense", ""), ("dense, same extra epochs", ""), ("magnitude", "0.5")]
    assert names[3] == ("magnitude 0.5: shape from scratch, equal compute", "")
    assert len(lines) == 2 + 4 + 2
    first = dict(zip(heading, lines[2], strict=True))
    assert (first["clean"], first["PGD-20"], first["pruned only"]) == ("72.0 ± 2.8", "36.0 ± 1.4", "18.0 ± 0.7")
    assert (first["MACs"], first["parameters"]) == ("1 M (50.0 %)", "20 k (50.0 %)")
    assert (first[heading[-2]], first["seeds"]) == ("-7.0 ± 0.0", "2")
    assert lines[0][2:4] == ["82.0 ± 2.8", "41.0 ± 1.4"] and lines[0][-2] == ""
    assert (MACS, PARAMETERS) == (2_000_000, 40_000) and lines[0][5:7] == ["2 M", "40 k"]


def test_a_table_compares_with_the_line_that_else_agrees(made):
    _, rows = made("controls={}")
    heading, lines = table_of(summary_table(rows, against={"importance": "magnitude"}))
    changes = {tuple(line[:2]): line[-2] for line in lines}
    assert heading[-2] == "PGD-20 minus magnitude"
    assert changes[("random", "0.5")] == changes[("random", "0.25")] == "-5.0 ± 0.0"
    assert changes[("magnitude", "0.5")] == "" and changes[("dense", "")] == ""


def test_a_table_says_of_how_many_seeds_a_difference_is_where_the_other_line_has_fewer(made):
    _, rows = made("controls={}")
    some = [row for row in rows if row["axes"].get("importance") != "magnitude" or row["axes"]["seed"] == 0]
    _, lines = table_of(summary_table(some, against={"importance": "magnitude"}))
    changes = {tuple(line[:2]): line[-2:] for line in lines}
    assert changes[("random", "0.5")] == ["-5.0 (1 of 2 seeds)", "2"]


def test_a_table_compares_objectives_which_have_dense_models_of_their_own(made):
    _, rows = made("controls={}", "grid.objective=[trades, pgd]", "grid.target=[0.5]")
    for row in rows:
        if row["axes"]["objective"] == "pgd" and row["kind"] == "pruned":
            row["results"]["models"]["fine-tuned"]["pgd20"] += 0.01 * (1 + row["axes"]["seed"])
    heading, lines = table_of(summary_table(rows, against={"objective": "trades"}))
    assert heading[-2] == "PGD-20 minus trades"
    changes = {tuple(line[:2]): line[-2] for line in lines}
    assert changes[("pgd", "magnitude")] == "+1.5 ± 0.7" and changes[("trades", "magnitude")] == ""


def test_a_dense_model_of_two_objectives_stands_beside_both(made):
    config, rows = made("grid.objective=[trades, rslad]", "grid.target=[0.5]")
    found = rows_of(sweep_cells(config), {row["cell"]: row for row in rows})
    assert len(rows) == 4 + 8 + 4 and len(found) == len(rows) + 4
    _, lines = table_of(summary_table(found))
    dense = [line[0] for line in lines if line[1].startswith("dense")]
    assert dense == ["trades", "trades", "rslad", "rslad"]
    assert {line[-2] for line in lines if line[:2] == ["rslad", "random"]} == {"-12.0 ± 0.0"}
    stars = containers(sparsity_figure(found, ["objective", "importance"]).axes[1])
    assert {"trades: dense, same extra epochs", "rslad: dense, same extra epochs"} <= stars.keys()


def test_rows_of_another_sweep_have_the_labels_of_this_one(made, tmp_path):
    _, rows = made()
    text = GRID.replace("[magnitude, random]", "{magnitude: {importance: magnitude}, random: {importance: random}}")
    (tmp_path / "grid.yaml").write_text(
        text.replace("importance: {", "method: {", 1).replace("{importance: [", "{method: [")
    )
    cells = sweep_cells(read_config(tmp_path / "grid.yaml"))
    found = rows_of(cells, {row["cell"]: row for row in rows})
    assert len(found) == len(cells) == len(rows) and not any("importance" in row["axes"] for row in found)
    series = containers(sparsity_figure(found, ["method"]).axes[1])
    assert {"magnitude", "random"} <= series.keys() and "None" not in str(series.keys())
    heading, lines = table_of(summary_table(found, against={"method": "magnitude"}))
    assert {line[-2] for line in lines if line[0] == "random"} == {"-5.0 ± 0.0"} and heading[0] == "method"


def test_every_series_of_any_panel_is_in_the_legend(made):
    _, rows = made("grid.objective=[trades, pgd]")
    some = [row for row in rows if row["axes"].get("importance") != "random" or row["axes"]["objective"] == "pgd"]
    (legend,) = sparsity_figure(some, ["importance"]).legends
    assert {"magnitude", "random"} <= {text.get_text() for text in legend.get_texts()}


def test_differences_are_of_the_same_images(made):
    _, rows = made()
    pruned = [row for row in rows if row["kind"] == "pruned" and row["axes"]["target"] == 0.5]
    magnitude, random = (
        [row for row in pruned if row["axes"]["importance"] == name] for name in ("magnitude", "random")
    )
    assert paired_by_seed(magnitude, random, "pgd20").mean == pytest.approx(5)
    assert paired_by_seed(magnitude, [], "pgd20") is None
    with pytest.raises(ValueError, match="one row a seed"):
        paired_by_seed(magnitude, [*random, *random], "pgd20")
    random[0]["results"]["images"] = "others"
    with pytest.raises(ValueError, match="different images"):
        paired_by_seed(magnitude, random, "pgd20")


def test_a_spread_is_that_of_a_sample():
    spread = Spread.of([1.0, 2.0, 6.0])
    assert spread.mean == 3 and spread.deviation == pytest.approx(math.sqrt(7))
    assert spread.text() == "3.0 ± 2.6" and Spread.of([3.0]).text(sign=True) == "+3.0"


def test_files_are_named_after_the_sweep_and_missing_cells_left_out(made, tmp_path):
    config, rows = made()
    files, text = show_rows(config, rows)
    assert [file.name for file in files] == ["grid.png", "grid.pdf"] and text == ""
    assert all(file.stat().st_size > 5000 for file in files)
    config, rows = made("show={kind: table}", "name=some")
    cells = sweep_cells(config)
    some = [row for row in rows if row["axes"]["seed"] == 0 and row["axes"].get("importance") != "random"]
    found = rows_of(cells, {row["cell"]: row for row in some})
    files, text = show_rows(config, found)
    assert files == [tmp_path / "some.md"] and files[0].read_text() == text + "\n"
    assert "| 0.5 | 72.0 |" not in text and "| 0.5 | 70.0 | 35.0 |" in text and "random" not in text
    assert "nothing to show" in summary_table(rows[:1])

"""A grid becomes cells whose commands the recipes take; what they would refuse is refused before anything is run."""

import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from sweep_runs_made import GRID

from hf_mrpf.slurm import slurm_script
from hf_mrpf.sweep import check_cells, command, run_folder, shown, sweep_cells
from hf_mrpf.sweep_config import read_config
from hf_mrpf.sweep_show import check_show

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = sorted((REPOSITORY / "recipes" / "configs").glob("*.yaml"))


@pytest.fixture
def config(tmp_path):
    """Reads a file of this text, with changes."""

    def read(text=GRID, *overrides, small=False):
        file = tmp_path / "grid.yaml"
        file.write_text(text)
        return read_config(file, small=small, overrides=overrides)

    return read


def of(kind, cells):
    return [cell for cell in cells if cell.kind == kind]


def test_every_value_of_every_axis_meets_every_other_and_dense_models_are_shared(config):
    cells = sweep_cells(config())
    assert Counter(cell.kind for cell in cells) == {"dense": 2, "pruned": 8, "dense-longer": 2, "from-scratch": 4}
    assert len({cell.name for cell in cells}) == 16
    places = {cell.name: place for place, cell in enumerate(cells)}
    assert all(places[cell.start.name] < places[cell.name] for cell in cells if cell.start)
    axes = {(cell.axes["importance"], cell.axes["target"], cell.axes["seed"]) for cell in of("pruned", cells)}
    assert axes == {(i, t, s) for i in ("magnitude", "random") for t in (0.5, 0.25) for s in (0, 1)}
    for cell in of("pruned", cells):
        assert cell.start.kind == "dense" and cell.start.axes["seed"] == cell.axes["seed"]


def test_options_reach_the_recipe_that_knows_them(config):
    cells = sweep_cells(config())
    dense, pruned = of("dense", cells)[0], of("pruned", cells)[0]
    assert dense.options["num_train_epochs"] == 4 and pruned.options["num_train_epochs"] == 2
    assert dense.options["backbone_kwargs"] == {"layers": [1, 1]} and "calibration_sets" not in dense.options
    assert pruned.options["calibration_sets"] == 2
    # The shape comes with the saved model.
    assert not {"backbone_kwargs", "small_images", "model_name_or_path"} & set(pruned.options)
    words = pruned.arguments("out")
    assert words[:4] == ["--output_dir", f"out/runs/{pruned.name}", "--model_name_or_path", f"out/runs/{dense.name}"]
    line = shown(command(dense, "out", Path("recipes"), ["--num_processes", "1"]))
    assert line.startswith("accelerate launch --num_processes 1 recipes/train.py --output_dir out/runs/dense-")
    options = shlex.split(line)
    assert options[options.index("--backbone_kwargs") + 1] == '{"layers": [1, 1]}'
    assert options[options.index("--small_images") + 1] == "true"


def test_controls_train_for_what_the_pruned_one_took(config):
    cells = sweep_cells(config())
    longer, scratch = of("dense-longer", cells)[0], of("from-scratch", cells)[0]
    assert longer.start.kind == "dense" and longer.options["num_train_epochs"] == 2
    assert scratch.start.kind == "pruned" and scratch.options["fresh_weights"] is True
    assert (scratch.options["dense_epochs"], scratch.options["num_train_epochs"]) == (4.0, 2)
    assert longer.options["report_split"] == scratch.options["report_split"] == "test"
    assert {cell.axes["importance"] for cell in of("from-scratch", cells)} == {"magnitude"}
    check_cells(cells)


def test_a_distilled_grid_has_a_dense_model_and_controls_by_trades(config):
    cells = sweep_cells(config(GRID + "\n", "grid.objective=[rslad, pgd]", "grid.seed=[0]"))
    check_cells(cells)
    assert {cell.options["objective"] for cell in of("pruned", cells)} == {"rslad", "pgd"}
    assert {cell.options["objective"] for cell in cells if cell.recipe == "train"} == {"trades", "pgd"}


def test_a_run_at_several_places_of_the_grid_is_done_once(config):
    cells = sweep_cells(config(GRID, "grid.objective=[trades, rslad, mart]", "grid.seed=[0]", "grid.target=[0.5]"))
    assert len({cell.settings for cell in cells}) == len(cells)
    for kind in ("dense", "dense-longer"):
        assert [cell.axes["objective"] for cell in of(kind, cells)] == ["trades", "mart"]
        assert [[axes["objective"] for axes in cell.others] for cell in of(kind, cells)] == [["rslad"], []]
    names = {cell.name for cell in cells}
    assert all(cell.start.name in names for cell in cells if cell.start)


def test_a_name_is_that_of_the_settings_and_not_of_the_machine(config):
    def names(*overrides):
        return [cell.name for cell in sweep_cells(config(GRID, *overrides))]

    plain = names()
    assert names("output_dir=elsewhere", "disable_tqdm=true") == plain
    assert not set(names("max_train_samples=90")) & set(plain), "another dense model makes other cells of all"
    changed = names("prune.num_train_epochs=3")
    assert [a == b for a, b in zip(plain, changed, strict=True)] == [True] * 2 + [False] * 14


def test_small_and_set_change_the_file(config):
    small = config(GRID, "eps=0.1", "grid.importance=[random]", "controls.from_scratch=false", small=True)
    cells = sweep_cells(small)
    assert (small.name, len(cells)) == ("grid-small", 4)
    assert all(cell.options["max_train_samples"] == 10 and cell.options["eps"] == 0.1 for cell in cells)
    mixed = config(GRID, "grid.importance=[lamp, magnitude]").grid["importance"]
    assert mixed == {"lamp": {"importance": "lamp"}, "magnitude": {"importance": "magnitude"}}
    added = config(GRID, "grid.architecture.mine={model_name_or_path: ./mine}").grid["architecture"]
    assert list(added) == ["narrow", "mine"] and added["mine"] == {"model_name_or_path": "./mine"}
    picked = config(GRID, "grid.architecture=[narrow]").grid["architecture"]
    assert picked == {"narrow": config().grid["architecture"]["narrow"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nosuch=1"], "'nosuch' is not known"),
        (["max_train_sample=1"], "known: .*max_train_samples"),
        (["eps"], "write KEY=VALUE"),
        (["grid.width=[1]"], "'width' is not known; known: architecture, data, .*seed"),
        (["grid.seed=7"], "must be a list of values"),
        (["grid.seed=[]"], "has no value"),
        (["grid.method=[lamp]"], "needs options"),
        (["dense.target=0.5"], "dense: 'target' is not known"),
        (["grid.data={digits: {eps_: 0.1}}"], "grid.data.digits: 'eps_' is not known; known: .*eps"),
        (["prune.output_dir=x"], "settled by the sweep"),
        (["controls.from_scratch={importance: [lamp]}"], r"none of \['lamp'\] is in the grid"),
        (["name=a/b"], "name is 'a/b'; figures and tables are files of that name .*a text without folders"),
        (["name=7"], "name is 7; "),
        (["name=''"], "name is ''; "),
        (["controls.longer=true"], "known: dense_longer, from_scratch"),
        (["common=[1]"], "common: .* must be a mapping"),
        (["eps=[1"], "not valid YAML"),
        (["importance=lamp"], r'--set importance: \'magnitude\' of the axis.*"grid.importance=\[\.\.\.\]"'),
        (["grid.target=[0.5]", "target=0.4"], "--set target: 0.5 of the axis target sets it"),
        (["backbone_kwargs={}"], "--set .* 'narrow' of the axis .*\"grid.architecture.narrow.backbone_kwargs="),
        (
            ["grid.architecture=[narrow, ./mine]"],
            "'narrow' stands for options .* './mine' is none of .*narrow\\. Pick names alone",
        ),
        (["grid.method={a: {eps: 1}}", "grid.method=[a, b]"], "'a' stands for options of the file, and 'b' is none"),
        (
            ["grid.method={LAMP: {importance: lamp}}"],
            "'magnitude' of the axis importance sets importance to 'magnitude', and 'LAMP' of the axis method, .* to "
            "'lamp'. Let one",
        ),
        (["grid.allocation={all: {allocation: mrs, target: 0.3}}"], "0.5 of the axis target sets target to 0.5, and"),
        (["grid.architecture=[narrow, [1]]"], r"'narrow' stands for options of the file, and \[1\] is none"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        config(GRID, *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid.importance=[lamb, magnitude]", "importance': 'lamb'.*'lamb' is not known; choose one of magnitude"),
        ("eps=9", "eps"),
        ("max_train_samples=many", "invalid int value: 'many'"),
        ("grid.target=[0.5, 1.5]", "target=1.5 is not a fraction"),
    ],
)
def test_what_a_recipe_refuses_is_refused_before_any_cell(config, override, message):
    with pytest.raises(ValueError, match=message):
        check_cells(sweep_cells(config(GRID, override)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grid.method={a: {beta: 6}, b: {beta: 6}}"], "same run.*leave one of them out"),
        (["prune.pruning_rounds=2"], "leave out the controls, or pruning_rounds"),
        (["max_steps=5"], "give num_train_epochs instead of max_steps"),
        (["dense.num_steps=10", "prune.num_steps=1"], r"equal compute only .* differ in num_steps \(10 and 1\)"),
        (["prune.objective=pgd"], r"differ in objective \(trades and pgd\)\. Set these in common"),
        (["grid.method={awp: {awp_gamma: 0.01}, not: {}}"], r"differ in awp_gamma \(None and 0\.01\)"),
        (["prune.max_train_samples=50", "dense.eps=0.1"], r"differ in max_train_samples \(100 and 50\), eps"),
        (["grid.method={long: {num_train_epochs: 9}, short: {}}"], "has a length of its own: set num_train_epochs"),
        (["controls.from_scratch={importance: [[random]]}"], r"none of \[\['random'\]\] is in the grid"),
        (["output_dir=3"], "output_dir is 3; the path of a folder is needed"),
        (["small.seed=3"], "`small` is a set of such changes itself"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        sweep_cells(config(GRID, *overrides))


TWO = ["grid.allocation=[mrs, uniform]"]


@pytest.mark.parametrize(
    ("show", "overrides", "message"),
    [
        ("{}", [], "show.kind is None; known: lines, dots, layers, table"),
        ("{kind: lines, line: importance}", [], "line is not known for a lines; known: kind, lines"),
        ("{kind: lines}", [], "an axis, or a list of axes"),
        ("{kind: dots, dots: data}", [], "'data' is no axis of the grid"),
        ("{kind: table, against: {importance: lamp}}", [], "'lamp' is not in the grid"),
        ("{kind: table, against: {data: digits}}", [], "accuracies on other data cannot be subtracted"),
        ("{kind: table, against: importance}", [], "a mapping from axes to one value"),
        ("{kind: dots, dots: importance}", ["grid.data={a: , b: {eps: 0.2}}", *TWO], "two axes, and data, .* differ"),
        ("{kind: layers, lines: target}", ["prune.allocation=uniform"], "No cell holds sensitivities of layers"),
        ("{kind: layers, lines: target}", ["prune.combine=joint"], "No cell holds sensitivities of layers"),
        ("{kind: [lines], lines: target}", [], r"show.kind is \['lines'\]; known: lines"),
        ("{kind: lines, lines: [[a]]}", [], r"show.lines is \[\['a'\]\]; names of axes are needed"),
        ("{kind: dots, dots: []}", [], r"show.dots is \[\]; names of axes are needed"),
        ("{kind: table, against: {importance: [lamp]}}", [], r"\['lamp'\] is not in the grid"),
    ],
)
def test_what_could_not_be_drawn_is_refused_before_any_cell(config, show, overrides, message):
    check_show(config(), sweep_cells(config()))
    changed = config(GRID, f"show={show}", *overrides)
    with pytest.raises(ValueError, match=message):
        check_show(changed, sweep_cells(changed))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
@pytest.mark.parametrize("small", [True, False], ids=["small", "whole"])
def test_the_sweeps_of_the_paper_are_what_the_recipes_take(file, small):
    config = read_config(file, small=small)
    cells = sweep_cells(config)
    check_show(config, cells)
    # Another seed is refused for the same reasons.
    check_cells([cell for cell in cells if cell.axes.get("seed") == 0])


def test_the_longer_dense_model_is_one_whatever_pruned_ones_are_trained_by(config):
    cells = sweep_cells(config(GRID, "grid.method={a: {learning_rate: 0.1}, b: {learning_rate: 0.05}}"))
    longer = [cell for cell in cells if cell.kind == "dense-longer"]
    assert len(longer) == len([cell for cell in cells if cell.kind == "dense"]) == 2
    assert all("learning_rate" not in cell.options for cell in longer)


def test_a_shape_from_scratch_learns_by_what_dense_models_do_for_the_length_of_both(config):
    changes = ("dense.learning_rate=0.3", "dense.optim_args=momentum=0.8", "prune.learning_rate=0.01")
    for cell in of("from-scratch", sweep_cells(config(GRID, *changes, "prune.ema_decay=0.9"))):
        assert (cell.options["learning_rate"], cell.options["optim_args"]) == (0.3, "momentum=0.8")
        assert "ema_decay" not in cell.options and cell.options["max_train_samples"] == 100
        assert (cell.options["dense_epochs"], cell.options["num_train_epochs"]) == (4.0, 2)
    cells = sweep_cells(config(GRID.replace("prune: {num_train_epochs: 2, ", "prune: {")))
    assert not any("num_train_epochs" in cell.options for cell in of("from-scratch", cells))
    # What both have by default, and what only the teacher of a distillation sees, is no difference.
    sweep_cells(config(GRID, "dense.num_steps=5", "prune.objective=rslad", "dense.objective=trades"))


def test_the_script_for_slurm_submits_every_cell_once_after_what_it_starts_from(config, tmp_path):
    cells = sweep_cells(config())
    script = slurm_script(cells, ["python", "recipes/sweep.py", "grid.yaml", "--set", "grid.seed=[0, 1]"])
    # `sbatch` that numbers its jobs and notes what it was called with.
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s|" "$@" >> calls; echo >> calls\nwc -l < calls\n')
    sbatch.chmod(0o755)
    (tmp_path / "submit.sh").write_text(script)
    subprocess.run(
        ["bash", "submit.sh", "--gpus=1"], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True
    )
    calls = [line.split("|") for line in (tmp_path / "calls").read_text().splitlines()]
    assert all("--gpus=1" in words for words in calls) and len(calls) == 4
    arrays = [re.search(r"--array=(\d+)-(\d+)", " ".join(words)) for words in calls[:3]]
    ranges = [range(int(found[1]), int(found[2]) + 1) for found in arrays]
    assert [number for numbers in ranges for number in numbers] == list(range(len(cells)))
    for place, (numbers, words) in enumerate(zip(ranges, calls, strict=False)):
        before = {cells[number].name for numbers in ranges[:place] for number in numbers}
        assert all(cells[number].start is None or cells[number].start.name in before for number in numbers)
        assert (f"--dependency=afterany:{place}" in words) == (place > 0)
        assert "--wrap|python recipes/sweep.py grid.yaml --set 'grid.seed=[0, 1]' --cell $SLURM_ARRAY_TASK_ID" in (
            "|".join(words)
        )
    assert "--show_only" in calls[3][-2] and "--dependency=afterany:3" in calls[3]


def test_the_folder_of_a_run_is_named_after_its_cell(config):
    cell = sweep_cells(config())[0]
    assert run_folder("out", cell) == Path("out/runs") / cell.name
    assert re.fullmatch(r"dense-narrow-0-[0-9a-f]{8}", cell.name)


def test_the_readme_names_every_sweep_of_the_paper():
    readme = (REPOSITORY / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)\.yaml`", readme, flags=re.MULTILINE)) == {file.stem for file in CONFIGS}
    assert set(re.findall(r"recipes/configs/(\w+)\.yaml", readme)) <= {file.stem for file in CONFIGS}


def test_what_is_left_empty_counts_as_not_given(config):
    plain = sweep_cells(config())
    empty = sweep_cells(config(GRID, "common.max_steps=", "prune.pruning_rounds="))
    assert Counter(cell.kind for cell in empty) == Counter(cell.kind for cell in plain)


def test_a_value_that_is_a_number_is_found_by_its_text(config):
    changed = config(GRID, "grid.seed={0: {eps: 0.1}, 1: {eps: 0.1}}", "grid.seed.0.eps=0.2")
    assert changed.grid["seed"] == {0: {"eps": 0.2}, 1: {"eps": 0.1}}


def test_what_changes_a_log_or_a_card_alone_makes_no_other_run(config):
    plain = [cell.name for cell in sweep_cells(config())]
    shown_otherwise = config(GRID, "log_level=warning", "card_note=A note.", "logging_steps=7", "hub_private_repo=true")
    assert [cell.name for cell in sweep_cells(shown_otherwise)] == plain


def test_line_breaks_in_a_setting_leave_the_script_for_slurm_whole(config, tmp_path):
    (tmp_path / "submit.sh").write_text(slurm_script(sweep_cells(config()), ["python", "--set", "card_note=a\nb"]))
    subprocess.run(["bash", "-n", str(tmp_path / "submit.sh")], check=True)

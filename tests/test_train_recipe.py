"""recipes/train.py: a robust dense model with its record, which recipes/prune.py goes on from."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_mrpf import PrunedForImageClassification, RobustnessReport
from hf_mrpf.hub import result_files

REPOSITORY = Path(__file__).resolve().parent.parent
NETWORK = {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16], "stem_type": "deep", "stem_width": 8}
TINY = [
    *("--max_train_samples", "64", "--max_eval_samples", "20", "--use_cpu", "--num_train_epochs", "2"),
    *("--num_steps", "1", "--eval_num_steps", "1", "--optim", "adam", "--eps", "0.1", "--disable_tqdm", "True"),
]
PRUNING = [
    *("--calibration_sets", "2", "--calibration_set_size", "16", "--sensitivity_steps", "1"),
    *("--recalibration_samples", "32"),
]


def recipe(name: str, *options: str):
    """A recipe in this process: what it printed."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", [f"recipes/{name}.py", *options])
        runpy.run_path(str(REPOSITORY / "recipes" / f"{name}.py"), run_name="recipe")["main"]()
    return output.getvalue()


def arguments(monkeypatch, *options: str):
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", *options])
    return runpy.run_path(str(REPOSITORY / "recipes" / "train.py"), run_name="recipe")["parse_arguments"]()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "base"
    small = ("--backbone_kwargs", json.dumps(NETWORK), "--card_note", "A note of the user.")
    options = ("--output_dir", str(folder), *TINY, *small)
    return folder, options, recipe("train", *options)


def test_the_folder_is_a_result_measured_on_the_validation_split(trained):
    folder, _, output = trained
    assert output.startswith("world size 1, device cpu, dtype float32, seed 42\n")
    assert "[dense] objective=trades epochs=2 " in output
    (line,) = (line for line in output.splitlines() if line.startswith("[evaluation] "))
    assert "model=dense" in line and "split=validation" in line
    names = ["model.safetensors", "config.json", "preprocessor_config.json", "modeling.py"]
    assert result_files(folder) == [*names, "robustness_report.json", "README.md"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    content = json.loads((folder / "robustness_report.json").read_text())
    report = RobustnessReport.from_dict(content)
    assert (content["split"], report.num_samples, set(report.attacks)) == ("validation", 20, {"fgsm", "pgd20", "cw"})
    assert content["table"][0]["accuracies"]["clean"] == report.clean_accuracy
    assert content["stages"]["dense"]["epochs"] == 2
    model = PrunedForImageClassification.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_steps_are_what_counts_where_they_are_given(tmp_path):
    folder = tmp_path / "steps"
    few = ("--backbone_kwargs", json.dumps(NETWORK), "--num_train_epochs", "0", "--max_steps", "1")
    recipe("train", "--output_dir", str(folder), *TINY, *few)
    assert json.loads((folder / "stages" / "dense" / "stage.json").read_text())["steps"] == 1


def test_the_card_says_what_the_figures_are_of(trained):
    folder, *_ = trained
    card = ModelCard.load(folder / "README.md")
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert card.data.model_name == "base"
    for text in (
        "split `validation`",
        "this run has not read the test split",
        "A note of the user.",
        "recipes/train.py",
    ):
        assert text in card.content
    assert "## How it was trained" in card.content
    assert "pruned" not in card.content.split("## Citation")[0]
    assert str(folder.parent) not in card.content


def test_a_second_call_shows_the_table_again(trained):
    folder, options, output = trained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = recipe("train", *options)
    assert "is finished with these settings" in again
    assert next(line for line in output.splitlines() if line.startswith("this model ")) in again
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_pruning_starts_from_it_without_training_it_again(trained, tmp_path):
    folder, *_ = trained
    options = ("--output_dir", str(tmp_path / "pruned"), "--model_name_or_path", str(folder), *TINY, *PRUNING)
    output = recipe("prune", *options)
    assert "[dense] taken as it is" in output
    stages = json.loads((tmp_path / "pruned" / "robustness_report.json").read_text())["stages"]
    assert (stages["dense"]["epochs"], stages["dense"]["start"]) == (0, "base, not pruned before")
    weights = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "pruned/stages/dense/model"))
    first, second = weights
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_shape_of_a_model_is_trained_from_scratch_as_a_control(trained, tmp_path):
    folder, *_ = trained
    options = ("--output_dir", str(tmp_path / "control"), "--model_name_or_path", str(folder), *TINY)
    control = ("--fresh_weights", "--dense_epochs", "1.5", "--report_split", "test", "--num_train_epochs", "1")
    output = recipe("train", *options, *control)
    assert 'start="fresh weights in the shape of base, not pruned before"' in output
    content = json.loads((tmp_path / "control" / "robustness_report.json").read_text())
    # Nothing is pruned, so an epoch of the one costs what an epoch of the other does.
    assert content["split"] == "test" and content["stages"]["dense"]["epochs"] == pytest.approx(2.5, abs=0.01)
    assert content["images"] != json.loads((folder / "robustness_report.json").read_text())["images"]
    card = ModelCard.load(tmp_path / "control" / "README.md")
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert "| num_train_epochs | 2.5 |" in card.content
    assert "A control: figures of the test split" in card.content and "has not read the test" not in card.content


def test_fresh_weights_are_none_of_the_models(trained, tmp_path):
    folder, *_ = trained
    options = ("--output_dir", str(tmp_path / "fresh"), "--model_name_or_path", str(folder), *TINY)
    recipe("train", *options, "--fresh_weights", "--num_train_epochs", "0")
    steps = ("--num_train_epochs", "0", "--max_steps", "1", "--overwrite_output_dir")
    assert " steps=1 " in recipe("train", *options, "--fresh_weights", *steps)
    first, second = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "fresh"))
    assert not torch.equal(first["backbone.fc.weight"], second["backbone.fc.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dense_epochs", "3"), "--fresh_weights trains again; give both"),
        (("--fresh_weights", "--dense_epochs", "-1"), "at least 0"),
        (("--fresh_weights", "--dense_epochs", "3", "--max_steps", "4"), "leave one of them out"),
        (("--fresh_weights",), "--fresh_weights keeps the shape of a model of this library, and timm/resnet18 is none"),
        (("--report_split", "all"), "give validation or test"),
    ],
)
def test_a_control_that_cannot_be_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe("train", "--output_dir", str(tmp_path), *TINY, *options)


def test_an_objective_that_needs_a_teacher_is_refused():
    with pytest.raises(ValueError, match="rslad distils from a dense parent.*give it to recipes/prune.py"):
        recipe("train", *TINY, "--objective", "rslad")


def test_options_are_those_of_pruning_less_what_is_about_pruning(monkeypatch, capsys):
    data_args, model_args, _, run_args, args = arguments(monkeypatch, "--use_cpu")
    assert (args.output_dir, args.num_train_epochs, args.eps) == ("outputs/digits-dense", 28.0, 0.2)
    assert (model_args.base_epochs, model_args.control_epochs, run_args.expected_world_size) == (None, 0.0, None)
    assert data_args.dataset_name is None
    for option in ("--target", "--pruning_rounds", "--base_epochs", "--gamma"):
        with pytest.raises(ValueError, match=option):
            arguments(monkeypatch, "--use_cpu", option, "0.5")
    with pytest.raises(SystemExit):
        arguments(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert "pruning:" not in shown and "--target " not in shown and "--control_epochs" not in shown
    for option in ("--dataset_name", "--backbone_kwargs", "--objective", "--num_train_epochs", "--push_to_hub"):
        assert option in shown

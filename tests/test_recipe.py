"""`accelerate launch recipes/prune.py`, as a user runs it."""

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_mrpf import PrunedForImageClassification, PruningPlan, RobustnessReport

REPOSITORY = Path(__file__).resolve().parent.parent
RESULT = {
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "pruning_plan.json",
    "robustness_report.json",
    "README.md",
    "mrs.png",
    "modeling.py",
    "run.json",
}
TINY = [
    *("--max_train_samples", "100", "--max_eval_samples", "40", "--base_epochs", "1", "--num_train_epochs", "1"),
    *("--control_epochs", "1", "--num_steps", "2", "--calibration_sets", "2", "--calibration_set_size", "32"),
    *("--eval_num_steps", "2", "--optim", "adam", "--eps", "51/255", "--use_cpu"),
]


NAMED = [
    *("--max_train_samples", "100", "--max_eval_samples", "40", "--max_steps", "2", "--num_steps", "2", "--use_cpu"),
    *("--calibration_sets", "2", "--calibration_set_size", "32", "--eval_num_steps", "2", "--target", "0.6"),
]


def launch(*options: str, timeout: int = 600) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/prune.py", *options]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout)


def in_this_process(*options: str) -> subprocess.CompletedProcess:
    """The recipe without the imports of a fresh interpreter, which take longer than a small run."""
    command, out, err, status = ["recipes/prune.py", *options], io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        try:
            runpy.run_path(str(REPOSITORY / "recipes" / "prune.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


@pytest.fixture(params=[in_this_process, pytest.param(launch, marks=pytest.mark.slow)], ids=lambda way: way.__name__)
def start(request):
    """Starts the recipe with these options."""
    return request.param


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "digits"
    result = launch("--output_dir", str(folder), *TINY)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result


def test_the_first_line_a_line_a_stage_and_the_table(finished):
    _, result = finished
    lines = result.stdout.splitlines()
    assert lines[0] == "world size 1, device cpu, dtype float32, seed 42"
    stages = [line.split("]")[0][1:] for line in lines if line.startswith("[")]
    assert list(dict.fromkeys(stages)) == ["data", "dense", "control", "pruned", "fine-tuned", "evaluation"]
    table = [line for line in lines if line.startswith(("model ", "dense ", "pruned ", "fine-tuned "))]
    assert [line.split()[0] for line in table] == ["model", "dense", "pruned", "fine-tuned"]
    for heading in ("clean", "PGD-20", "parameters", "MACs", "ms, batch 1", "ms, batch 64", "file"):
        assert heading in table[0]
    assert "n = 40 images" in result.stdout
    assert "linf eps = 0.2, 20 steps" in result.stdout


def test_the_folder_holds_the_result_and_no_pickle(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir() if path.is_file()} - {"run.lock"} == RESULT
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    plans = {str(path.relative_to(folder)) for path in folder.rglob("pruning_plan.json")}
    assert plans == {"pruning_plan.json", "stages/pruned/pruning_plan.json"}
    plan = PruningPlan.load(folder / "pruning_plan.json")
    assert plan.achieved["macs"] == pytest.approx(0.5, abs=0.02)
    assert plan.sensitivity["settings"]["method"] == "ascent"


def test_the_report_the_table_and_the_card_say_the_same(finished):
    folder, _ = finished
    content = json.loads((folder / "robustness_report.json").read_text())
    report = {key: content[key] for key in RobustnessReport.__dataclass_fields__}
    final = RobustnessReport.from_dict(report)
    assert set(final.attacks) == {"fgsm", "pgd20", "cw"}
    assert (final.num_samples, final.eps) == (40, 0.2)
    assert content["clean_accuracy"] == content["table"][-1]["accuracies"]["clean"]
    assert set(content["models"]) == {"dense", "pruned", "control"}
    assert set(content["stages"]["pruned"]["steps"]) == {"before", "removed", "repaired", "recalibrated"}
    assert set(content["stages"]["fine-tuned"]) >= {"best", "last", "seconds"}
    card = ModelCard.load(folder / "README.md")
    values = {item.metric_name: item.metric_value for item in card.data.eval_results}
    assert values["Accuracy"] == final.clean_accuracy
    assert final.attacks["pgd20"] in values.values()
    assert str(folder.parent) not in card.content
    assert "accelerate launch" in card.content
    assert "| horizontal_flip | False |" in card.content, "digits are not mirrored, and the card says so"
    assert "| crop_padding | 1 |" in card.content


def test_the_result_loads_as_it_was_saved(finished):
    folder, _ = finished
    model = PrunedForImageClassification.from_pretrained(folder).eval()
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert sum(p.numel() for p in model.parameters()) == PruningPlan.load(folder / "pruning_plan.json").after["params"]


def test_a_second_call_prints_the_table_at_once(start, finished):
    folder, first = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = start("--output_dir", str(folder), *TINY)
    assert again.returncode == 0, again.stderr[-3000:]
    table = [line for line in first.stdout.splitlines() if line.startswith("fine-tuned ")]
    assert table[0] in again.stdout
    assert "is finished with these settings" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_other_settings_in_the_same_folder_are_refused_by_name(start, finished):
    folder, _ = finished
    before = (folder / "run.json").read_bytes()
    result = start("--output_dir", str(folder), *TINY, "--target", "0.4")
    assert result.returncode != 0
    assert "target: 0.5 there, 0.4 here" in result.stderr
    assert "--overwrite_output_dir" in result.stderr
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.slow
def test_a_finished_model_is_pruned_again_from_its_folder(start, finished, tmp_path):
    folder, _ = finished
    result = start("--output_dir", str(tmp_path / "again"), "--model_name_or_path", str(folder), *NAMED)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "[dense] taken as it is" in result.stdout
    assert "[control]" not in result.stdout
    first, second = (json.loads((f / "robustness_report.json").read_text()) for f in (folder, tmp_path / "again"))
    assert second["models"]["dense"]["verdicts"] == {
        name: first["verdicts"][name] for name in second["models"]["dense"]["verdicts"]
    }
    assert second["table"][-1]["macs"] / first["table"][-1]["macs"] == pytest.approx(0.6, abs=0.02)
    again = PrunedForImageClassification.from_pretrained(tmp_path / "again")
    assert sum(p.numel() for p in again.parameters()) == second["table"][-1]["parameters"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"learning_rate": 0.2, "eps": 0.2, "output_dir": "outputs/digits", "control_epochs": 8.0}),
        (["--dataset_name", "digits"], {"eps": 0.2, "output_dir": "outputs/digits", "num_steps": 5}),
        (["--optim", "adam"], {"learning_rate": 1e-3}),
        (["--learning_rate", "0.3"], {"learning_rate": 0.3}),
        (
            ["--model_name_or_path", "a/b"],
            {"output_dir": "outputs/digits-b", "base_epochs": None, "control_epochs": 0.0},
        ),
        (["--dataset_name", "x/cifar10"], {"output_dir": "outputs/cifar10", "eps": 8 / 255, "learning_rate": 0.05}),
    ],
)
def test_defaults_follow_from_data_model_and_optimizer(monkeypatch, options, expected):
    names = runpy.run_path(str(REPOSITORY / "recipes" / "prune.py"), run_name="recipe")
    monkeypatch.setattr(sys, "argv", ["prune.py", "--use_cpu", *options])
    settings = {}
    for group in names["parse_arguments"]():
        settings |= vars(group)
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.slow
def test_an_interrupted_run_goes_on_after_its_last_finished_stage(finished, tmp_path):
    folder, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "stages" / "fine-tuned")
    state = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(state | {"finished": False}))
    result = launch("--output_dir", str(copy), *TINY)
    assert result.returncode == 0, result.stderr[-3000:]
    for stage in ("dense", "control", "pruned"):
        assert f"[{stage}] kept from before" in result.stdout
    first, second = (load_file(path / "model.safetensors") for path in (folder, copy))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hub_model_id", "bad id/x y"], "bad id/x y"),
        (["--dataset_name", "no/such/folder"], "no/such/folder"),
        (["--target", "0.0001"], "smallest"),
        (["--eps", "8"], "8/255"),
        (["--importance", "guess"], "magnitude"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_message_and_leaves_no_folder(tmp_path, options, message):
    result = launch("--output_dir", str(tmp_path / "run"), *options)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr.split("error: ")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_default_run_keeps_the_robustness_of_its_parent_at_half_the_macs(tmp_path):
    result = launch("--output_dir", str(tmp_path / "digits"), timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads((tmp_path / "digits" / "robustness_report.json").read_text())
    assert content["models"]["control"]["attacks"]["pgd20"] < 0.2
    assert content["models"]["dense"]["attacks"]["pgd20"] > 0.3
    assert content["table"][-1]["macs"] / content["table"][0]["macs"] == pytest.approx(0.5, abs=0.005)
    assert content["fine_tuned_minus_dense_pgd20"]["difference"] > -0.03

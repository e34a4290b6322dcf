"""What reporters get: figures of training batches, evaluations and prunings; TensorBoard's files read back."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

from hf_mrpf import MRPFConfig, MRPFTrainer, ObjectiveOutput, PrunedForImageClassification, load_image_data
from hf_mrpf.logs import TrainingMeter, end_of_run
from hf_mrpf.run_folder import RunFolder
from hf_mrpf.stages import make_trainer, stage_arguments

QUICK = {
    "eps": 0.1,
    "num_steps": 1,
    "eval_num_steps": 5,
    "calibration_sets": 2,
    "calibration_set_size": 16,
    "sensitivity_steps": 1,
    "recalibration_samples": 32,
    "per_device_train_batch_size": 32,
    "crop_padding": 0,
    "horizontal_flip": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def itself(tensor):
    return tensor


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=96, max_eval_samples=40)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, layers=(1, 1, 1, 1), channels=(8, 12, 16, 16)
    )


def test_the_meter_is_a_plain_mean_over_images_for_each_reader():
    torch.manual_seed(0)
    meter, batches = TrainingMeter(), []
    assert meter.read("log", itself) == {}
    for size in (5, 3):
        clean, adversarial, labels = torch.randn(size, 4), torch.randn(size, 4), torch.randint(4, (size,))
        batches.append((clean, adversarial, labels))
        meter.add(ObjectiveOutput(torch.zeros(()), clean, adversarial), labels)
        meter.read("log", itself)
    clean, adversarial, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    figures = meter.read("evaluation", itself)
    assert figures["train_accuracy"] == (clean.argmax(1) == labels).float().mean().item()
    assert figures["train_robust_accuracy"] == (adversarial.argmax(1) == labels).float().mean().item()
    gap = F.cross_entropy(adversarial, labels) - F.cross_entropy(clean, labels)
    assert figures["adversarial_loss_gap"] == pytest.approx(gap.item(), rel=1e-5)
    assert meter.read("evaluation", itself) == {}


def test_an_objective_without_clean_or_without_adversarial_logits_logs_what_there_is():
    meter, logits, labels = TrainingMeter(), torch.eye(4), torch.arange(4)
    meter.add(ObjectiveOutput(torch.zeros(()), None, logits), labels)
    assert meter.read("log", itself) == {"train_robust_accuracy": 1.0}
    meter.add(ObjectiveOutput(torch.zeros(()), logits), labels)
    assert meter.read("log", itself) == {"train_accuracy": 1.0}
    meter.add(ObjectiveOutput(torch.zeros(())), labels)
    assert meter.read("log", itself) == {}


def test_figures_are_sums_over_processes():
    meter, labels = TrainingMeter(), torch.arange(4)
    meter.add(ObjectiveOutput(torch.zeros(()), torch.eye(4)), labels)
    other = TrainingMeter()
    other.add(ObjectiveOutput(torch.zeros(()), torch.eye(4).flip(0)), labels)
    (theirs,) = (other._sums["log"],)
    assert meter.read("log", lambda tensor: tensor + theirs) == {"train_accuracy": 0.5}


def test_nothing_waits_for_a_step(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a step waited for the device")

    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    TrainingMeter().add(ObjectiveOutput(torch.zeros(()), torch.eye(4), torch.eye(4)), torch.arange(4))


class Recorder(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, *, logs, **kwargs):
        self.rows.append(dict(logs))


def test_a_training_and_a_pruning_reach_every_reporter(tmp_path, data, model):
    recorder = Recorder()
    each_epoch = {"logging_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 2}
    args = MRPFConfig(str(tmp_path), **QUICK, **each_epoch)
    trainer = MRPFTrainer(model, args, data.train, data.validation, callbacks=[recorder])
    trainer.train()
    steps = [row for row in recorder.rows if "loss" in row]
    evaluations = [row for row in recorder.rows if "eval_loss" in row]
    assert len(steps) == len(evaluations) == 2
    for step, evaluation in zip(steps, evaluations, strict=True):
        assert 0 <= step["train_robust_accuracy"] <= 1
        assert {"train_accuracy", "adversarial_loss_gap"} <= step.keys()
        assert evaluation["eval_train_robust_accuracy"] == step["train_robust_accuracy"]
        assert {"eval_accuracy", "eval_robust_accuracy", "eval_adversarial_loss_gap"} <= evaluation.keys()
    assert trainer.best_and_last()["last"]["epoch"] == 2
    assert "eval_train_robust_accuracy" not in trainer.evaluate()
    recorder.rows.clear()

    plan = trainer.prune()
    row, *after = recorder.rows
    for unit in plan.units:
        assert row[f"mrs/{unit.name}"] == plan.scores[unit.name]
        assert row[f"pruned/{unit.name}"] == plan.ratios[unit.name]
        assert row[f"width/{unit.name}"] == len(plan.kept[unit.name])
    assert {name.partition("/")[2] for name in row if name.startswith("module_mrs/")} == set(plan.module_scores)
    assert row["kept/macs"] == plan.achieved["macs"]
    assert row["size/params"] == plan.after["params"]
    expected = {f"pruning/{step}/robust_accuracy": f["robust_accuracy"] for step, f in trainer.pruning_report.items()}
    assert len(expected) == 4
    found = {name: value for figures in after for name, value in figures.items() if name in expected}
    assert found == expected
    assert {"pruning/removed/accuracy", "pruning/removed/adversarial_loss_gap"} <= {name for f in after for name in f}


def test_the_gap_of_an_evaluation_is_that_of_all_its_images(tmp_path, data, model):
    trainer = MRPFTrainer(model, MRPFConfig(str(tmp_path), **QUICK), eval_dataset=data.validation)
    prediction = trainer.predict(data.validation)
    clean, adversarial = (torch.tensor(part) for part in prediction.predictions)
    labels = torch.tensor(prediction.label_ids)
    gap = F.cross_entropy(adversarial, labels) - F.cross_entropy(clean, labels)
    assert prediction.metrics["test_adversarial_loss_gap"] == pytest.approx(gap.item(), rel=1e-5)
    assert gap > 0
    assert trainer.evaluate()["eval_adversarial_loss_gap"] == pytest.approx(gap.item(), rel=1e-4)


def scalars(folder) -> dict[str, list[float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, list[float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = accumulator.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return found


def test_tensorboard_gets_a_stage_that_only_prunes_and_a_stage_that_trains(tmp_path, monkeypatch, data, model):
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    args = MRPFConfig("run", **QUICK, max_steps=1, logging_steps=1, report_to="tensorboard")
    run = RunFolder("run", {})
    trainer = make_trainer(model, data, stage_arguments(run, "pruned", args))
    plan = trainer.prune()
    assert trainer.args.run_name == "run-pruned"
    writers = [callback.tb_writer for callback in trainer.callback_handler.callbacks if hasattr(callback, "tb_writer")]
    assert writers == [None]  # closed
    assert not (tmp_path / "runs").exists()
    tags = scalars(run.stage("pruned") / "logs")
    name = plan.units[0].name
    assert tags[f"train/mrs/{name}"] == [pytest.approx(plan.scores[name], rel=1e-6)]
    assert tags[f"train/pruned/{name}"] == [pytest.approx(plan.ratios[name], rel=1e-6)]
    assert tags["train/pruning/recalibrated/robust_accuracy"]
    trainer = make_trainer(trainer.model, data, stage_arguments(run, "fine-tuned", args, eval_strategy="epoch"))
    trainer.train()
    tags = scalars(run.stage("fine-tuned") / "logs")
    for tag in ("train/train_robust_accuracy", "train/adversarial_loss_gap", "eval/robust_accuracy", "train/loss"):
        assert len(tags[tag]) == 1, tag
    assert not (run.stage("fine-tuned") / "training" / "runs").exists()


def test_the_run_of_weights_and_biases_ends_with_the_stage(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=object(), finish=lambda: calls.append("finish")))
    end_of_run(SimpleNamespace(report_to=[]))
    assert calls == []
    end_of_run(SimpleNamespace(report_to=["wandb"]))
    assert calls == ["finish"]


def test_a_plain_net_that_is_not_attacked_logs_its_accuracy_alone(tmp_path, data):
    recorder = Recorder()
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    args = MRPFConfig(str(tmp_path), **QUICK, objective="standard", max_steps=2, logging_steps=2)
    MRPFTrainer(net, args, data.train, callbacks=[recorder]).train()
    (row,) = [row for row in recorder.rows if "loss" in row]
    assert "train_accuracy" in row
    assert not {"train_robust_accuracy", "adversarial_loss_gap"} & row.keys()

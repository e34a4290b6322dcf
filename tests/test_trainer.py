"""The trainer: steps equal to plain loops, pruning between trainings, metrics, hooks, saving."""

import copy
import dataclasses
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Value
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_mrpf import (
    AttackConfig,
    MRPFConfig,
    MRPFTrainer,
    ObjectiveOutput,
    PrunedForImageClassification,
    evaluate_robustness,
    load_image_data,
    pgd_attack,
    plan_pruning,
)
from hf_mrpf.attacks import keyed_start
from hf_mrpf.data import batches
from hf_mrpf.efficiency import has_bfloat16

NARROW = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 32), "stem_type": "deep", "stem_width": 8}
QUICK = {
    "eps": 0.1,
    "num_steps": 2,
    "eval_num_steps": 2,
    "per_device_train_batch_size": 32,
    "calibration_sets": 2,
    "calibration_set_size": 20,
    "sensitivity_steps": 1,
    "recalibration_samples": 64,
    "crop_padding": 0,
    "horizontal_flip": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=96, max_eval_samples=40)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, **NARROW
    )


def quick(folder, **changes) -> MRPFConfig:
    return MRPFConfig(output_dir=str(folder), **(QUICK | changes))


def plain_net() -> nn.Module:
    """No BatchNorm: its statistics depend on how a batch is cut."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


@pytest.mark.parametrize("objective", ["standard", "pgd"])
def test_accumulating_four_batches_of_eight_equals_one_of_thirty_two(tmp_path, data, objective):
    weights = []
    for batch, accumulation in ((8, 4), (32, 1)):
        args = quick(
            tmp_path,
            objective=objective,
            random_start=False,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        trainer = MRPFTrainer(plain_net(), args, data.train)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert not torch.equal(weights[0], torch.cat([p.detach().flatten() for p in plain_net().parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


def test_rslad_distils_from_the_teacher_and_refuses_to_do_without_one(tmp_path, data):
    args = quick(tmp_path, objective="rslad", max_steps=1, warmup_steps=0)
    with pytest.raises(ValueError, match="'rslad' distils from a teacher and none was given"):
        MRPFTrainer(plain_net(), args, data.train).train()
    student, teacher = plain_net(), plain_net()
    with pytest.raises(ValueError, match="teacher is the model that is trained"):
        MRPFTrainer(student, args, data.train, teacher=student)
    with torch.no_grad():
        teacher[-1].bias[3] = 9.0  # sees threes only, whatever the labels
    before = copy.deepcopy(teacher.state_dict())
    bias = student[-1].bias.detach().clone()
    MRPFTrainer(student, args, data.train, teacher=teacher).train()
    moved = student[-1].bias.detach() - bias
    assert moved[3] > 0 and (moved.sum() - moved[3]) < 0
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_model_that_could_not_be_loaded_again_is_told_of_before_it_is_pruned(tmp_path, data, caplog):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    plain = ResNetForImageClassification(ResNetConfig(num_labels=10, **sizes))
    wrapped = PrunedForImageClassification.from_backbone(plain, image_size=16)
    told = "ResNetForImageClassification has no record of what is pruned: from_pretrained will refuse"
    for network in (plain, plain_net(), wrapped):
        caplog.clear()
        trainer = MRPFTrainer(network, quick(tmp_path, allocation="uniform", repair=False), data.train)
        trainer.prune()
        assert (told in caplog.text) == (network is plain)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(RuntimeError):
        ResNetForImageClassification.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("optim", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_after_prune_every_parameter_is_in_the_optimizer_and_moves(tmp_path, data, model, optim):
    trainer = MRPFTrainer(model, quick(tmp_path, optim=optim, max_steps=2, warmup_steps=0), data.train, data.validation)
    trainer.train()  # an optimizer of the dense model exists when the pruning happens
    plan = trainer.prune()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert sum(p.numel() for p in before.values()) == plan.after["params"] < plan.before["params"]
    trainer.train()
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    live = dict(trainer.model.named_parameters())
    assert optimised == {id(p) for p in live.values()}
    assert [name for name, p in live.items() if torch.equal(p, before[name])] == []
    wanted = torch.optim.Adam if optim == "adam" else torch.optim.SGD
    assert type(trainer.optimizer.optimizer) is wanted
    assert trainer.optimizer.param_groups[0].get("nesterov", False) == (optim == "sgd")
    assert plan.achieved["macs"] == pytest.approx(0.5, abs=0.02)
    assert list(trainer.pruning_report) == ["before", "removed", "repaired", "recalibrated"]
    assert all(0 <= step["robust_accuracy"] <= step["accuracy"] <= 1 for step in trainer.pruning_report.values())


class Recorder(TrainerCallback):
    """Subscribes to all three pruning events and swaps the plan for a milder one."""

    def __init__(self, replacement):
        self.events, self.replacement = [], replacement

    def on_sensitivity_end(self, args, state, control, *, sensitivity, model, **kwargs):
        self.events.append(("sensitivity", sensitivity, sum(p.numel() for p in model.parameters())))

    def on_plan_end(self, args, state, control, *, plan, **kwargs):
        self.events.append(("plan", plan, None))
        return self.replacement

    def on_prune_end(self, args, state, control, *, plan, model, **kwargs):
        self.events.append(("prune", plan, sum(p.numel() for p in model.parameters())))


def test_hooks_fire_in_order_and_may_replace_the_plan(tmp_path, data, model):
    milder = plan_pruning(model, torch.zeros(1, 3, 16, 16), target=0.8, allocation="uniform")
    recorder = Recorder(milder)
    bystander = TrainerCallback()  # defines none of the events
    trainer = MRPFTrainer(model, quick(tmp_path), data.train, callbacks=[recorder, bystander])
    applied = trainer.prune()
    assert [event for event, *_ in recorder.events] == ["sensitivity", "plan", "prune"]
    assert recorder.events[0][1].settings["method"] == "ascent"
    assert recorder.events[0][2] == milder.before["params"]
    assert recorder.events[1][1].target == 0.5
    assert applied.kept == milder.kept
    assert applied.target == 0.8
    assert recorder.events[2][2] == milder.after["params"]
    assert trainer.pruning_report == {}  # no validation split, so nothing was measured


def test_a_hook_cannot_smuggle_in_a_plan_of_another_model(tmp_path, data, model):
    other = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, **(NARROW | {"channels": (8, 8, 8, 8)})
    )
    wrong = plan_pruning(other, torch.zeros(1, 3, 16, 16), target=0.8, allocation="uniform")
    before = copy.deepcopy(model.state_dict())
    trainer = MRPFTrainer(model, quick(tmp_path), data.train, callbacks=[Recorder(wrong)])
    with pytest.raises(ValueError, match="the plan is not for this model"):
        trainer.prune()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_the_sizes_of_a_changed_plan_are_measured_not_believed(tmp_path, data, model):
    whole = plan_pruning(model, torch.zeros(1, 3, 16, 16), target=0.5, allocation="uniform")
    everything = {unit.name: list(range(unit.width)) for unit in whole.units}
    lying = dataclasses.replace(whole, kept=everything)
    applied = MRPFTrainer(model, quick(tmp_path), data.train, callbacks=[Recorder(lying)]).prune()
    assert applied.achieved == {"macs": 1.0, "params": 1.0}
    assert applied.after == applied.before == whole.before
    assert set(applied.ratios.values()) == {0.0}
    with pytest.raises(ValueError, match="on_plan_end returned a dict; return a PruningPlan"):
        MRPFTrainer(model, quick(tmp_path), data.train, callbacks=[Recorder({})]).prune()


def test_predict_and_prune_take_what_evaluate_takes(tmp_path, data, model):
    splits = {"a": data.validation, "b": data.test}
    trainer = MRPFTrainer(model, quick(tmp_path), data.train, splits)
    prediction = trainer.predict(data.test)
    assert prediction.predictions[0].shape == (len(data.test), 10)
    assert prediction.metrics["test_robust_accuracy"] == trainer.evaluate()["eval_b_robust_accuracy"]
    small = MRPFTrainer(model, quick(tmp_path, per_device_eval_batch_size=7), data.train).predict(data.test)
    torch.testing.assert_close(torch.tensor(small.predictions[1]), torch.tensor(prediction.predictions[1]))
    trainer.prune()
    assert trainer.pruning_report["removed"]["num_samples"] == len(data.validation)


def test_weights_that_are_not_finite_are_never_saved(tmp_path, data, model):
    each_step = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "warmup_steps": 0}
    trainer = MRPFTrainer(model, quick(tmp_path, learning_rate=1e38, objective="standard", **each_step), data.train)
    with pytest.raises(ValueError, match=r"training stopped. Last checkpoint with finite weights: (none|.*checkpoint)"):
        trainer.train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        loaded = PrunedForImageClassification.from_pretrained(checkpoint)
        assert all(p.isfinite().all() for p in loaded.parameters())
    net = plain_net()
    last = MRPFTrainer(net, quick(tmp_path / "new", max_steps=1), data.train)
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="none was saved yet"):
        last.train()


class Poison(TrainerCallback):
    """Stands for a step that overflows: the loss before it was finite."""

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step == 2:
            next(model.parameters()).data.fill_(float("nan"))


def test_a_step_that_breaks_the_weights_is_noticed_at_the_next_save_and_at_the_end(tmp_path, data):
    args = quick(tmp_path / "saved", objective="standard", max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"After step 2, .*NaN.*finite weights: .*checkpoint-1"):
        MRPFTrainer(plain_net(), args, data.train, callbacks=[Poison()]).train()
    assert not (tmp_path / "saved" / "checkpoint-2").exists()
    resumed = MRPFTrainer(plain_net(), args, data.train, callbacks=[Poison()])
    with pytest.raises(ValueError, match=r"After step 2, .*NaN.*finite weights: .*checkpoint-1"):
        resumed.train(resume_from_checkpoint=True)  # nothing was saved since
    args = quick(tmp_path / "end", objective="standard", max_steps=2)
    with pytest.raises(ValueError, match=r"After step 2, .*NaN.*none was saved yet"):
        MRPFTrainer(plain_net(), args, data.train, callbacks=[Poison()]).train()


def test_a_plain_network_with_too_few_outputs_and_a_bare_loss_are_refused(tmp_path, data):
    few = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(ValueError, match="data set has 10 classes and the model 4 outputs"):
        MRPFTrainer(few, quick(tmp_path), data.train)

    def bare(model, images, labels, attack, **kwargs):
        return nn.functional.cross_entropy(model(images), labels)

    with pytest.raises(ValueError, match="returned a Tensor; it must return an ObjectiveOutput"):
        MRPFTrainer(plain_net(), quick(tmp_path, objective=bare), data.train).train()


def test_a_given_plan_is_applied_as_it_is(tmp_path, data, model):
    plan = plan_pruning(model, torch.zeros(1, 3, 16, 16), target=0.6, allocation="uniform", importance="random")
    trainer = MRPFTrainer(model, quick(tmp_path, repair=False, recalibration_samples=0), data.train, data.validation)
    assert trainer.prune(plan).kept == plan.kept
    assert list(trainer.pruning_report) == ["before", "removed"]


def test_prune_refuses_what_it_would_break(tmp_path, data, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="was given an optimizer"):
        MRPFTrainer(model, quick(tmp_path), data.train, optimizers=(optimizer, None)).prune()
    with pytest.raises(ValueError, match="a datasets.Dataset; here it is NoneType"):
        MRPFTrainer(model, quick(tmp_path)).prune()
    for wrong in (0.5, "plan.json"):
        with pytest.raises(ValueError, match=rf"plan is {wrong!r}; give a PruningPlan .*MRPFConfig\(target=...\)"):
            MRPFTrainer(model, quick(tmp_path), data.train).prune(wrong)
    for models in ({"model_init": lambda: model}, {"model": model, "model_init": lambda: model}, {}):
        with pytest.raises(ValueError, match="takes no model_init: that would build the dense model anew"):
            MRPFTrainer(args=quick(tmp_path), train_dataset=data.train, **models)
    with pytest.raises(ValueError, match="needs an MRPFConfig"):
        MRPFTrainer(model, {"output_dir": str(tmp_path)}, data.train)


def test_evaluate_equals_a_plain_loop_at_any_batch_size(tmp_path, data, model):
    attack = AttackConfig(eps=0.1, num_steps=2)
    correct, robust = [], []
    for images, labels in batches(data.validation, 40):
        start = keyed_start(images, range(len(images)), attack, 42)
        adversarial = pgd_attack(model, images, labels, attack, start=start)
        model.eval()
        with torch.no_grad():
            correct.append(model(images).logits.argmax(1) == labels)
            robust.append(correct[-1] & (model(adversarial).logits.argmax(1) == labels))
    expected = torch.cat(correct).float().mean().item(), torch.cat(robust).float().mean().item()
    for batch_size in (40, 7):
        trainer = MRPFTrainer(
            model, quick(tmp_path, per_device_eval_batch_size=batch_size), eval_dataset=data.validation
        )
        metrics = trainer.evaluate()
        assert (metrics["eval_accuracy"], metrics["eval_robust_accuracy"]) == pytest.approx(expected, abs=1e-6)
    named = MRPFTrainer(
        model,
        quick(tmp_path),
        eval_dataset={"a": data.validation, "b": data.test},
        compute_metrics=lambda prediction: {"classes": prediction.predictions.shape[1]},
    ).evaluate()
    assert named["eval_a_robust_accuracy"] == pytest.approx(expected[1], abs=1e-6)
    assert named["eval_b_classes"] == 10


def test_the_best_epoch_is_loaded_and_best_and_last_are_reported(tmp_path, data, model):
    scripted = iter([0.2, 0.9, 0.4])
    weights = []

    class Scripted(MRPFTrainer):
        def _metrics(self, prediction):
            weights.append(self.model.backbone.fc.weight.detach().clone())
            return {"accuracy": 1.0, "robust_accuracy": next(scripted)}

    each_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = Scripted(
        model, quick(tmp_path, num_train_epochs=3, objective="pgd", **each_epoch), data.train, data.validation
    )
    trainer.train()
    figures = trainer.best_and_last()
    assert (figures["best"]["epoch"], figures["best"]["eval_robust_accuracy"]) == (2, 0.9)
    assert (figures["last"]["epoch"], figures["last"]["eval_robust_accuracy"]) == (3, 0.4)
    scripted = iter([0.9])
    trainer.evaluate()  # of the best weights, which are the model's now
    assert trainer.best_and_last() == figures
    assert torch.equal(trainer.model.backbone.fc.weight, weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert not list(tmp_path.rglob("training_args.bin"))
    checkpoint = get_last_checkpoint(str(tmp_path))
    again = PrunedForImageClassification.from_pretrained(checkpoint)
    assert torch.equal(again.backbone.fc.weight, weights[2])


def test_best_and_last_follow_the_metric_that_picks_the_checkpoint(tmp_path, data, model):
    scripted = iter([(0.9, 0.1), (0.2, 0.8)])

    class Scripted(MRPFTrainer):
        def _metrics(self, prediction):
            return dict(zip(("accuracy", "robust_accuracy"), next(scripted), strict=True))

    each_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    args = quick(tmp_path, num_train_epochs=2, objective="standard", metric_for_best_model="accuracy", **each_epoch)
    trainer = Scripted(model, args, data.train, data.validation)
    trainer.train()
    figures = trainer.best_and_last()
    assert figures["best"]["epoch"] == 1
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{figures['best']['step']}")


def test_several_validation_splits_need_no_best_metric_until_the_best_is_asked_for(tmp_path, data, model):
    splits = {"a": data.validation, "b": data.test}
    each_epoch = {"objective": "standard", "num_train_epochs": 1, "eval_strategy": "epoch", "save_strategy": "epoch"}
    args = quick(tmp_path, **each_epoch)
    trainer = MRPFTrainer(model, args, data.train, splits)
    trainer.train()
    assert get_last_checkpoint(str(tmp_path)) and args.metric_for_best_model == "robust_accuracy"
    assert {"eval_a_robust_accuracy", "eval_b_robust_accuracy"} <= trainer.best_and_last()["last"].keys()
    with pytest.raises(ValueError, match="say of which, such as 'a_robust_accuracy'"):
        MRPFTrainer(model, quick(tmp_path, load_best_model_at_end=True, **each_epoch), data.train, splits)
    args = quick(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_b_accuracy", **each_epoch)
    trainer = MRPFTrainer(model, args, data.train, splits)
    trainer.train()
    assert trainer.state.best_metric == trainer.best_and_last()["last"]["eval_b_accuracy"]


def test_an_evaluation_leaves_random_numbers_as_they_were(tmp_path, data, model):
    trainer = MRPFTrainer(model, quick(tmp_path), data.train, data.validation)
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_checkpoint(tmp_path, data):
    calls = []

    def broken(model, images, labels, attack, *, beta=6.0, attacked=None, adversarial_images=None, teacher=None):
        calls.append(attacked)
        loss = nn.functional.cross_entropy(model(images), labels)
        return ObjectiveOutput(loss * (float("nan") if len(calls) == 3 else 1.0), None)

    args = quick(tmp_path, objective=broken, save_strategy="steps", save_steps=1, max_steps=6)
    assert args.to_dict()["objective"].endswith("broken")
    trainer = MRPFTrainer(plain_net(), args, data.train)
    with pytest.raises(ValueError, match=r"loss is nan at step 3; .*checkpoint-2"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert calls[0] is trainer.model
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_bad_models_and_data_are_refused_before_anything_is_written(tmp_path, data, model):
    folder = tmp_path / "never"
    with torch.no_grad():
        model.backbone.layer1[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"backbone.layer1.0.conv1.weight"):
        MRPFTrainer(model, quick(folder), data.train)
    small = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=3, image_size=16, small_images=True, **NARROW
    )
    with pytest.raises(ValueError, match="data set has 10 classes and the model 3"):
        MRPFTrainer(small, quick(folder), data.train)
    with pytest.raises(ValueError, match=r"train_dataset holds several splits \(train\); hand over one of them"):
        MRPFTrainer(plain_net(), quick(folder), DatasetDict(train=data.train))
    assert not folder.exists()


def test_numbered_labels_may_leave_the_highest_classes_out_but_not_go_beyond(tmp_path, model):
    def numbered(highest: int, **names) -> Dataset:
        labels = [label % (highest + 1) for label in range(20)]
        values = np.zeros((20, 3, 16, 16), np.uint8)
        features = Features(
            pixel_values=Array3D((3, 16, 16), "uint8"), labels=ClassLabel(**names) if names else Value("int64")
        )
        return Dataset.from_dict({"pixel_values": values, "labels": labels}, features=features)

    trainer = MRPFTrainer(model, quick(tmp_path), numbered(9), {"all": numbered(9), "few": numbered(8)})
    assert set(trainer.evaluate()) >= {"eval_all_accuracy", "eval_few_accuracy"}
    with pytest.raises(ValueError, match="data set has 11 classes and the model 10"):
        MRPFTrainer(model, quick(tmp_path), numbered(9), numbered(10))
    with pytest.raises(ValueError, match="data set has 9 classes and the model 10"):
        MRPFTrainer(model, quick(tmp_path), numbered(9), numbered(8, num_classes=9))


def named(*names: str) -> Dataset:
    values = np.zeros((20, 3, 16, 16), np.uint8)
    features = Features(pixel_values=Array3D((3, 16, 16), "uint8"), labels=ClassLabel(names=list(names)))
    return Dataset.from_dict({"pixel_values": values, "labels": [0, 1] * 10}, features=features)


def test_the_data_set_and_the_model_name_the_classes_alike(tmp_path):
    def build(**labels):
        return PrunedForImageClassification.from_backbone(
            "timm/resnet18", image_size=16, small_images=True, **NARROW, **labels
        )

    dog_first = build(id2label={0: "dog", 1: "cat"})
    message = r"class 0 is 'dog' for the model and 'cat' in the data set.*align_labels_with_mapping"
    for splits in (
        (named("cat", "dog"),),
        (named("dog", "cat"), named("cat", "dog")),
        (named("dog", "cat"), {"a": named("cat", "dog")}),
    ):
        with pytest.raises(ValueError, match=message):
            MRPFTrainer(dog_first, quick(tmp_path), *splits)
    with pytest.raises(ValueError, match=message):
        MRPFTrainer(dog_first, quick(tmp_path)).evaluate(named("cat", "dog"))
    for model, data in (
        (dog_first, named("dog", "cat")),
        (dog_first, named("cat", "dog").align_labels_with_mapping(dog_first.config.label2id, "labels")),
        (dog_first, named("0", "1")),
        (build(id2label={0: "0", 1: "1"}), named("cat", "dog")),
    ):
        names = dict(model.config.id2label)
        MRPFTrainer(model, quick(tmp_path), data, data)
        assert model.config.id2label == names
    unnamed = build(num_labels=2)
    MRPFTrainer(unnamed, quick(tmp_path), None, named("cat", "dog"))
    assert unnamed.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    MRPFTrainer(unnamed, quick(tmp_path), named("cat", "dog"))
    assert (unnamed.config.id2label, unnamed.config.label2id) == ({0: "cat", 1: "dog"}, {"cat": 0, "dog": 1})
    with pytest.raises(ValueError, match="class 0 is 'cat' for the model and 'dog'"):
        MRPFTrainer(build(num_labels=2), quick(tmp_path), named("cat", "dog"), named("dog", "cat"))


@pytest.mark.parametrize(("normalised", "steps"), [(True, 2), (False, 4)], ids=["BatchNorm", "none"])
def test_a_last_batch_of_one_image_is_left_out_where_batchnorm_cannot_train_on_it(
    tmp_path, data, caplog, normalised, steps
):
    net = plain_net()
    if normalised:  # over a map of one pixel
        net = nn.Sequential(*net[:3], nn.BatchNorm1d(8 * 16), net[3])
    args = quick(tmp_path, objective="standard", num_train_epochs=2, per_device_eval_batch_size=13)
    trainer = MRPFTrainer(net, args, data.train.select(range(33)), data.validation)
    with caplog.at_level("WARNING", "hf_mrpf"):
        trainer.train()
    assert (trainer.state.global_step, trainer.state.epoch, trainer.state.max_steps) == (steps, 2, steps)
    assert sum("a single image, is left out" in line for line in caplog.messages) == normalised
    assert len(trainer.get_eval_dataloader()) == 4, "an evaluation counts every image, 40 in batches of 13"
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [32, 1][: steps // 2]


def test_an_evaluation_before_training_does_not_mark_the_model_as_prepared(tmp_path, data, model):
    trainer = MRPFTrainer(model, quick(tmp_path, max_steps=1), data.train, data.validation)
    trainer.evaluate()
    assert getattr(trainer.model, "_is_accelerate_prepared", False)
    seen = []
    original = trainer.accelerator.prepare

    def prepare(*objects, **kwargs):
        seen.extend(getattr(o, "_is_accelerate_prepared", False) for o in objects if isinstance(o, nn.Module))
        return original(*objects, **kwargs)

    trainer.accelerator.prepare = prepare
    trainer.train()
    assert seen == [False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "tradez"}, r"objective='tradez' is not known; choose one of .*trades"),
        ({"allocation": "best"}, r"allocation='best' is not known.*uniform"),
        ({"importance": "l3"}, r"importance='l3' is not known.*magnitude"),
        ({"combine": "median"}, r"combine='median' is not known.*joint"),
        ({"sensitivity_method": "guess"}, r"sensitivity_method='guess' is not known.*ascent"),
        ({"target_metric": "bytes"}, r"target_metric='bytes' is not known.*params"),
        ({"round_to": "best"}, r"round_to=best must be a whole number, at least 1, or auto"),
        ({"latency_batch_size": 0}, r"latency_batch_size=0 must be a whole number, at least 1"),
        ({"target": 1.0}, r"target=1.0 is not a fraction kept in \(0, 1\)"),
        ({"max_ratio": 1.0}, r"max_ratio=1.0 must be in \(0, 1\)"),
        ({"eps": 8}, r"8.*8/255"),
        ({"min_channels": 0}, r"min_channels=0 must be a whole number, at least 1"),
        ({"calibration_sets": True}, r"calibration_sets=True must be a whole number"),
        ({"allocation": "damage", "calibration_sets": 1}, r"decides on another: give at least 2"),
        ({"allocation": "damage", "repair": False}, r"leave repair on and recalibration_samples above 0"),
        ({"allocation": "netadapt", "recalibration_samples": 0}, r"leave repair on and recalibration_samples above 0"),
        ({"norm": "l2", "eps": 8 / 255}, r"hardly an attack in l2: give eps, such as 0.5"),
        ({"gamma": float("inf")}, r"gamma=inf must be in \[0, 1\]"),
        ({"gamma": 5.0}, r"gamma=5.0 must be in \[0, 1\]"),
        ({"beta": -1.0}, r"beta=-1.0 must be a finite number, at least 0"),
        ({"beta": None}, r"beta=None must be a finite number"),
        ({"gamma": "0.1"}, r"gamma=0.1 must be in \[0, 1\]"),
        ({"num_train_epochs": -1}, r"num_train_epochs=-1 must be a finite number, at least 0"),
        ({"crop_padding": -1}, r"crop_padding=-1 must be a whole number, at least 0"),
        ({"crop_padding": 1.5}, r"crop_padding=1.5 must be a whole number, at least 0"),
        ({"per_device_train_batch_size": 0}, r"per_device_train_batch_size=0 must be a whole number, at least 1"),
        ({"per_device_eval_batch_size": 0}, r"per_device_eval_batch_size=0 must be a whole number, at least 1"),
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps=0 must be a whole number, at least 1"),
        ({"ignore": "backbone.layer4"}, r"give a list of names, such as \['backbone.layer4'\]"),
        ({"sensitivity_steps": 0}, r"sensitivity_steps=0 must be at least 1"),
        ({"sensitivity_steps": 3, "sensitivity_method": "first_order"}, r"goes with ascent or exact only"),
        ({"seed": -1}, r"seed=-1 must be a whole number, at least 0"),
        ({"seed": None}, r"seed=None must be a whole number"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1 would change nothing: each objective"),
        ({"remove_unused_columns": True}, r"remove_unused_columns=True would take away columns"),
        ({"bf16_full_eval": True}, r"bf16_full_eval would .*evaluation and pruning are in float32 here"),
        ({"fp16_full_eval": True}, r"fp16_full_eval would .*evaluation and pruning are in float32 here"),
        ({"optim_args": "momentun=0.9"}, r"optim_args='momentun=0.9' do not fit optim 'sgd', which takes momentum and"),
        ({"optim_args": "momentum=x"}, r"dampening \(numbers\) and nesterov \(true or false\), as in momentum"),
        ({"optim_args": "weight_decay=0.1"}, "weight decay is an option of its own"),
        ({"optim_args": "momentum"}, "optim_args='momentum' do not fit"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be a finite number, at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1 must be"),
        ({"optim": "adam", "optim_args": "momentum=0.9"}, r"optim_args='momentum=0.9' do not fit optim 'adam'"),
        ({"optim": "adam", "optim_args": "amsgrad=maybe"}, r"takes beta1, beta2 and eps \(numbers\) and amsgrad"),
        ({"optim": "adam", "optim_args": "beta1=0.5,0.9"}, r"optim_args='beta1=0.5,0.9' do not fit"),
        ({"max_ratio": "a"}, r"max_ratio=a must be in"),
    ],
)
def test_config_names_what_is_wrong_and_what_is_known(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        quick(tmp_path, **changes)


def test_config_defaults_follow_the_optimizer_and_survive_a_copy(tmp_path):
    sgd, adam = quick(tmp_path), quick(tmp_path, optim="adam")
    assert (str(sgd.optim.value), sgd.learning_rate, sgd.optim_args) == ("sgd", 0.05, "momentum=0.9,nesterov=true")
    assert (adam.optim, adam.learning_rate, adam.optim_args) == ("adam", 1e-3, None)
    assert dataclasses.replace(adam, num_train_epochs=2).optim == "adam"
    assert {dataclasses.replace(sgd, optim=name).optim_args for name in ("adam", "adamw_torch")} == {None}
    assert MRPFConfig(output_dir=str(tmp_path), use_cpu=True).attack == AttackConfig()
    assert sgd.eval_attack == AttackConfig(eps=0.1, num_steps=2)


def test_arguments_of_adam_reach_it(tmp_path, data):
    args = quick(tmp_path, optim="adam", optim_args="beta1=0.5, eps=1e-6,amsgrad=True", adam_beta2=0.99)
    defaults = MRPFTrainer(plain_net(), args, data.train).create_optimizer().defaults
    assert (defaults["betas"], defaults["eps"], defaults["amsgrad"]) == ((0.5, 0.99), 1e-6, True)


def test_with_bf16_the_attack_of_training_is_told_so(tmp_path, data, model):
    told = []

    def objective(network, images, labels, attack, **kwargs):
        told.append(attack.dtype)
        logits = network(images).logits
        return ObjectiveOutput(nn.functional.cross_entropy(logits, labels), logits)

    for half in (True, False):
        args = quick(tmp_path / str(half), bf16=half, max_steps=1, objective=objective)
        MRPFTrainer(model, args, data.train).train()
    assert told == ["bfloat16", "float32"]


def test_bf16_trains_in_it_and_measures_and_prunes_in_float32(tmp_path, data, model):
    seen = set()
    model.backbone.fc.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))

    def dtypes(run):
        seen.clear()
        result = run()
        return result, set(seen)

    args = quick(tmp_path, bf16=True, max_steps=1)
    trainer = MRPFTrainer(model, args, data.train, data.validation)
    trainer.evaluate()  # accelerate has put its autocast around the forward
    assert torch.bfloat16 not in dtypes(trainer.prune)[1]
    for _ in range(2):
        assert dtypes(trainer.evaluate)[1] == {torch.float32}
        assert torch.bfloat16 in dtypes(trainer.train)[1]
        plan, pruned_in = dtypes(trainer.prune)
        assert torch.bfloat16 not in pruned_in and plan.sensitivity["settings"]["attack"]["dtype"] == "float32"
    report, measured_in = dtypes(lambda: evaluate_robustness(trainer.model, data.validation, ("pgd20",)))
    assert (measured_in, report.dtype) == ({torch.float32}, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes(lambda: evaluate_robustness(trainer.model, data.validation, ("pgd20",)))[1] == {torch.float32}
    trainer.save_model(str(tmp_path / "saved"))
    saved = PrunedForImageClassification.from_pretrained(tmp_path / "saved")
    images = next(batches(data.validation, 8))[0]
    with torch.no_grad():
        assert torch.equal(saved.eval()(images).logits, trainer.model.eval()(images).logits)


def test_the_dtype_of_the_training_attack_is_a_setting_and_slow_where_it_has_no_instructions(tmp_path, caplog):
    with patch("hf_mrpf.config.has_bfloat16", return_value=False), caplog.at_level("WARNING", "hf_mrpf"):
        args = MRPFConfig(output_dir=str(tmp_path), use_cpu=True, attack_dtype="bfloat16")
    assert "no instructions for it" in caplog.text
    assert (args.attack.dtype, args.eval_attack.dtype) == ("bfloat16", "float32")
    with pytest.raises(ValueError, match="dtype is 'half'; an attack computes in one of float32, bfloat16"):
        MRPFConfig(output_dir=str(tmp_path), use_cpu=True, attack_dtype="half")


@pytest.mark.parametrize(
    "machine, avx512, tiles, imitated, expected",
    [
        ("x86_64", False, False, True, False),  # oneDNN says yes where it imitates them
        ("AMD64", True, False, True, True),
        ("x86_64", False, True, True, True),
        ("aarch64", False, False, True, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_instructions_for_bfloat16_are_those_of_the_processor(machine, avx512, tiles, imitated, expected):
    with (
        patch("platform.machine", return_value=machine),
        patch("torch.cpu._is_avx512_bf16_supported", return_value=avx512),
        patch("torch.cpu._is_amx_tile_supported", return_value=tiles),
        patch("torch.ops.mkldnn._is_mkldnn_bf16_supported", return_value=imitated),
    ):
        assert has_bfloat16() is expected


@pytest.mark.parametrize("kind, pins", [("cpu", False), ("mps", False), ("cuda", True)])
def test_memory_is_pinned_only_where_torch_does_so_without_a_warning(tmp_path, monkeypatch, kind, pins):
    monkeypatch.setattr(MRPFConfig, "device", torch.device(kind))
    assert MRPFConfig(output_dir=str(tmp_path)).dataloader_pin_memory is pins


@pytest.mark.parametrize("count, told", [(0, False), (1, False), (2, True)])
def test_several_gpus_in_one_process_are_told_of(tmp_path, monkeypatch, caplog, count, told):
    monkeypatch.setattr(MRPFConfig, "n_gpu", count)
    with caplog.at_level("WARNING", "hf_mrpf"):
        MRPFConfig(output_dir=str(tmp_path), use_cpu=True)
    assert ("2 GPUs in one process" in caplog.text) is told

"""What users of `Trainer` hand over besides: other data sets, optimizers of a subclass, hooks; served, or refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file
from test_trainer import QUICK, plain_net
from torch import nn
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from hf_mrpf import AttackConfig, MRPFConfig, MRPFTrainer, PrunedForImageClassification, load_image_data
from hf_mrpf.data import as_pixel_dataset

SHORT = {"num_steps": 1, "eval_num_steps": 5, "calibration_set_size": 8, "recalibration_samples": 32, "max_steps": 2}


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=64, max_eval_samples=24)


@pytest.fixture
def model():
    torch.manual_seed(1)
    sizes = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 16), "stem_type": "deep", "stem_width": 4}
    return PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, **sizes
    )


def quick(folder, **changes) -> MRPFConfig:
    return MRPFConfig(str(folder), **(QUICK | SHORT | changes))


class StopAfter(TrainerCallback):
    """Ctrl-C in the middle of an evaluation."""

    def __init__(self, steps: int):
        self.left = steps

    def on_prediction_step(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


# An evaluation is one batch: before, removed, repaired, recalibrated.
@pytest.mark.parametrize("batches", [2, 3, 4])
def test_a_pruning_that_is_interrupted_has_not_been(tmp_path, data, model, batches):
    trainer = MRPFTrainer(model, quick(tmp_path / "a"), data.train, data.validation)
    trainer.train()
    own = dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stop = StopAfter(batches)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.prune()
    assert model.config.pruning is None and not trainer.plans and not trainer.pruning_report
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.backbone.layer4[0].conv1.out_channels == 16
    trainer.train()  # with the optimizer of before
    trainer.remove_callback(stop)
    plan = trainer.prune()
    kept = sum(parameter.numel() for parameter in model.parameters())
    assert kept == plan.after["params"] < plan.before["params"] == sum(tensor.numel() for tensor in own.values())
    assert list(trainer.pruning_report) == ["before", "removed", "repaired", "recalibrated"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"target": 0.01}, "target 0.01 cannot be met"), ({"ignore": ["layer4"]}, "ignore names 'layer4', which is no")],
)
def test_what_needs_no_measurement_is_refused_before_one(tmp_path, data, model, changes, message):
    with pytest.raises(ValueError, match=message):
        MRPFTrainer(model, quick(tmp_path, **changes), data.train).prune()
    assert not (tmp_path / "sensitivity.jsonl").exists()


def test_a_subclass_makes_its_own_optimizer_and_prunes(tmp_path, data, model):
    class Own(MRPFTrainer):
        def create_optimizer(self, *args, **kwargs):
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
            return self.optimizer

    trainer = Own(model, quick(tmp_path), data.train)
    trainer.train()
    trainer.prune()
    trainer.train()
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    given = Own(model, quick(tmp_path), data.train, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    with pytest.raises(ValueError, match="given an optimizer"):
        given.prune()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for label in range(20):
            yield {"pixel_values": torch.rand(3, 16, 16, generator=generator), "labels": label % 10}


def test_data_sets_of_other_kinds_and_columns_are_evaluated_and_trained_on(tmp_path, data):
    each = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = MRPFTrainer(plain_net(), quick(tmp_path, **each), data.train, Stream())
    trainer.train()
    assert "robust_accuracy" in str(trainer.state.log_history)

    raw = Dataset.from_dict(
        {
            "pixel_values": [image.numpy() for image in data.validation["pixel_values"][:]],
            "label": data.validation["labels"][:],
            "index": list(range(len(data.validation)))[::-1],
        }
    )
    own, usual = (MRPFTrainer(plain_net(), quick(tmp_path), data.train, images) for images in (raw, data.validation))
    own.model.load_state_dict(usual.model.state_dict())
    assert own.evaluate()["eval_robust_accuracy"] == usual.evaluate()["eval_robust_accuracy"]

    own.train_dataset = raw  # in place of the one that the trainer was made with
    own.train()
    own.prune()
    assert isinstance(concatenate_datasets([own.train_dataset, as_pixel_dataset(raw)]), Dataset)


def test_validation_images_numbered_otherwise_than_training_images_are_refused_for_a_plain_network(tmp_path, data):
    from datasets import ClassLabel

    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def named(split, names):
        images = {"pixel_values": [image.numpy() for image in split["pixel_values"][:]], "label": split["labels"][:]}
        return Dataset.from_dict(images).cast_column("label", ClassLabel(names=names))

    train = named(data.train, names)
    MRPFTrainer(plain_net(), quick(tmp_path), train, named(data.validation, names))
    with pytest.raises(ValueError, match="class 0 is 'zero' for the model and 'nine' in the data set: it has no names"):
        MRPFTrainer(plain_net(), quick(tmp_path), train, named(data.validation, names[::-1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_loss_func": print}, r"compute_loss_func would not be called.*MRPFConfig\(objective="),
        ({"preprocess_logits_for_metrics": print}, "preprocess_logits_for_metrics has no place here"),
        ({"model": torch.compile(nn.Linear(2, 2), backend="eager")}, r"model is compiled.*model\._orig_mod"),
    ],
)
def test_arguments_that_would_change_nothing_or_fail_late_are_refused(tmp_path, data, options, message):
    with pytest.raises(ValueError, match=message):
        MRPFTrainer(**({"model": plain_net(), "args": quick(tmp_path), "train_dataset": data.train} | options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True would hand over a batch at a time.*leave .* at False"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False would hand over.*leave .* at True"),
    ],
)
def test_evaluations_batch_by_batch_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        quick(tmp_path, **changes)


def test_metrics_of_the_user_get_images_and_losses_where_they_ask_for_them(tmp_path, data, model):
    def metrics(prediction):
        assert prediction.losses.shape == (24,)
        return {"brightness": float(prediction.inputs.mean())}

    args = quick(tmp_path, include_for_metrics=["inputs", "loss"])
    found = MRPFTrainer(model, args, data.train, data.validation, compute_metrics=metrics).evaluate()
    pixels = data.validation["pixel_values"][:]
    assert found["eval_brightness"] == pytest.approx(float(pixels.float().mean() / 255), abs=1e-6)


def test_numbers_of_numpy_are_taken(tmp_path, data, model):
    args = quick(tmp_path, eps=np.float32(0.1), target=np.float64(0.5), num_steps=np.int64(1), seed=np.int32(3))
    assert all(type(getattr(args, name)) in (int, float) for name in ("eps", "target", "num_steps", "seed"))
    attack = AttackConfig(eps=np.float32(0.1), step_size=np.float32(0.05))
    assert (type(attack.eps), type(attack.step_size)) == (float, float)
    trainer = MRPFTrainer(model, args, data.train)
    plan = trainer.prune()
    plan.save(tmp_path / "plan.json")


def test_images_of_plain_networks_reach_the_metrics_too(tmp_path, data):
    args, seen = quick(tmp_path, include_for_metrics=["inputs"]), []
    metrics = {"compute_metrics": lambda prediction: seen.append(prediction.inputs) or {}}
    MRPFTrainer(plain_net(), args, data.train, data.validation, **metrics).evaluate()
    assert seen[0].shape == (24, 3, 16, 16) and 0 <= seen[0].min() < seen[0].max() <= 1


def test_training_images_that_come_later_are_looked_at_as_those_of_the_beginning(tmp_path, data, model):
    model.config.id2label = {index: f"LABEL_{index}" for index in range(10)}
    trainer = MRPFTrainer(model, quick(tmp_path, horizontal_flip=None))
    trainer.train_dataset = data.train
    trainer.train()
    assert trainer.horizontal_flip is False and model.config.id2label[3] == "3"
    images = {"pixel_values": [np.zeros((3, 16, 16), np.uint8)] * 12, "label": list(range(12))}
    plain = MRPFTrainer(plain_net(), quick(tmp_path), data.train)
    plain.train_dataset = Dataset.from_dict(images)
    with pytest.raises(ValueError, match="12 classes and the model 10 outputs"):
        plain.train()


def test_an_optimizer_that_is_handed_over_after_a_training_is_refused_by_prune(tmp_path, data, model):
    trainer = MRPFTrainer(model, quick(tmp_path), data.train)
    trainer.train()
    trainer.prune()
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.train()
    with pytest.raises(ValueError, match="given an optimizer"):
        trainer.prune()


def test_an_interrupted_pruning_leaves_no_autocast_behind(tmp_path, data, model):
    images = data.validation["pixel_values"][:4].float() / 255
    before = model.eval()(images).logits.detach()
    stop = StopAfter(1)
    trainer = MRPFTrainer(model, quick(tmp_path, bf16=True), data.train, data.validation, callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        trainer.prune()
    assert torch.equal(model.eval()(images).logits, before)
    trainer.remove_callback(stop)
    trainer.prune()
    trainer.train()


def test_a_network_with_an_expanded_buffer_is_rolled_back(tmp_path, data):
    net = plain_net()
    net.register_buffer("expanded", torch.zeros(1).expand(4))
    trainer = MRPFTrainer(net, quick(tmp_path), data.train, data.validation, callbacks=[StopAfter(2)])
    weight = net[0].weight
    with pytest.raises(KeyboardInterrupt):
        trainer.prune()
    assert net[0].weight is weight


class Tied(nn.Module):
    """A weight under two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(width, 8, 3, padding=1) for width in (3, 8, 8))
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 10)

    def forward(self, pixels):
        return self.head(self.second(self.first(self.stem(pixels))).mean((2, 3)))


EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}


def test_a_network_with_a_tied_weight_is_trained_and_resumed(tmp_path, data):
    whole = MRPFTrainer(Tied(), quick(tmp_path, **EACH_STEP, load_best_model_at_end=True), data.train, data.validation)
    whole.train()
    again = MRPFTrainer(Tied(), quick(tmp_path, **EACH_STEP), data.train, data.validation)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert torch.equal(again.model.stem.weight, saved["stem.weight"])
    assert again.model.second.weight is again.model.first.weight


def test_the_best_weights_of_a_bare_transformers_model_are_loaded_whole(tmp_path, data):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
    config = ViTConfig(image_size=16, patch_size=4, num_labels=10, **sizes)
    first = {"metric_for_best_model": "loss", "greater_is_better": True, "objective": "standard", "learning_rate": 0.05}
    args = quick(tmp_path, **EACH_STEP, **first, load_best_model_at_end=True)
    trainer = MRPFTrainer(ViTForImageClassification(config), args, data.train, data.validation)
    trainer.train()
    best = ViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())
    args = quick(tmp_path, **EACH_STEP, **first)
    again = MRPFTrainer(ViTForImageClassification(config), args, data.train, data.validation)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3

"""A model pruned between two trainings in one folder: its optimizer is its own, and so are its checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from test_trainer import NARROW, quick
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback

from hf_mrpf import (
    AttackConfig,
    MRPFTrainer,
    PrunedForImageClassification,
    compress,
    evaluate_robustness,
    load_image_data,
    plan_pruning,
    prune,
)
from hf_mrpf.checkpoints import newest_complete
from hf_mrpf.data import batches

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=64, max_eval_samples=20)


def model():
    torch.manual_seed(1)
    return PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, **NARROW
    )


def uniform(network):
    return plan_pruning(network, torch.zeros(1, 3, 16, 16), target=0.5, allocation="uniform")


STANDARD = {"objective": "standard", "max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 64}


def by_prune(network, data):
    prune(network, uniform(network))


def by_compress(network, data):
    sets = list(batches(data.train, 64))
    compress(network, sets, attack=AttackConfig(num_steps=1), allocation="uniform")


@pytest.mark.parametrize("cut", [by_prune, by_compress])
def test_a_training_after_any_pruning_trains_the_weights_that_are_left(tmp_path, data, cut):
    trainer = MRPFTrainer(model(), quick(tmp_path, **STANDARD), data.train)
    trainer.train()
    cut(trainer.model, data)
    before = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    assert [name for name, tensor in trainer.model.named_parameters() if torch.equal(tensor, before[name])] == []


def card_of(trainer, monkeypatch):
    """The card that the trainer would push."""
    monkeypatch.setattr("hf_mrpf.publishing.push_folder", lambda *args, **kwargs: None)
    trainer.hub_model_id = "alice/digits"
    trainer.push_to_hub()
    return (Path(trainer.args.output_dir) / "README.md").read_text()


@pytest.mark.parametrize("cut", [None, by_prune, by_compress])
def test_after_pruning_nothing_is_said_of_a_training_until_there_is_one(tmp_path, data, monkeypatch, cut):
    options = STANDARD | {"max_steps": -1, "num_train_epochs": 1, "eval_strategy": "epoch", "allocation": "uniform"}
    trainer = MRPFTrainer(model(), quick(tmp_path, **options), data.train, data.validation)
    trainer.train()
    assert trainer.best_and_last()
    if cut:
        cut(trainer.model, data)
    else:
        trainer.prune()
    trainer.evaluate()  # of the pruned model, and of no epoch
    assert trainer.best_and_last() == {}
    card = card_of(trainer, monkeypatch)
    assert cut or ("## How it was pruned" in card and "Seed 42." in card)  # the trainer was not told of the others
    said = ("## How it was fine-tuned", "## How it was trained", "Best and last", "| objective |")
    assert not any(text in card for text in said)
    trainer.train()
    assert trainer.best_and_last()["last"]["epoch"] == 1
    card = card_of(trainer, monkeypatch)
    assert ("## How it was trained" if cut else "## How it was fine-tuned") in card and "| last (epoch 1) |" in card
    assert "| num_train_epochs | 1 |" in card and "max_steps" not in card


def test_the_card_counts_the_steps_of_a_training_that_steps_ended(tmp_path, data, monkeypatch):
    trainer = MRPFTrainer(model(), quick(tmp_path, **STANDARD, num_train_epochs=3), data.train, data.validation)
    trainer.train()
    card = card_of(trainer, monkeypatch)
    assert "| max_steps | 1 |" in card and "num_train_epochs" not in card


def test_the_card_of_the_example_scripts_is_that_of_a_push(tmp_path, data, monkeypatch):
    options = STANDARD | {"allocation": "uniform", "hub_model_id": "alice/digits"}
    trainer = MRPFTrainer(model(), quick(tmp_path / "run", **options), data.train, data.validation)
    trainer.prune()
    trainer.create_model_card(tasks="image-classification", dataset="digits", finetuned_from="timm/resnet18")
    folder = Path(trainer.args.output_dir)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert written.keys() == {"README.md", "mrs.png", "pruning_plan.json", "robustness_report.json"}
    assert "## How it was pruned" in written["README.md"].decode() and "alice/digits" in written["README.md"].decode()
    assert card_of(trainer, monkeypatch) == written["README.md"].decode()
    report = evaluate_robustness(trainer.model, data.test.select(range(10)), num_samples=10)
    trainer.create_model_card(report=report)
    assert "10 images" in (folder / "README.md").read_text()


def test_of_several_validation_splits_the_first_is_on_the_card(tmp_path, data):
    ten, five = (data.validation.select(range(count)) for count in (10, 5))
    options = STANDARD | {"hub_model_id": "alice/digits"}
    trainer = MRPFTrainer(model(), quick(tmp_path, **options), data.train, {"ten": ten, "five": five})
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "n = 10 images" in card and "No measurement came" not in card


def test_the_card_of_another_model_is_that_of_transformers(tmp_path, data):
    shape = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    network = ResNetForImageClassification(ResNetConfig(num_labels=10, **shape))
    trainer = MRPFTrainer(network, quick(tmp_path, **STANDARD), data.train)
    trainer.create_model_card(model_name="eight-channels")
    assert "# eight-channels" in (tmp_path / "README.md").read_text()


class Prunes(TrainerCallback):
    def __init__(self, event):
        setattr(self, event, self.prune)

    def prune(self, args, state, control, *, model, **kwargs):
        if state.global_step < 2:
            prune(model, uniform(model))


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end"])
def test_pruning_under_an_optimizer_in_use_or_given_is_refused(tmp_path, data, event):
    args = quick(tmp_path, **STANDARD | {"max_steps": 2})
    with pytest.raises(ValueError, match=r"pruned after the optimizer was made.*Use trainer.prune\(plan\) before"):
        MRPFTrainer(model(), args, data.train, callbacks=[Prunes(event)]).train()
    network = model()
    # A part of the model is no fault, nor is something else beside it.
    held = [*network.backbone.layer1.parameters(), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(held, lr=0.1)
    trainer = MRPFTrainer(network, args, data.train, optimizers=(optimizer, None))
    trainer.train()
    prune(network, uniform(network))
    with pytest.raises(ValueError, match="pruned after the optimizer was made"):
        trainer.train()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, data):
    """Folder of three steps of a dense model and one of the pruned one, which a kill ended, and that model."""
    folder = tmp_path_factory.mktemp("run")
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = MRPFTrainer(model(), quick(folder, **STANDARD | saving | {"max_steps": 3}), data.train)
    trainer.train()
    prune(trainer.model, uniform(trainer.model))
    trainer.args.max_steps = 1
    trainer.train()
    return folder, trainer.model


def resumed(folder, network, data, place=True, **changes):
    args = quick(folder, **STANDARD | {"max_steps": 3, "save_strategy": "steps", "save_steps": 1} | changes)
    trainer = MRPFTrainer(network, args, data.train)
    trainer.train(resume_from_checkpoint=place)
    return trainer


def test_going_on_takes_the_checkpoints_of_the_shapes_of_the_model(interrupted, data, tmp_path, caplog):
    folder, pruned = interrupted
    assert newest_complete(folder).name == "checkpoint-3"
    assert newest_complete(folder, model=pruned).name == "checkpoint-1"
    copied = shutil.copytree(folder, tmp_path / "run")
    loaded = PrunedForImageClassification.from_pretrained(copied / "checkpoint-1")
    trainer = resumed(copied, loaded, data)
    assert trainer.state.global_step == 3
    assert any("checkpoint-3 is skipped as that of another model, or of before" in line for line in caplog.messages)
    assert newest_complete(copied, model=loaded).name == "checkpoint-3"  # written over
    message = r"no complete checkpoint of this model\. .*from_pretrained\('.*checkpoint-3'\)"
    with pytest.raises(ValueError, match=message):
        resumed(copied, model(), data)


def test_a_checkpoint_of_another_shape_is_refused_with_advice(interrupted, data):
    folder, pruned = interrupted
    message = r"checkpoint-1 is a checkpoint of another model, .* has the shape.*from_pretrained\('.*-1'\)"
    with pytest.raises(ValueError, match=message):
        resumed(folder, model(), data, str(folder / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"checkpoint-3 is a checkpoint of another model"):
        resumed(folder, pruned, data, str(folder / "checkpoint-3"))


def test_a_best_checkpoint_that_a_later_training_wrote_over_is_not_loaded(interrupted, data, tmp_path):
    copied = shutil.copytree(interrupted[0], tmp_path / "run")
    state = copied / "checkpoint-2" / "trainer_state.json"
    text = state.read_text().replace('"best_global_step": null', '"best_global_step": 1')
    state.write_text(text.replace('"best_model_checkpoint": null', f'"best_model_checkpoint": "{copied}/checkpoint-1"'))
    (copied / "checkpoint-2" / "complete.json").write_text('{"files": {}}')
    trainer = resumed(copied, model(), data, str(copied / "checkpoint-2"))
    assert trainer.state.best_model_checkpoint is None


def test_what_could_not_be_saved_is_not_trained(tmp_path, data):
    network = model()
    network.backbone.act1 = torch.nn.SiLU()
    with pytest.raises(ValueError, match="act1 is a SiLU, and the recipe builds a ReLU"):
        MRPFTrainer(network, quick(tmp_path, **STANDARD), data.train)

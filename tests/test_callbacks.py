"""The watch for overfitting: scripted metrics, and trainings that really overfit."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features
from torch import nn
from transformers import TrainerControl, TrainerState

from hf_mrpf import AttackConfig, MRPFConfig, MRPFTrainer, load_image_data, pgd_attack
from hf_mrpf.callbacks import OverfittingWatch, Reading, has_fallen, margin

QUICK = {
    "eps": 0.1,
    "per_device_train_batch_size": 32,
    "crop_padding": 0,
    "horizontal_flip": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def settings(folder, **changes) -> MRPFConfig:
    return MRPFConfig(output_dir=str(folder), **(QUICK | {"eval_num_steps": 20} | changes))


def play(watch, args, validation, training, n=1000, split="eval", first=1):
    """Shows the watch one evaluation an epoch; the training accuracies may be None."""
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    watch.on_train_begin(args, state, control)
    for epoch, (accuracy, train) in enumerate(zip(validation, training, strict=True), start=first):
        state.epoch, state.global_step = float(epoch), 10 * epoch
        metrics = {f"{split}_accuracy": 0.9, f"{split}_robust_accuracy": accuracy}
        metrics |= {} if train is None else {f"{split}_train_robust_accuracy": train}
        watch.on_evaluate(args, state, control, metrics=metrics, eval_dataloader=SimpleNamespace(dataset=range(n)))
    return state


def test_robust_overfitting_is_said_once_in_one_line(tmp_path, caplog):
    watch = OverfittingWatch()
    with caplog.at_level(logging.WARNING, logger="hf_mrpf"):
        play(watch, settings(tmp_path), [0.40, 0.50, 0.42, 0.41, 0.40], [0.5, 0.6, 0.7, 0.8, 0.9])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == watch.warnings[0]["message"]
    assert "\n" not in line
    for part in (
        "robust overfitting (arXiv 2002.11569)",
        "under PGD-20 is 41.0% at epoch 4 (n = 1,000)",
        "after 50.0% under PGD-20 at epoch 2",
        "10 steps of 0.025) went from 60.0% to 80.0%",
        "--load_best_model_at_end would keep it",
    ):
        assert part in line, part
    assert [(warning["kind"], warning["epoch"], warning["step"]) for warning in watch.warnings] == [("robust", 4, 40)]


def test_catastrophic_overfitting_is_said_at_once_and_robust_overfitting_is_not_said_after_it(tmp_path, caplog):
    watch = OverfittingWatch()
    saved = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    args = settings(tmp_path, num_steps=1, step_size=0.02, **saved)
    with caplog.at_level(logging.WARNING, logger="hf_mrpf"):
        play(watch, args, [0.30, 0.45, 0.02, 0.0, 0.0, 0.0], [0.4, 0.5, 0.9, 0.95, 0.95, 0.97])
    assert [(warning["kind"], warning["epoch"]) for warning in watch.warnings] == [("catastrophic", 3)]
    line = caplog.records[0].getMessage()
    assert len(caplog.records) == 1
    assert "catastrophic overfitting (arXiv 2001.03994, 2007.02617)" in line
    assert "more steps (--num_steps)" in line
    assert "loaded at the end" in line


def test_both_are_said_where_the_collapse_comes_later(tmp_path):
    watch = OverfittingWatch()
    play(watch, settings(tmp_path), [0.5, 0.4, 0.4, 0.1, 0.1], [0.5, 0.6, 0.7, 0.9, 0.9])
    assert [warning["kind"] for warning in watch.warnings] == ["robust", "catastrophic"]


def test_a_training_attack_that_never_finds_anything_does_not_hide_a_collapse(tmp_path):
    watch = OverfittingWatch()
    play(watch, settings(tmp_path), [0.6, 0.4, 0.4, 0.1], [1.0, 1.0, 1.0, 1.0])
    assert [(warning["kind"], warning["epoch"]) for warning in watch.warnings] == [("catastrophic", 4)]


@pytest.mark.parametrize(
    ("validation", "training", "n"),
    [
        ([0.3, 0.4, 0.45, 0.47, 0.46, 0.47], [0.3, 0.4, 0.5, 0.5, 0.5, 0.5], 1000),  # no overfitting
        ([0.50, 0.35, 0.34, 0.36], [0.5, 0.6, 0.7, 0.8], 100),  # 15 points are within the noise of 100 images
        ([0.50, 0.28, 0.49, 0.28, 0.49], [0.5, 0.6, 0.7, 0.8, 0.8], 100),  # never twice in a row
        ([0.5, 0.3, 0.1, 0.1], [0.6, 0.4, 0.1, 0.1], 1000),  # training is getting worse too: it diverges
        ([0.5, 0.3, 0.1, 0.1], [None] * 4, 1000),  # nothing is attacked in training
        ([0.06, 0.02, 0.02], [0.1, 0.2, 0.3], 100),  # a collapse from next to nothing is noise
    ],
)
def test_noise_and_trainings_without_overfitting_say_nothing(tmp_path, caplog, validation, training, n):
    watch = OverfittingWatch()
    with caplog.at_level(logging.WARNING, logger="hf_mrpf"):
        play(watch, settings(tmp_path), validation, training, n)
    assert not watch.warnings
    assert not caplog.records


def test_the_margin_covers_the_noise_of_two_samples():
    torch.manual_seed(0)
    n, p = 200, 0.45
    counts = torch.distributions.Binomial(n, torch.full((2, 20_000), p)).sample() / n
    readings = [[Reading(value, n, "PGD-20", train, 1.0) for value in row.tolist()] for train, row in enumerate(counts)]
    alarms = sum(has_fallen(first, second) for first, second in zip(*readings, strict=True))
    assert 0.003 < alarms / 20_000 < 0.008  # half of a hundredth: the margin has two sides
    assert margin(readings[0][0], readings[1][0]) == pytest.approx(2.576 * (2 * 0.45 * 0.55 / n) ** 0.5, rel=0.05)


def test_several_splits_are_watched_each_by_itself(tmp_path):
    watch, args = OverfittingWatch(), settings(tmp_path)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    watch.on_train_begin(args, state, control)
    for epoch, (a, b, train) in enumerate([(0.6, 0.3, 0.5), (0.6, 0.3, 0.6), (0.6, 0.05, 0.7)], start=1):
        state.epoch, state.global_step = float(epoch), epoch
        for split, accuracy in (("eval_a", a), ("eval_b", b)):
            metrics = {f"{split}_robust_accuracy": accuracy}
            metrics |= {"eval_a_train_robust_accuracy": train} if split == "eval_a" else {}
            loader = SimpleNamespace(dataset=range(500))
            watch.on_evaluate(args, state, control, metrics=metrics, eval_dataloader=loader)
    assert [(warning["kind"], warning["epoch"]) for warning in watch.warnings] == [("catastrophic", 3)]


def test_what_was_seen_before_an_interruption_counts_after_it(tmp_path):
    args, watch = settings(tmp_path), OverfittingWatch()
    play(watch, args, [0.5, 0.4], [0.5, 0.6])
    file = tmp_path / "trainer_state.json"
    TrainerState(global_step=20, stateful_callbacks=[watch]).save_to_json(str(file))
    state, control = TrainerState.load_from_json(str(file)), TrainerControl()
    again = OverfittingWatch()
    again.on_train_begin(args, state, control)
    state.epoch, state.global_step = 3.0, 30
    metrics = {"eval_robust_accuracy": 0.4, "eval_train_robust_accuracy": 0.7}
    again.on_evaluate(args, state, control, metrics=metrics, eval_dataloader=SimpleNamespace(dataset=range(1000)))
    assert [warning["kind"] for warning in again.warnings] == ["robust"]
    again.on_train_begin(args, TrainerState(stateful_callbacks=[again]), control)  # a new training, a new story
    assert not again.warnings
    old = TrainerState.load_from_json(str(file))
    old.stateful_callbacks.clear()  # a checkpoint of an earlier version
    again.on_train_begin(args, old, control)
    assert json.dumps(old.stateful_callbacks)


def test_the_robustness_of_mere_guessing_is_no_best(tmp_path, monkeypatch, data):
    args, rows = settings(tmp_path), [(0.11, 0.1), (0.0, 0.2), (0.0, 0.3)]
    assert not evaluations(monkeypatch, data, args, Probe(), rows).warnings
    assert evaluations(monkeypatch, data, args, Probe(), [(0.21, 0.1), *rows[1:]]).warnings


def test_broken_weights_are_left_to_the_next_save_to_tell(tmp_path, monkeypatch, data):
    args, probe = settings(tmp_path, eval_num_steps=2), Probe(0.5)
    watch, state, control = OverfittingWatch(), TrainerState(is_world_process_zero=True), TrainerControl()
    monkeypatch.setattr("hf_mrpf.callbacks.evaluate_robustness", probe)
    loader = SimpleNamespace(dataset=data.test)
    metrics = {
        "eval_robust_accuracy": 0.1,
        "eval_train_robust_accuracy": 0.1,
        "eval_adversarial_loss_gap": float("nan"),
    }
    watch.on_evaluate(args, state, control, metrics=metrics, model=nn.Identity(), eval_dataloader=loader)
    assert not probe.calls


def test_what_is_evaluated_after_a_training_is_none_of_it(tmp_path):
    watch, args = OverfittingWatch(), settings(tmp_path)
    state = play(watch, args, [0.5, 0.53], [0.5, 0.6])
    watch.on_train_end(args, state, TrainerControl())
    metrics = {"eval_robust_accuracy": 0.0}
    loader = SimpleNamespace(dataset=range(1000))
    watch.on_evaluate(args, state, TrainerControl(), metrics=metrics, eval_dataloader=loader)
    assert not watch.warnings


class Probe:
    """In the place of `evaluate_robustness`: gives the scripted PGD-20 accuracies, and remembers what was asked."""

    def __init__(self, *accuracies):
        self.left, self.calls = list(accuracies), []

    def __call__(self, model, data, attacks, attack, *, num_samples, **options):
        self.calls.append((attacks, attack, num_samples))
        n = min(num_samples, len(data))
        return SimpleNamespace(attacks={"pgd20": self.left.pop(0)}, num_samples=n)


def evaluations(monkeypatch, data, args, probe, rows):
    monkeypatch.setattr("hf_mrpf.callbacks.evaluate_robustness", probe)
    watch, state, control = OverfittingWatch(), TrainerState(is_world_process_zero=True), TrainerControl()
    watch.on_train_begin(args, state, control)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    loader = MRPFTrainer(model, args, eval_dataset=data.test).get_eval_dataloader()  # what a training hands over
    for epoch, (accuracy, train) in enumerate(rows, start=1):
        state.epoch, state.global_step = float(epoch), epoch
        metrics = {"eval_robust_accuracy": accuracy, "eval_train_robust_accuracy": train}
        watch.on_evaluate(args, state, control, metrics=metrics, model=nn.Identity(), eval_dataloader=loader)
    return watch


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=320, max_eval_samples=160)


def test_a_collapse_under_a_weaker_attack_is_confirmed_with_pgd20(tmp_path, monkeypatch, data):
    args, rows = settings(tmp_path, eval_num_steps=10), [(0.6, 0.5), (0.05, 0.9), (0.05, 0.9), (0.05, 0.9)]
    probe = Probe(0.01)
    watch = evaluations(monkeypatch, data, args, probe, rows[:2])
    assert [warning["kind"] for warning in watch.warnings] == ["catastrophic"]
    assert "under PGD-20 is 1.0% at epoch 2 (n = 128), after 60.0% under PGD-10" in watch.warnings[0]["message"]
    ((attacks, attack, count),) = probe.calls
    assert (attacks, attack.eps, attack.step_size, count) == (["pgd20"], 0.1, None, 128)
    # PGD-20 at its usual step does not see a collapse: the word is not used.
    watch = evaluations(monkeypatch, data, args, Probe(0.5, 0.5, 0.5), rows)
    assert [warning["kind"] for warning in watch.warnings] == ["robust"]


@pytest.mark.parametrize("changes", [{"eval_num_steps": 2}, {"eval_num_steps": 20, "step_size": 0.1}])
def test_an_evaluation_that_could_not_show_a_collapse_is_helped_by_pgd20(tmp_path, monkeypatch, data, changes):
    args = settings(tmp_path, num_steps=1, **changes)
    probe = Probe(0.4, 0.45, 0.0)
    watch = evaluations(monkeypatch, data, args, probe, [(0.6, 0.5), (0.7, 0.6), (0.9, 0.9)])
    assert [(warning["kind"], warning["epoch"]) for warning in watch.warnings] == [("catastrophic", 3)]
    assert "after 45.0% under PGD-20 at epoch 2" in watch.warnings[0]["message"]
    assert len(probe.calls) == 3


def patterns(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight smooth patterns of 8x8 pixels with noise: images on which one step of an attack is easily overfitted."""
    shapes = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    shapes = nn.functional.interpolate(shapes, size=8, mode="bilinear")
    labels = torch.arange(n) % 8
    noise = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 0.25 * shapes[labels] + 0.1 * noise).clamp(0, 1), labels


def as_data_set(images: torch.Tensor, labels: torch.Tensor) -> Dataset:
    names = [str(label) for label in range(8)]
    features = Features({"pixel_values": Array3D((3, 8, 8), "float32"), "labels": ClassLabel(names=names)})
    return Dataset.from_dict({"pixel_values": images.numpy(), "labels": labels.tolist()}, features=features)


@pytest.mark.slow
def test_training_against_one_short_step_is_seen_to_overfit_catastrophically(tmp_path, caplog):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 64, 128), nn.ReLU(), nn.Linear(128, 8),
    )  # fmt: skip
    images, labels = patterns(600, 1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for epoch in range(30):  # a network that is robust to begin with: eps grows to 0.16 in 16 epochs
        attack = AttackConfig(eps=0.16 * min(1.0, epoch / 15), num_steps=3)
        for batch in torch.randperm(len(images)).split(32):
            adversarial = pgd_attack(net, images[batch], labels[batch], attack)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(adversarial), labels[batch]).backward()
            optimizer.step()
    one_step = {"objective": "pgd", "eps": 0.16, "num_steps": 1, "step_size": 0.01, "random_start": False}
    schedule = {"optim": "adam", "learning_rate": 3e-3, "lr_scheduler_type": "constant_with_warmup", "max_steps": 80}
    often = {"eval_strategy": "steps", "eval_steps": 8, "warmup_steps": 40}
    args = settings(tmp_path, **one_step, **schedule, **often)
    trainer = MRPFTrainer(net, args, as_data_set(images, labels), as_data_set(*patterns(300, 2)))
    with caplog.at_level(logging.WARNING, logger="hf_mrpf"):
        trainer.train()
    assert "catastrophic" in [warning["kind"] for warning in trainer.warnings]
    assert "catastrophic overfitting" in caplog.text

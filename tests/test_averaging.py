"""The moving average of weights: its formula, what is evaluated and saved, and that a resume goes on bit for bit."""

import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from hf_mrpf import MRPFConfig, MRPFTrainer, load_image_data
from hf_mrpf.averaging import TRAINING_WEIGHTS, WeightAverage
from hf_mrpf.data import batches

DECAY = 0.7
SETTINGS = {
    "objective": "pgd",
    "eps": 0.1,
    "num_steps": 1,
    "eval_num_steps": 1,
    "per_device_train_batch_size": 32,
    "crop_padding": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "max_steps": 4,
    "ema_decay": DECAY,
}


class Net(nn.Module):
    """With BatchNorm, and with an index in a buffer that an average would round down."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, 10)
        self.register_buffer("order", torch.arange(64).flip(0))

    def forward(self, images):
        return self.head(self.body(images)[:, self.order])


class Watch(TrainerCallback):
    """The weights at every step, and what the model held where it was evaluated and saved."""

    def __init__(self):
        self.steps, self.evaluated, self.saved = [], [], []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.steps.append(weights(model))

    def on_evaluate(self, args, state, control, *, model, metrics, **kwargs):
        self.evaluated.append((weights(model), metrics["eval_loss"]))

    def on_save(self, args, state, control, *, model, **kwargs):
        self.saved.append(weights(model))


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=64, max_eval_samples=24)


def trainer(data, folder, **changes):
    torch.manual_seed(0)
    watch = Watch()
    args = MRPFConfig(output_dir=str(folder), **(SETTINGS | changes))
    return MRPFTrainer(Net(), args, data.train, data.validation, callbacks=[watch]), watch


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Folder, final weights and what was seen of four steps; every step is evaluated and saved."""
    folder = tmp_path_factory.mktemp("whole")
    made, watch = trainer(data, folder)
    made.train()
    return folder, weights(made.model), watch


def averages(steps):
    """The definition, step by step, in float64."""
    mean, found = {}, []
    for step in steps:
        for name, tensor in step.items():
            if not tensor.is_floating_point():
                mean[name] = tensor
            elif name in mean:
                mean[name] = DECAY * mean[name] + (1 - DECAY) * tensor.double()
            else:
                mean[name] = tensor.double()
        found.append(dict(mean))
    return found


def test_what_is_evaluated_saved_and_left_in_the_model_is_the_average(whole, data):
    folder, final, watch = whole
    expected = averages(watch.steps)
    for number, mean in enumerate(expected, start=1):
        saved = load_file(folder / f"checkpoint-{number}" / "model.safetensors")
        evaluated, loss = watch.evaluated[number - 1]
        for name, tensor in mean.items():
            torch.testing.assert_close(saved[name].to(tensor.dtype), tensor, rtol=1e-5, atol=1e-7)
        assert same(saved, evaluated) and same(saved, watch.saved[number - 1])
        net = Net().eval()
        net.load_state_dict(saved)
        images, labels = next(batches(data.validation, 24))
        assert loss == pytest.approx(nn.functional.cross_entropy(net(images), labels).item(), abs=1e-5)
        # Training goes on from weights of its own.
        assert same(load_file(folder / f"checkpoint-{number}" / TRAINING_WEIGHTS), watch.steps[number - 1])
    assert same(final, load_file(folder / "checkpoint-4" / "model.safetensors"))
    assert not same(final, watch.steps[-1])
    assert torch.equal(final["order"], Net().order)


def test_the_average_does_not_change_how_the_weights_are_trained(whole, data, tmp_path):
    plain, watch = trainer(data, tmp_path, ema_decay=None)
    plain.train()
    assert all(same(one, other) for one, other in zip(watch.steps, whole[2].steps, strict=True))
    assert all(not same(one, other) for one, other in pairwise(watch.steps))
    assert not (tmp_path / "checkpoint-4" / TRAINING_WEIGHTS).exists()


@pytest.mark.parametrize("step", [1, 3, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(whole, data, tmp_path, step):
    folder, final, watch = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    again, seen = trainer(data, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert len(seen.steps) == 4 - step
    assert all(same(one, other) for one, other in zip(seen.steps, watch.steps[step:], strict=True))
    assert same(weights(again.model), final)


def test_the_best_average_is_loaded_at_the_end(data, tmp_path):
    # The worst loss counts as the best here: that of the last step would come about without loading anything.
    wanted = {"metric_for_best_model": "loss", "greater_is_better": True}
    made, watch = trainer(data, tmp_path, load_best_model_at_end=True, **wanted)
    made.train()
    losses = [loss for _, loss in watch.evaluated]
    best = losses.index(max(losses))
    assert losses[-1] < losses[best]
    assert same(weights(made.model), watch.evaluated[best][0])


class InMidTraining(TrainerCallback):
    """Evaluates, predicts and saves by itself before the third step."""

    def __init__(self, folder):
        self.folder, self.trainer, self.losses = folder, None, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            predicted = self.trainer.predict(self.trainer.eval_dataset).metrics
            self.losses = [self.trainer.evaluate()["eval_loss"], predicted["test_loss"]]
            self.trainer.save_model(self.folder)


def test_a_callback_in_mid_training_evaluates_and_saves_the_average(data, tmp_path):
    made, watch = trainer(data, tmp_path / "run", save_strategy="no", eval_strategy="no")
    callback = InMidTraining(tmp_path / "saved")
    made.add_callback(callback)
    callback.trainer = made
    made.train()
    seen, loss = watch.evaluated[0]
    assert same(load_file(tmp_path / "saved" / "model.safetensors"), seen)
    for name, tensor in averages(watch.steps[:2])[-1].items():
        torch.testing.assert_close(seen[name].to(tensor.dtype), tensor, rtol=1e-5, atol=1e-7)
    assert callback.losses == [loss, loss]


def test_each_training_has_an_average_of_its_own(data, tmp_path):
    made, watch = trainer(data, tmp_path, max_steps=1, save_strategy="no", eval_strategy="no")
    for _ in range(2):
        made.train()
        assert same(weights(made.model), watch.steps[-1])  # of one step: its weights


def test_a_checkpoint_with_an_average_and_one_without_are_not_mixed_up(whole, data, tmp_path):
    folder, _, _ = whole
    made, _ = trainer(data, tmp_path, ema_decay=None)
    with pytest.raises(ValueError, match="checkpoint-2 was written with ema_decay.*Set ema_decay as then"):
        made.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    made.train()
    made, _ = trainer(data, tmp_path)
    with pytest.raises(ValueError, match="checkpoint-2 was written without ema_decay.*Leave out ema_decay as then"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_error_gives_the_training_weights_back():
    net, average = Net(), WeightAverage(DECAY)
    average.on_step_end(None, None, None, model=net)
    with torch.no_grad():
        net.head.weight.add_(1)
    before = weights(net)
    with pytest.raises(RuntimeError, match="inside"), average.in_model(net), average.in_model(net):
        assert not same(weights(net), before)
        raise RuntimeError("inside")
    assert same(weights(net), before)

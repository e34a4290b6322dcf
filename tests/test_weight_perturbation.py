"""Adversarial weight perturbation: a step equals the published one, and nothing of the perturbation is left."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mrpf import OBJECTIVES, AttackConfig, MRPFConfig, MRPFTrainer, ObjectiveOutput, load_image_data
from hf_mrpf.weight_perturbation import adversarial_weights

GAMMA = 0.05


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 10)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images))).flatten(1))


def net():
    torch.manual_seed(0)
    return Net().train()


def published(model, loss, gamma):
    """A copy of the network at w + gamma * ||w|| * g / ||g||, weight by weight; the gradient is of the copy before."""
    proxy = copy.deepcopy(model)
    loss(proxy).backward()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for (name, weight), of_proxy in zip(moved.named_parameters(), proxy.parameters(), strict=True):
            if "weight" in name and weight.dim() > 1 and of_proxy.grad is not None:
                weight += gamma * weight.norm() * of_proxy.grad / of_proxy.grad.norm()
    return moved


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=64, max_eval_samples=24)


def trained(data, folder, model, **changes):
    settings = {
        "objective": "pgd", "eps": 0.1, "num_steps": 2, "random_start": False, "crop_padding": 0, "optim": "sgd",
        "optim_args": "momentum=0.0", "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "weight_decay": 0.01, "horizontal_flip": False, "per_device_train_batch_size": 32, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 1, "awp_gamma": GAMMA,
    }  # fmt: skip
    args = MRPFConfig(output_dir=str(folder), **(settings | changes))
    MRPFTrainer(model, args, data.train).train()
    return model


@pytest.mark.parametrize("name", ["trades", "pgd", "mart"])
def test_a_step_takes_the_gradient_at_the_worse_weights_and_starts_from_the_weights(data, tmp_path, name):
    seen, states = [], []

    def watched(model, images, labels, attack, *, adversarial_images=None, **kwargs):
        states.append([parameter.detach().clone() for parameter in model.parameters()])
        output = OBJECTIVES[name](model, images, labels, attack, adversarial_images=adversarial_images, **kwargs)
        seen.append((images, labels, output.adversarial_images, adversarial_images))
        return output

    start = net()
    model = trained(data, tmp_path, copy.deepcopy(start), objective=watched)
    (images, labels, adversarial, given), (_, _, again, taken) = seen
    assert given is None and taken is adversarial and again is adversarial  # one attack, at the weights as they were
    loss = lambda network: (  # noqa: E731
        OBJECTIVES[name](network, images, labels, AttackConfig(), adversarial_images=adversarial).loss
    )
    moved = published(start, loss, GAMMA)
    for mine, expected in zip(states[1], moved.parameters(), strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-5, atol=1e-7)
    loss(moved).backward()
    before = dict(start.named_parameters())
    for (parameter, mine), at_worse in zip(model.named_parameters(), moved.parameters(), strict=True):
        decay = 0.01 if before[parameter].ndim > 1 else 0.0
        gradient = 0 if at_worse.grad is None else at_worse.grad + decay * before[parameter].detach()
        torch.testing.assert_close(mine.detach(), before[parameter].detach() - 0.5 * gradient, rtol=1e-4, atol=1e-6)
    # BatchNorm has seen the forwards at the moved weights alone, as if the other network were another one.
    assert torch.equal(model.norm.num_batches_tracked, moved.norm.num_batches_tracked)
    torch.testing.assert_close(model.norm.running_mean, moved.norm.running_mean)
    assert (states[1][0] - states[0][0]).norm() == pytest.approx(GAMMA * states[0][0].norm().item(), rel=1e-4)


def test_without_it_the_objective_runs_once_a_step(data, tmp_path):
    calls = []

    def counted(model, images, labels, attack, **kwargs):
        calls.append(kwargs)
        return ObjectiveOutput(F.cross_entropy(model(images), labels))

    trained(data, tmp_path, net(), objective=counted, awp_gamma=None)
    assert len(calls) == 1 and set(calls[0]) == {"beta", "attacked"}


def test_every_small_batch_of_an_accumulation_is_perturbed_from_the_same_weights(data, tmp_path):
    states = []

    def watched(model, images, labels, attack, **kwargs):
        states.append(model.conv.weight.detach().clone())
        return OBJECTIVES["pgd"](model, images, labels, attack, **kwargs)

    trained(data, tmp_path, net(), objective=watched, per_device_train_batch_size=16, gradient_accumulation_steps=2)
    assert len(states) == 4
    assert torch.equal(states[0], states[2]) and torch.equal(states[0], net().conv.weight)
    assert not torch.equal(states[1], states[0]) and not torch.equal(states[1], states[3])


def test_weights_are_back_after_an_error_and_a_weight_without_gradient_stays(data):
    model, images, labels = net(), torch.rand(4, 3, 16, 16), torch.arange(4)
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(RuntimeError, match="inside"),
        adversarial_weights(model, lambda: F.cross_entropy(model(images), labels), GAMMA),
    ):
        assert torch.equal(model.unused.weight, before["unused.weight"])
        assert not torch.equal(model.head.weight, before["head.weight"])
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_statistics_are_back_where_the_loss_fails():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def broken():
        model(torch.rand(4, 3, 8, 8))
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"), adversarial_weights(model, broken, GAMMA):
        pass
    assert torch.equal(model[1].running_mean, torch.zeros(4)) and model[1].num_batches_tracked == 0


def test_a_model_whose_weights_are_all_frozen_is_refused_before_its_loss_is_evaluated():
    model = net()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)

    def never():
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match="is frozen.*leave awp_gamma out"), adversarial_weights(model, never, GAMMA):
        pass


def test_under_autocast_the_forward_runs_at_the_perturbed_weights():
    model, images, labels = net(), torch.rand(4, 3, 16, 16), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lambda network=model: F.cross_entropy(network(images), labels)  # noqa: E731
        with adversarial_weights(model, loss, GAMMA):
            inside, fresh = loss(), copy.deepcopy(model)
        expected = loss(fresh)
    assert inside.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"awp_gamma": 0.0}, r"awp_gamma=0.0 must be a number in \(0, 1\)"),
        ({"awp_gamma": True}, r"awp_gamma=True must be a number in \(0, 1\)"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must be a number in \(0, 1\)"),
        ({"ema_decay": "0.9"}, r"ema_decay=0.9 must be a number in \(0, 1\)"),
        ({"ema_decay": float("nan")}, r"ema_decay=nan must be a number in \(0, 1\)"),
        ({"awp_gamma": 0.01, "fsdp": "full_shard"}, "awp_gamma=0.01 needs all weights on every process"),
        ({"ema_decay": 0.9, "deepspeed": {"train_batch_size": 8}}, "ema_decay=0.9 needs all weights on every process"),
        ({"awp_gamma": 0.01, "fp16": True}, "give bf16 instead of fp16"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        MRPFConfig(str(tmp_path), use_cpu=True, **changes)

"""A network compiled into CUDA graphs writes each output where the last one was: what is kept of it must be a copy."""

import pytest
import torch
from torch import nn

from hf_mrpf import MRPFConfig, MRPFTrainer, load_image_data, module_robustness_sensitivity
from hf_mrpf.apgd import apgd_attack
from hf_mrpf.attacks import AttackConfig
from hf_mrpf.objectives import trades


class Overwriting(nn.Module):
    """In the place of such a network: a pass spoils what the one before it has returned, logits and gradients."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.last = {}

    def instead(self, name, tensor):
        with torch.no_grad():
            if name in self.last:
                self.last[name].fill_(torch.nan)
            self.last[name] = tensor.detach().clone()
        return self.last[name]

    def forward(self, images):
        if images.requires_grad:
            images = images.clone()
            images.register_hook(lambda gradient: self.instead("gradient", gradient))
        logits = self.net(images)
        own = self.instead("logits", logits)
        return logits if torch.is_grad_enabled() else own  # autograd would notice that those were changed


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def batch(count=16):
    return torch.rand(count, 3, 16, 16), torch.randint(0, 10, (count,))


def test_trades_keeps_the_clean_prediction_of_its_attack(net):
    losses = []
    for model in (net, Overwriting(net)):
        torch.manual_seed(0)
        losses.append(trades(model, *batch(), AttackConfig(eps=0.1, num_steps=3)).loss.item())
    assert losses[0] == losses[1]


def test_apgd_keeps_the_gradient_of_its_best_point(net):
    with torch.no_grad():
        net[3].bias[0] += 5  # so that no image leaves
    images, labels = batch()[0], torch.zeros(16, dtype=torch.int64)
    attack = AttackConfig(eps=0.02, num_steps=20)
    # From where no step leads to anything better it comes back.
    best = apgd_attack(net, images, labels, attack)
    found, expected = (apgd_attack(model, images, labels, attack, start=best) for model in (Overwriting(net), net))
    assert torch.equal(found, expected)


def test_an_evaluation_keeps_the_clean_logits(net, tmp_path):
    data = load_image_data(max_train_samples=32, max_eval_samples=40).validation
    args = MRPFConfig(str(tmp_path), eps=0.1, eval_num_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    found, expected = (
        MRPFTrainer(model, args, eval_dataset=data).predict(data).predictions for model in (Overwriting(net), net)
    )
    for mine, own in zip(found, expected, strict=True):
        assert (mine == own).all()


def test_sensitivity_compares_passes_that_are_both_there(net, caplog):
    with caplog.at_level("INFO", "hf_mrpf"):
        module_robustness_sensitivity(Overwriting(net), [batch()], AttackConfig(eps=0.1, num_steps=2))
    assert "gives other logits" not in caplog.text

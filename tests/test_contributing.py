"""What CONTRIBUTING.md shows works as it says: one function and one line."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import HfArgumentParser

from hf_mrpf import IMPORTANCES, OBJECTIVES, AttackConfig, MRPFConfig, MRPFTrainer, load_image_data

CONTRIBUTING = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text()
ADDED = {"pairing": OBJECTIVES, "slimming": IMPORTANCES}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.next, self.classes = nn.Conv2d(8, 6, 3), nn.Linear(6, 10)

    def forward(self, images):
        return self.classes(torch.relu(self.next(torch.relu(self.norm(self.conv(images))))).mean((2, 3)))


@pytest.fixture
def added(monkeypatch):
    """The examples, each run as it stands; the dicts are as before afterwards."""
    for name, choices in ADDED.items():
        monkeypatch.setitem(choices, name, None)
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
    assert len(blocks) == len(ADDED)
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), {})


def test_an_added_objective_and_importance_are_chosen_by_name_and_used(added, tmp_path):
    torch.manual_seed(0)
    options = ["--objective", "pairing", "--importance", "slimming", "--allocation", "uniform", "--target", "0.6"]
    options += ["--awp_gamma", "0.01", "--ema_decay", "0.5", "--max_steps", "2", "--eps", "0.1", "--num_steps", "1"]
    options += ["--calibration_sets", "1", "--calibration_set_size", "20", "--min_channels", "1", "--use_cpu"]
    options += ["--output_dir", str(tmp_path), "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"]
    (args,) = HfArgumentParser(MRPFConfig).parse_args_into_dataclasses(options)
    model, data = Net(), load_image_data(max_train_samples=64)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -8, 2, 7, 3, -6, 4, 5]))
    trainer = MRPFTrainer(model, args, data.train)
    plan = trainer.prune()
    assert 2 < len(plan.kept["conv"]) < 8
    assert plan.kept["conv"] == sorted([1, 3, 5, 7, 6, 4, 2, 0][: len(plan.kept["conv"])])
    before = model.conv.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.conv.weight, before)


def test_the_objective_of_the_example_is_what_its_docstring_says(added):
    torch.manual_seed(0)
    model, images, labels = Net().eval(), torch.rand(5, 3, 16, 16), torch.arange(5)
    moved = (images + 0.05).clamp(0, 1)
    output = OBJECTIVES["pairing"](model, images, labels, AttackConfig(), beta=2.0, adversarial_images=moved)
    distances = torch.stack([(model(x[None]) - model(y[None])).norm() ** 2 for x, y in zip(images, moved, strict=True)])
    torch.testing.assert_close(output.loss, F.cross_entropy(model(moved), labels) + 2.0 * distances.mean())


def test_what_the_examples_added_is_gone_again():
    assert not [name for name, choices in ADDED.items() if name in choices]

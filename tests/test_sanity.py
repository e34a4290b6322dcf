"""Each check stays silent over a sound report and speaks over one that it is made for."""

import copy
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mrpf import AttackConfig, PrunedForImageClassification, evaluate_robustness
from hf_mrpf.sanity import failures_of_report, failures_under_attack, transfer_accuracy

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "evaluate.py"


def fitted(seed=0):
    torch.manual_seed(seed)
    images, labels = torch.rand(96, 3, 8, 8), torch.arange(96) % 4
    images[torch.arange(96), labels % 3] *= torch.where(labels < 3, 0.6, 0.9)[:, None, None]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 4))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net, images, labels


class Masked(nn.Module):
    """The same decisions, from logits so large that their gradients underflow."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        logits = self.net(images)
        return logits + 1e4 * F.one_hot(logits.argmax(1), logits.shape[1])


@pytest.fixture(scope="module")
def fit():
    return fitted()


@pytest.fixture(scope="module")
def report(fit):
    net, images, labels = fit
    return evaluate_robustness(net, (images, labels), ("fgsm", "pgd20"), AttackConfig(eps=0.02))


def with_accuracies(report, **attacks):
    return replace(report, clean_accuracy=0.9, attacks=attacks)


def test_a_sound_report_passes(report):
    assert failures_of_report(report, 4) == []
    sound = {"fgsm": 0.6, "pgd20": 0.5, "pgd50x5": 0.51, "cw": 0.5, "square": 0.6, "autoattack": 0.46}
    assert failures_of_report(with_accuracies(report, **sound), 4) == []


def test_few_classes_and_a_single_step_raise_no_alarm(report):
    assert failures_of_report(replace(report, clean_accuracy=0.65, attacks={}), 3) == []
    assert failures_of_report(replace(report, clean_accuracy=0.9, attacks={"fgsm": 0.56, "square": 0.5}), 2) == []
    assert len(failures_of_report(replace(report, clean_accuracy=0.54, attacks={}), 2)) == 1
    assert failures_of_report(replace(report, clean_accuracy=0.02, attacks={}), 200) == []


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"zero_gradient_share": 0.06, "attacks": {}}, "gradients are masked: 6.0% of the images have none"),
        ({"attacks": {"fgsm": 0.5, "pgd20": 0.53}}, "53.0% withstand pgd20 and 50.0% fgsm"),
        ({"attacks": {"pgd20": 0.5, "pgd50x5": 0.53}}, "53.0% withstand pgd50x5 and 50.0% pgd20"),
        ({"attacks": {"pgd20": 0.5, "autoattack": 0.44}}, "50.0% withstand it and 44.0% AutoAttack"),
        ({"attacks": {"pgd20": 0.5, "apgd_ce": 0.48, "square": 0.45}}, "45.0% withstand square and 48.0% the best"),
        ({"clean_accuracy": 0.32, "attacks": {}}, "near the 25.0% of guessing"),
    ],
)
def test_each_failure_of_a_report_is_one_line(report, changed, message):
    (line,) = failures_of_report(replace(report, **({"clean_accuracy": 0.9} | changed)), 4)
    assert message in line and "\n" not in line


def test_a_sound_model_passes_under_attack(fit):
    net, images, labels = fit
    assert failures_under_attack(net, (images, labels), AttackConfig(eps=0.02), parent=copy.deepcopy(net)) == []


def test_masked_gradients_fail_at_a_large_eps_and_by_transfer(fit):
    net, images, labels = fit
    attack = AttackConfig(eps=0.1, random_start=False)
    large, transfer = failures_under_attack(Masked(net), (images, labels), attack, parent=net)
    assert "withstand PGD-20 at a linf eps of 0.5" in large
    assert "images withstand PGD-20 made on the parent" in transfer
    # Transfer counts what is right before and after, and from a model to itself it is the attack.
    own = evaluate_robustness(net, (images, labels), ("pgd20",), attack).attacks["pgd20"]
    moved = transfer_accuracy(net, net, images, labels, attack, indices=list(range(96)))
    assert own <= moved <= own + 0.05


def test_a_model_that_changes_its_mind_fails_at_eps_0(fit):
    net, images, labels = fit

    class Wavering(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.count = net, 0

        def forward(self, images):
            self.count += 1
            return self.net(images).roll(int(self.count > 2), 1)  # after the pass on one image, and the first on all

    lines = failures_under_attack(Wavering(), (images, labels), AttackConfig(eps=0.02))
    assert "an attack at eps 0 changes accuracy" in lines[0]


@pytest.mark.slow
def test_the_recipe_prints_what_fails_and_what_was_run(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)
    )
    model.save_pretrained(tmp_path)
    asked = f"{RECIPE} {tmp_path} --attacks fgsm apgd_ce --num_samples 8 --device cpu --journal {tmp_path}/kept.jsonl"
    asked += f" --parent {tmp_path} --output {tmp_path}/report.json"
    monkeypatch.setattr(sys, "argv", asked.split())
    runpy.run_path(str(RECIPE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "warning: clean accuracy is near the 10.0% of guessing" in printed
    assert "apgd_ce" in printed and (tmp_path / "kept.jsonl").stat().st_size > 0


@pytest.mark.parametrize("recipe", ["evaluate", "export"])
@pytest.mark.parametrize("parent", [False, True])
def test_a_folder_that_is_not_there_is_told_as_one(recipe, parent, tmp_path, monkeypatch, capsys):
    sizes = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    model = PrunedForImageClassification.from_backbone("timm/resnet18", num_labels=3, image_size=16, **sizes)
    model.save_pretrained(tmp_path / "model")
    option = {"evaluate": "--parent", "export": "--dense"}[recipe]
    words = [str(tmp_path / "model"), option, "./nosuch"] if parent else ["./nosuch"]
    monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", *words])
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPE.with_name(f"{recipe}.py")), run_name="__main__")
    named = option if parent else "model"
    assert capsys.readouterr().err.endswith(f"error: {named} ./nosuch: there is no such folder.\n")

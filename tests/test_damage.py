"""The allocation `damage`: calibrated losses, shrunk slopes, and widths that follow what is measured."""

import math

import pytest
import torch
import torch.nn.functional as F
from pruning_reference import narrow_resnet
from torch import nn

from hf_mrpf import AttackConfig, plan_pruning
from hf_mrpf.damage import calibrated_losses, damage, inverse_temperature, shrunk
from hf_mrpf.pruned_copies import robust_loss

NO_ATTACK = AttackConfig(eps=0)
OPTIONS = {"much": list(range(4, 41)), "little": list(range(4, 41))}


class Answers(nn.Module):
    """Logits of two classes, read off an image's first two pixels and made clearer by `signal`."""

    def __init__(self, signal: float, scale: float = 1.0):
        super().__init__()
        self.signal, self.scale = nn.Parameter(torch.tensor(signal)), scale

    def forward(self, images):
        truth, noise = images[:, 0, 0, 0] * 2 - 1, images[:, 0, 0, 1] * 8 - 4
        answer = self.scale * (self.signal * truth + noise)
        return torch.stack([-answer, answer], dim=1)


class Copies:
    """In the place of `PrunedCopies`: what a copy answers follows from its widths by a formula."""

    def __init__(self, signal):
        self.signal, self.made = signal, []

    def size(self, widths):
        return sum(OPTIONS[name][-1] if name not in widths else widths[name] for name in OPTIONS)

    def at(self, widths):
        self.made.append(dict(widths))
        return Answers(self.signal(widths))

    def to_come(self, copies):
        pass


def sets(count=3, images=64):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        labels = torch.randint(0, 2, (images,), generator=generator)
        pixels = torch.rand(images, 3, 2, 2, generator=generator)
        pixels[:, 0, 0, 0] = labels
        made.append((pixels, labels))
    return made


def widths_found(signal, batches=None):
    copies = Copies(signal)
    return damage(nn.Identity(), copies, batches or sets(), NO_ATTACK, OPTIONS, 40, 0), copies


def test_widths_move_to_the_unit_whose_loss_hurts_and_the_size_stays():
    widths, copies = widths_found(lambda widths: 0.5 + math.log(widths["much"]) + 0.1 * math.log(widths["little"]))
    assert widths["much"] > 25 and widths["little"] < 15
    assert abs(copies.size(widths) - 40) <= 0.01 * 40
    # Three rounds of four copies a measurement and one a decision, and the one that decisions start from.
    assert len(copies.made) <= 3 * 5 + 1


def test_widths_that_change_nothing_stay_uniform():
    widths, _ = widths_found(lambda widths: 2.0)
    assert widths == {"much": 20, "little": 20}


def test_a_round_that_does_not_help_on_the_last_set_is_undone():
    measured = sets()
    images, labels = measured[-1]
    # There, and there alone, what helps elsewhere hurts.
    misled = [*measured[:-1], (images, 1 - labels)]
    signal = lambda widths: 0.5 + math.log(widths["much"])  # noqa: E731
    assert widths_found(signal)[0]["much"] > 25
    assert widths_found(signal, misled)[0] == {"much": 20, "little": 20}


def test_the_last_set_is_not_measured_on_but_decides_alone(monkeypatch):
    seen, batches = [], sets()

    def spy(model, measured_on, attack, seed):
        assert (attack.num_steps, attack.step_size) == (3, None)
        seen.append([next(number for number, pair in enumerate(batches) if pair is one) for one in measured_on])
        return calibrated_losses(model, measured_on, attack, seed)

    monkeypatch.setattr("hf_mrpf.damage.calibrated_losses", spy)
    widths_found(lambda widths: 0.5 + math.log(widths["much"]), batches)
    assert {tuple(numbers) for numbers in seen} == {(0, 1), (2,)}


@pytest.mark.parametrize("loss", [calibrated_losses, robust_loss])
def test_losses_are_those_of_eval_mode(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 2))
    expected = loss(model.eval(), sets(1), AttackConfig(eps=0.1, num_steps=2), seed=0)
    found = loss(model.train(), sets(1), AttackConfig(eps=0.1, num_steps=2), seed=0)
    assert model.training and model[1].num_batches_tracked == 0
    torch.testing.assert_close(found, expected)


def test_one_calibration_set_is_refused():
    with pytest.raises(ValueError, match=r"two or more in batches"):
        widths_found(lambda widths: 2.0, sets(1))


def test_a_single_image_tells_no_spread_and_is_refused():
    with pytest.raises(ValueError, match="hold fewer than two: give larger ones in batches"):
        widths_found(lambda widths: 2.0, [(images[:1], labels[:1]) for images, labels in sets(2)])


def test_the_factor_of_logits_is_the_best_of_a_grid():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(200, 5, dtype=torch.float64), torch.randint(0, 5, (200,))
    logits[range(200), labels] += 2
    found = inverse_temperature(logits, labels)
    grid = [0.01 * 1.02**step for step in range(460)]
    best = min(grid, key=lambda factor: F.cross_entropy(factor * logits, labels).item())
    assert found == pytest.approx(best, rel=0.02)


def test_losses_do_not_see_the_scale_of_the_logits():
    losses = [calibrated_losses(Answers(1.0, scale), sets(), NO_ATTACK, 0) for scale in (1.0, 0.05)]
    assert torch.allclose(*losses, rtol=1e-4)
    assert losses[0].shape == (3 * 64,)


def test_slopes_that_errors_explain_lie_on_the_price_line_and_clear_ones_stay():
    slopes, prices = {"a": 1.0, "b": 2.0, "c": 9.0}, {"a": 1.0, "b": 2.0, "c": 3.0}
    noisy = shrunk(slopes, dict.fromkeys(slopes, 10.0), prices)
    assert noisy["b"] / noisy["a"] == pytest.approx(2) and noisy["c"] / noisy["a"] == pytest.approx(3)
    clear = shrunk(slopes, dict.fromkeys(slopes, 1e-4), prices)
    assert clear == pytest.approx(slopes, rel=1e-3)
    # The one that is known badly moves to the line, the others hardly.
    mixed = shrunk(slopes, {"a": 0.01, "b": 0.01, "c": 3.0}, prices)
    assert mixed["a"] == pytest.approx(1, rel=0.01) and 3 < mixed["c"] < 8


def test_units_of_one_width_leave_nothing_to_measure():
    assert damage(nn.Identity(), Copies(None), sets(2), NO_ATTACK, {"much": [8], "little": [8]}, 20, 0) == {
        "much": 8,
        "little": 8,
    }


def test_a_plan_by_damage_meets_its_target_and_comes_out_the_same_again():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(8, 3, 16, 16, generator=generator), torch.arange(8) % 10) for _ in range(2)]
    model, settings = narrow_resnet(), {"attack": AttackConfig(eps=0.1), "min_channels": 1, "allocation": "damage"}
    settings |= {"ignore": ("layer1", "layer2", "layer3"), "target": 0.8}
    plans = [plan_pruning(model, torch.rand(1, 3, 16, 16), batches=batches, **settings) for _ in range(2)]
    assert plans[0].achieved["macs"] == pytest.approx(0.8, rel=0.02)
    assert plans[0].kept == plans[1].kept

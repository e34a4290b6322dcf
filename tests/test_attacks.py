"""PGD: the threat model is kept, the model is left as it was, and the result equals torchattacks'."""

import math
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mrpf.attacks import LOSSES, AttackConfig, check_pixels, keyed_start, logits_of, pgd_attack


def small_net(classes: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, classes)
    )


@pytest.fixture
def data():
    return torch.rand(16, 3, 8, 8), torch.randint(0, 5, (16,))


def fitted_net(images: torch.Tensor, labels: torch.Tensor, steps: int = 40) -> nn.Module:
    net = small_net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.eval()


# --- configuration ---


def test_config_defaults_and_derived_step():
    attack = AttackConfig()
    assert attack.step == pytest.approx(2 / 255)
    assert attack.describe() == "linf eps=0.0314 10x0.0078"
    assert AttackConfig("l2", 0.5, 0.1, 20).step == 0.1
    with pytest.raises(FrozenInstanceError):
        attack.eps = 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"eps": 8}, r"eps is 8; .*\[0, 1\] for linf.*8 given where 8/255 was meant\?"),
        ({"eps": 128, "norm": "l2"}, r"\[0, 16\] for l2.*128 given where 128/255 was meant\?"),
        ({"eps": -0.1}, "eps is -0.1"),
        ({"eps": "8/255"}, "eps is '8/255'; it must be a number"),
        ({"eps": math.nan}, "eps is nan"),
        ({"eps": True}, "eps is True"),
        ({"norm": "l1"}, "norm is 'l1'; known norms: linf, l2"),
        ({"step_size": 0}, "step_size is 0"),
        ({"step_size": 3}, r"step_size is 3; .*\(0, 2\]"),
        ({"num_steps": 0}, "num_steps is 0; it must be an integer of at least 1"),
        ({"num_steps": 2.0}, "num_steps is 2.0"),
        ({"num_steps": True}, "num_steps is True"),
        ({"random_start": 1}, "random_start is 1"),
    ],
)
def test_config_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttackConfig(**arguments)


def test_large_l2_radius_is_allowed():
    assert AttackConfig("l2", 3.0).eps == 3.0


# --- input ---


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "torch.uint8; .*divide them by 255"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), "torch.bfloat16; .*coarser than an attack's steps"),
        (torch.zeros(2, 1, 4, 4), r"\[2, 1, 4, 4\]; .*repeat the grey channel"),
        (torch.zeros(3, 4, 4), r"\[3, 4, 4\]; \[N, 3, H, W\] is needed"),
        (torch.full((2, 3, 4, 4), 2.0), r"from 2 to 2; they must stay in \[0, 1\].*normalises them itself"),
        (torch.full((2, 3, 4, 4), -0.1), "pixels run from -0.1"),
        (torch.tensor([math.nan]).expand(2, 3, 4, 4), "not finite"),
        (torch.tensor([math.inf]).expand(2, 3, 4, 4), "not finite"),
        ([[0.0]], "images are list"),
    ],
)
def test_check_pixels_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        check_pixels(images)


def test_check_pixels_accepts_the_whole_range_and_an_empty_batch():
    check_pixels(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    check_pixels(torch.zeros(0, 3, 4, 4))


def test_pgd_refuses_what_does_not_fit(data):
    images, labels = data
    net, attack = small_net(), AttackConfig()
    with pytest.raises(ValueError, match="loss is 'dlr'; known losses: ce, kl, margin"):
        pgd_attack(net, images, labels, attack, loss="dlr")
    with pytest.raises(ValueError, match=r"labels are torch.float32 .*int64 class indices \[16\]"):
        pgd_attack(net, images, labels.float(), attack)
    with pytest.raises(ValueError, match=r"shape \[8\]; int64 class indices \[16\]"):
        pgd_attack(net, images, labels[:8], attack)
    with pytest.raises(ValueError, match=r"clean logits \[16, C\]"):
        pgd_attack(net, images, labels, attack, loss="kl")
    with pytest.raises(ValueError, match=r"start has shape \[8, 3, 8, 8\]"):
        pgd_attack(net, images, labels, attack, start=images[:8])
    with pytest.raises(ValueError, match="divide them by 255"):
        pgd_attack(net, (images * 255).byte(), labels, attack)


def test_logits_of_takes_a_tensor_or_an_output():
    logits = torch.zeros(2, 3)
    assert logits_of(logits) is logits
    assert logits_of(SimpleNamespace(logits=logits)) is logits
    with pytest.raises(ValueError, match="the model returned tuple"):
        logits_of((logits,))


# --- losses ---


def test_losses_are_sums_over_the_batch():
    logits, clean, labels = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    rows = range(6)
    expected = sum(-logits[i].softmax(0)[labels[i]].log() for i in rows)
    assert LOSSES["ce"](logits, labels) == pytest.approx(expected.item(), rel=1e-5)
    p, q = clean.softmax(1), logits.softmax(1)
    assert LOSSES["kl"](logits, clean) == pytest.approx((p * (p.log() - q.log())).sum().item(), rel=1e-5)
    others = [max(logits[i, j] for j in range(4) if j != labels[i]) - logits[i, labels[i]] for i in rows]
    assert LOSSES["margin"](logits, labels) == pytest.approx(sum(others).item(), rel=1e-5)


def test_kl_of_sure_logits_is_finite():
    sure = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    value = LOSSES["kl"](sure, -sure.detach())
    value.backward()
    assert value.isfinite() and sure.grad.isfinite().all()


# --- attack ---


@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("l2", 0.5)])
@pytest.mark.parametrize("random_start", [False, True])
def test_equals_torchattacks(data, norm, eps, random_start):
    torchattacks = pytest.importorskip("torchattacks")
    images, labels = data
    net = fitted_net(images, labels)
    attack = AttackConfig(norm, eps, num_steps=20, random_start=random_start)
    kind = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    reference = kind(net, eps=eps, alpha=attack.step, steps=20, random_start=random_start)
    torch.manual_seed(1)
    expected = reference(images, labels)
    torch.manual_seed(1)
    ours = pgd_attack(net, images, labels, attack)
    # Rounding differs, as BatchNorm is folded meanwhile: an l2 step passes it on to the images, a sign does not.
    assert (ours - expected).abs().max() <= (1e-6 if norm == "linf" else 2e-4 * eps)
    assert torch.equal(net(ours).argmax(1), net(expected).argmax(1))


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_an_image_leaves_the_batch_at_the_first_iterate_that_fools(data, norm, eps, loss):
    images, labels = data
    net = fitted_net(images, labels)
    attack = AttackConfig(norm, eps, step_size=eps / 8, num_steps=12, random_start=False)
    iterates = [images]
    for steps in range(1, 13):  # the same steps, each time one more of them
        iterates.append(pgd_attack(net, images, labels, replace(attack, num_steps=steps), loss=loss))
    wrong = torch.stack([net(iterate).argmax(1) != labels for iterate in iterates])
    assert wrong[:-1].any(0).any() and not wrong.any(0).all() and not wrong[:3].any()
    sizes = []
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = pgd_attack(net, images, labels, attack, loss=loss, until_fooled=True)
    expected = [iterates[int(column[:-1].int().argmax()) if column[:-1].any() else 12][i]
                for i, column in enumerate(wrong.T)]  # fmt: skip
    assert (found - torch.stack(expected)).abs().max() <= 1e-5
    # A pass runs those alone that no iterate before its own has fooled.
    assert sizes == [int((~wrong[:step].any(0)).sum()) for step in range(12)]
    with pytest.raises(ValueError, match="until_fooled needs the class of each image"):
        pgd_attack(net, images, net(images).detach(), attack, loss="kl", until_fooled=True)


def test_nothing_is_run_once_all_are_fooled(data):
    images, labels = data
    net = fitted_net(images, labels)
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    found = pgd_attack(net, images, (labels + 1) % 5, AttackConfig(random_start=False), until_fooled=True)
    assert torch.equal(found, images) and len(passes) == 1


def test_an_image_that_is_wrong_by_rounding_alone_stays():
    class Even(nn.Module):
        def forward(self, images):
            self.runs = getattr(self, "runs", 0) + 1
            return torch.stack([images.mean((1, 2, 3)), images.mean((1, 2, 3)) * (1 + 1e-6)], 1)

    net, images = Even(), torch.rand(4, 3, 8, 8)
    pgd_attack(net, images, torch.zeros(4, dtype=torch.long), AttackConfig(num_steps=3), until_fooled=True)
    assert net.runs == 1 + 3, "one image shows what layouts the network takes"


def test_accuracy_under_pgd20_is_that_of_torchattacks_within_noise():
    torchattacks = pytest.importorskip("torchattacks")
    images, labels = torch.rand(256, 3, 8, 8), torch.randint(0, 5, (256,))
    net = fitted_net(images, labels, steps=60)
    attack = AttackConfig(eps=2 / 255, num_steps=20)
    theirs = torchattacks.PGD(net, eps=attack.eps, alpha=attack.step, steps=20)(images, labels)
    ours = pgd_attack(net, images, labels, attack)
    clean, robust, reference = ((net(x).argmax(1) == labels).float().mean() for x in (images, ours, theirs))
    assert clean - robust > 0.05
    assert abs(robust - reference) < 0.03


@pytest.mark.parametrize("norm, eps", [("linf", 0.3), ("l2", 2.0)])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_stays_in_the_ball_and_raises_the_loss(data, norm, eps, loss):
    images, labels = data
    net = fitted_net(images, labels)
    targets = net(images).detach() if loss == "kl" else labels
    adversarial = pgd_attack(net, images, targets, AttackConfig(norm, eps), loss=loss)
    distance = (adversarial - images).flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1)
    assert distance.max() <= eps * (1 + 1e-6)
    assert distance.max() > eps / 2
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert not adversarial.requires_grad
    assert LOSSES[loss](net(adversarial), targets) > LOSSES[loss](net(images), targets) + 1


def test_linear_model_is_attacked_to_its_known_optimum():
    images = torch.rand(4, 3, 2, 2, dtype=torch.float64) * 0.4 + 0.3
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    labels = torch.tensor([0, 1, 0, 1])
    direction = (net[1].weight[1] - net[1].weight[0]).detach() * torch.where(labels == 0, 1.0, -1.0)[:, None]
    worst = images + 0.1 * direction.sign().view_as(images)
    assert torch.allclose(pgd_attack(net, images, labels, AttackConfig(eps=0.1)), worst)
    worst = images + 0.1 * F.normalize(direction).view_as(images)
    assert torch.allclose(pgd_attack(net, images, labels, AttackConfig("l2", 0.1, random_start=False)), worst)


def test_no_batch_size_dependence(data):
    images, labels = data
    net = fitted_net(images, labels).double()
    images, attack = images.double(), AttackConfig("l2", 0.5, random_start=False)
    parts = [pgd_attack(net, x, y, attack) for x, y in zip(images.split(5), labels.split(5), strict=True)]
    assert torch.allclose(torch.cat(parts), pgd_attack(net, images, labels, attack), atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_eps_returns_the_images(data, norm):
    images, labels = data
    adversarial = pgd_attack(small_net(), images, labels, AttackConfig(norm, 0.0), start=images * 0.5)
    assert torch.equal(adversarial, images)
    assert adversarial.data_ptr() != images.data_ptr()


def test_zero_gradient_leaves_the_image(data):
    images, labels = data
    net = small_net()
    for parameter in net[-1].parameters():
        nn.init.zeros_(parameter)
    for norm in ("linf", "l2"):
        assert torch.equal(pgd_attack(net, images, labels, AttackConfig(norm, 0.1, random_start=False)), images)


def test_start_is_taken_unclamped_and_not_changed(data):
    images, labels = data
    seen = []
    net = small_net()
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    start = images + 2.0
    kept = start.clone()
    adversarial = pgd_attack(net, images, labels, AttackConfig(num_steps=1), start=start)
    assert torch.equal(seen[0], kept) and torch.equal(start, kept)
    assert (adversarial - images).abs().max() <= 8 / 255 + 1e-6


def test_the_model_is_left_as_it_was(data):
    images, labels = data
    net = small_net().train()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    net[5].weight.grad = torch.ones_like(net[5].weight)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    flags = [parameter.requires_grad for parameter in net.parameters()]
    during = []
    net.register_forward_pre_hook(
        lambda *_: during.append(
            (any(m.training for m in net.modules()), any(p.requires_grad for p in net.parameters()))
        )
    )
    pgd_attack(net, images, labels, AttackConfig())
    assert during == [(False, False)] * 10
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [p.grad is None for p in net.parameters()] == [True] * 4 + [False, True]
    assert torch.equal(net[5].weight.grad, torch.ones_like(net[5].weight))
    assert images.grad is None and not images.requires_grad

    def fail(*_):
        raise RuntimeError("broken forward")

    net.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken forward"):
        pgd_attack(net, images, labels, AttackConfig())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == flags


def test_works_under_no_grad_and_with_frozen_parameters(data):
    images, labels = data
    net = fitted_net(images, labels)
    attack = AttackConfig(random_start=False)
    expected = pgd_attack(net, images, labels, attack)
    net.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(pgd_attack(net, images, labels, attack), expected)
        assert not torch.is_grad_enabled()


def test_output_with_logits_and_inputs_that_require_grad(data):
    images, labels = data
    net = fitted_net(images, labels)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pixels):
            return SimpleNamespace(logits=self.net(pixels))

    attack = AttackConfig(random_start=False)
    expected = pgd_attack(net, images, labels, attack)
    assert torch.equal(pgd_attack(Wrapped(), images.clone().requires_grad_(), labels, attack), expected)


# --- keyed start ---


@pytest.mark.parametrize("norm, eps", [("linf", 0.3), ("l2", 2.0)])
def test_keyed_start_depends_on_seed_index_and_restart_alone(norm, eps):
    images = torch.rand(6, 3, 8, 8)
    attack = AttackConfig(norm, eps)
    indices = [4, 0, 900_000_000_000, 7, 8, 9]
    whole = keyed_start(images, indices, attack, 3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    parts = [keyed_start(images[i : i + 2], torch.tensor(indices[i : i + 2]), attack, 3) for i in (0, 2, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(keyed_start(images.flip(0), indices[::-1], attack, 3), whole.flip(0))
    distance = (whole - images).flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1)
    assert distance.max() <= eps * (1 + 1e-6) and distance.min() > 0
    assert whole.min() >= 0 and whole.max() <= 1
    grey = torch.full((4, 3, 8, 8), 0.5)
    keys = [0, 1, 2**32, 2**32 + 1]
    noises = [keyed_start(grey, keys, attack, seed, restart) - grey for seed in (0, 1) for restart in (0, 1)]
    flat = torch.cat(noises).flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 1e-3, "two keys share their noise"


def test_keyed_start_fills_the_linf_ball_evenly():
    grey = torch.full((64, 3, 8, 8), 0.5)
    noise = keyed_start(grey, range(64), AttackConfig(eps=0.1), 0) - grey
    assert noise.mean().abs() < 2e-3
    assert noise.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)


def test_keyed_start_without_random_start_and_bad_keys():
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(keyed_start(images, [0, 1], AttackConfig(random_start=False), 0), images)
    assert torch.equal(keyed_start(images, [0, 1], AttackConfig(eps=0.0), 0), images)
    with pytest.raises(ValueError, match="3 indices are given for 2 images"):
        keyed_start(images, [0, 1, 2], AttackConfig(), 0)
    with pytest.raises(ValueError, match="at least 0; the seed is 0, the smallest index -1"):
        keyed_start(images, [0, -1], AttackConfig(), 0)
    with pytest.raises(ValueError, match="the seed is -2"):
        keyed_start(images, [0, 1], AttackConfig(), -2)


def test_a_random_start_does_not_depend_on_the_layout_of_the_images():
    images, attack = torch.rand(4, 3, 8, 8), AttackConfig()
    other = images.to(memory_format=torch.channels_last)
    assert torch.equal(keyed_start(images, range(4), attack, 0), keyed_start(other, range(4), attack, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": 8 / 255}, "attack is 0.03.*AttackConfig"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).bfloat16()}, "bfloat16.*model.float"),
        ({"images": torch.rand(2, 3, 8, 8).double()}, "float64.*float32.*same dtype"),
        ({"model": nn.Conv2d(3, 5, 1)}, r"shape \[2, 5, 8, 8\]; \[N, classes\]"),
    ],
)
def test_what_does_not_fit_an_attack_is_named(change, message):
    given = {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "images": torch.rand(2, 3, 8, 8)}
    given |= {"labels": torch.zeros(2, dtype=torch.int64), "attack": AttackConfig(num_steps=1)} | change
    with pytest.raises(ValueError, match=message):
        pgd_attack(**given)


def test_inference_mode_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with torch.inference_mode(), pytest.raises(ValueError, match="leave torch.inference_mode"):
        pgd_attack(net, torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), AttackConfig())

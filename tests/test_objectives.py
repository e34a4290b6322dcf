"""The objectives equal the published formulas, in value and in every gradient."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mrpf.attacks import AttackConfig, pgd_attack
from hf_mrpf.objectives import OBJECTIVES, ObjectiveOutput, get_objective, mart, pgd, rslad, standard, trades

ATTACK = AttackConfig(eps=0.1, step_size=0.03, num_steps=4)


def net_and_data():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    ).double()
    with torch.no_grad():
        for _ in range(5):
            net(torch.rand(32, 3, 8, 8, dtype=torch.float64))
    return net.train(), torch.rand(12, 3, 8, 8, dtype=torch.float64), torch.randint(0, 5, (12,))


def published_trades(model, x_natural, y, attack, beta):
    """The loop of the reference script, with its clean prediction at every step and KL on probabilities."""
    criterion_kl = nn.KLDivLoss(reduction="sum")
    model.eval()
    x_adv = x_natural.detach() + 0.001 * torch.randn_like(x_natural)
    for _ in range(attack.num_steps):
        x_adv.requires_grad_()
        loss_kl = criterion_kl(F.log_softmax(model(x_adv), 1), F.softmax(model(x_natural), 1))
        grad = torch.autograd.grad(loss_kl, [x_adv])[0]
        x_adv = x_adv.detach() + attack.step * torch.sign(grad)
        x_adv = torch.min(torch.max(x_adv, x_natural - attack.eps), x_natural + attack.eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    model.train()
    logits = model(x_natural)
    divergence = criterion_kl(F.log_softmax(model(x_adv), 1), F.softmax(model(x_natural), 1)) / len(x_natural)
    return F.cross_entropy(logits, y) + beta * divergence, x_adv


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_trades_equals_the_published_loop(dtype, tolerance, beta):
    net, images, labels = net_and_data()
    # Black and white pixels: the start leaves [0, 1] there, and must not be clamped.
    net, images = net.to(dtype), images.round().to(dtype)
    reference = copy.deepcopy(net)
    torch.manual_seed(7)
    expected, expected_images = published_trades(reference, images, labels, ATTACK, beta)
    expected.backward()
    torch.manual_seed(7)
    output = trades(net, images, labels, ATTACK, beta=beta)
    output.loss.backward()
    assert torch.allclose(output.adversarial_images, expected_images, atol=1e-6)
    assert output.loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for (name, ours), theirs in zip(net.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance), name


def test_trades_lets_the_gradient_through_both_sides():
    net, images, labels = net_and_data()
    adversarial = (images + 0.1).clamp(0, 1)
    output = trades(net, images, labels, ATTACK, adversarial_images=adversarial)
    output.loss.backward()
    one_sided = copy.deepcopy(net)
    one_sided.zero_grad()
    clean, moved = one_sided(images), one_sided(adversarial)
    kl = F.kl_div(moved.log_softmax(1), clean.detach().softmax(1), reduction="batchmean")
    (F.cross_entropy(clean, labels) + 6 * kl).backward()
    assert output.loss.item() == pytest.approx((F.cross_entropy(clean, labels) + 6 * kl).item())
    assert not torch.allclose(net[-1].weight.grad, one_sided[-1].weight.grad, rtol=1e-3)


def test_trades_runs_one_clean_forward_for_the_attack_and_two_for_training():
    net, images, labels = net_and_data()
    calls = []
    net.register_forward_hook(lambda module, inputs, output: calls.append((module.training, torch.is_grad_enabled())))
    trades(net, images, labels, ATTACK)
    assert calls == [(False, False)] + [(False, True)] * ATTACK.num_steps + [(True, True)] * 2


def test_trades_draws_its_noise_once_from_the_global_generator():
    net, images, labels = net_and_data()
    torch.manual_seed(3)
    trades(net, images, labels, ATTACK)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randn_like(images)
    assert torch.equal(torch.get_rng_state(), state)
    trades(net, images, labels, ATTACK, adversarial_images=images)
    assert torch.equal(torch.get_rng_state(), state)


def published_mart(logits, adversarial_logits, labels, beta):
    """Eq. by eq. from probabilities, as in the paper, image by image."""
    total = 0.0
    for clean, adversarial, label in zip(logits.softmax(1), adversarial_logits.softmax(1), labels, strict=True):
        strongest = max(adversarial[k] for k in range(len(adversarial)) if k != label)
        boosted = -torch.log(adversarial[label]) - torch.log(1 - strongest)
        divergence = sum(clean[k] * torch.log(clean[k] / adversarial[k]) for k in range(len(clean)))
        total = total + boosted + beta * divergence * (1 - clean[label])
    return total / len(labels)


@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_mart_equals_the_published_formula(beta):
    net, images, labels = net_and_data()
    reference = copy.deepcopy(net)
    torch.manual_seed(5)
    adversarial = pgd_attack(net, images, labels, ATTACK)
    torch.manual_seed(5)
    output = mart(net, images, labels, ATTACK, beta=beta)
    assert torch.equal(output.adversarial_images, adversarial)
    expected = published_mart(reference(images), reference(adversarial), labels, beta)
    output.loss.backward()
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for (name, ours), theirs in zip(net.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("objective", [trades, mart, rslad])
def test_the_loss_is_finite_for_sure_logits(objective):
    net, images, labels = net_and_data()
    with torch.no_grad():
        net[-1].weight.mul_(1e4)
    output = objective(net, images, labels, ATTACK, teacher=copy.deepcopy(net).requires_grad_(False))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def published_rslad(student, teacher, x, attack):
    """Attack and loss on probabilities: both drive at the teacher's prediction of the clean images."""
    soft = F.softmax(teacher(x), 1).detach()
    criterion = nn.KLDivLoss(reduction="sum")
    student.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(attack.num_steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(criterion(F.log_softmax(student(x_adv), 1), soft), [x_adv])
        x_adv = x_adv.detach() + attack.step * torch.sign(grad)
        x_adv = torch.min(torch.max(x_adv, x - attack.eps), x + attack.eps).clamp(0, 1)
    student.train()
    losses = [criterion(F.log_softmax(student(part), 1), soft) / len(x) for part in (x, x_adv)]
    return losses[0] / 6 + losses[1] * 5 / 6, x_adv


def test_rslad_equals_the_published_formula_and_leaves_the_teacher_alone():
    net, images, labels = net_and_data()
    teacher, _, _ = net_and_data()
    reference, before = copy.deepcopy(net), copy.deepcopy(teacher.state_dict())
    torch.manual_seed(7)
    expected, expected_images = published_rslad(reference, copy.deepcopy(teacher).eval(), images, ATTACK)
    expected.backward()
    torch.manual_seed(7)
    output = rslad(net, images, labels, ATTACK, teacher=teacher)
    output.loss.backward()
    assert torch.allclose(output.adversarial_images, expected_images, atol=1e-6)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for (name, ours), theirs in zip(net.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10), name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.training and all(parameter.grad is None for parameter in teacher.parameters())


def test_rslad_needs_a_teacher_of_the_same_classes():
    net, images, labels = net_and_data()
    with pytest.raises(ValueError, match=r"none was given; give the dense, robust parent: MRPFTrainer\(..., teacher="):
        rslad(net, images, labels, ATTACK)
    fewer = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    with pytest.raises(ValueError, match="teacher has 3 classes and the model 5"):
        rslad(net, images, labels, ATTACK, teacher=fewer, adversarial_images=images)
    for classes in (3, 1):
        fewer = nn.Sequential(nn.Flatten(), nn.Linear(192, classes)).double()
        with pytest.raises(ValueError, match=rf"have {classes} classes and the model 5; .*a teacher"):
            rslad(net, images, labels, ATTACK, teacher=fewer)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_norm_sees_only_the_training_forwards(name):
    net, images, labels = net_and_data()
    before, teacher = net[1].num_batches_tracked.item(), copy.deepcopy(net)
    OBJECTIVES[name](net, images, labels, ATTACK, teacher=teacher)
    assert net[1].num_batches_tracked.item() - before == (1 if name in ("pgd", "standard") else 2)
    assert all(module.training for module in net.modules())
    # A frozen BatchNorm stays frozen, in the training forwards too.
    net[1].eval()
    statistics = net[1].running_mean.clone()
    OBJECTIVES[name](net, images, labels, ATTACK, teacher=teacher)
    assert torch.equal(net[1].running_mean, statistics)
    assert [module.training for module in net.modules()].count(False) == 1


def test_pgd_is_cross_entropy_on_the_attacked_images():
    net, images, labels = net_and_data()
    torch.manual_seed(5)
    adversarial = pgd_attack(net, images, labels, ATTACK)
    torch.manual_seed(5)
    output = pgd(net, images, labels, ATTACK)
    assert torch.equal(output.adversarial_images, adversarial)
    assert output.logits is None
    assert output.loss.item() == pytest.approx(F.cross_entropy(net(adversarial), labels).item())
    assert torch.equal(output.adversarial_logits.argmax(1), net(adversarial).argmax(1))


def test_standard_is_plain_cross_entropy_without_an_attack():
    net, images, labels = net_and_data()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    output = standard(net, images, labels, ATTACK)
    assert len(calls) == 1
    assert output.loss.item() == pytest.approx(F.cross_entropy(output.logits, labels).item())
    assert output.adversarial_images is None and output.adversarial_logits is None


@pytest.mark.parametrize("objective", [trades, pgd])
def test_given_adversarial_images_replace_the_attack(objective):
    net, images, labels = net_and_data()
    calls = []
    net.register_forward_hook(lambda module, *_: calls.append(module.training))
    output = objective(net, images, labels, ATTACK, adversarial_images=images)
    assert all(calls) and len(calls) == (2 if objective is trades else 1)
    assert output.adversarial_images is images
    if objective is trades:
        assert output.loss.item() == pytest.approx(F.cross_entropy(output.logits, labels).item())


@pytest.mark.parametrize("objective", [trades, pgd])
def test_the_attack_runs_on_what_is_attacked(objective):
    net, images, labels = net_and_data()
    ran = {"wrapper": 0, "inner": 0, "other": 0}

    def count(key):
        return lambda *_: ran.__setitem__(key, ran[key] + 1)

    wrapper = nn.DataParallel(net)
    wrapper.register_forward_hook(count("wrapper"))
    net.register_forward_hook(count("inner"))
    training = 2 if objective is trades else 1
    attacking = ATTACK.num_steps + (objective is trades)
    objective(wrapper, images, labels, ATTACK)
    assert ran == {"wrapper": training, "inner": training + attacking, "other": 0}
    other = copy.deepcopy(net)
    other._forward_hooks.clear()
    other.register_forward_hook(count("other"))
    objective(wrapper, images, labels, ATTACK, attacked=other)
    assert ran == {"wrapper": 2 * training, "inner": 2 * training + attacking, "other": attacking}


def test_trades_refuses_integer_pixels():
    net, images, labels = net_and_data()
    with pytest.raises(ValueError, match="divide them by 255"):
        trades(net, (images * 255).byte(), labels, ATTACK)


def test_every_objective_has_the_public_signature():
    expected = ["model", "images", "labels", "attack", "beta", "attacked", "adversarial_images", "teacher"]
    for objective in OBJECTIVES.values():
        parameters = inspect.signature(objective).parameters
        assert list(parameters) == expected
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in expected[4:])
        assert parameters["beta"].default == 6.0


def test_get_objective():
    assert get_objective("trades") is trades

    def mine(model, images, labels, attack, **_):
        return ObjectiveOutput(model(images).sum())

    assert get_objective(mine) is mine
    with pytest.raises(
        ValueError, match="objective is 'trade'; known objectives: trades, pgd, mart, rslad, standard, or any callable"
    ):
        get_objective("trade")

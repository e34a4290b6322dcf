"""The parts of AutoAttack: what they find is in the ball and fools; verdicts are those of the published package."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from process_group import on_processes
from torch import nn

from hf_mrpf import AttackConfig, evaluate_robustness, load_image_data, pgd_attack, square
from hf_mrpf.apgd import apgd_attack, checkpoints, targeted_loss
from hf_mrpf.data import as_pixel_dataset
from hf_mrpf.fab import fab_attack, to_hyperplane
from hf_mrpf.named_attacks import ATTACKS, NamedAttack, runs_of, settings_of
from hf_mrpf.square import side, square_attack

BALLS = [("linf", 0.12), ("l2", 0.7)]


@pytest.fixture(scope="module")
def digits():
    """A small network after a little adversarial training, with test images."""
    data = load_image_data("digits")
    pixels = [as_pixel_dataset(split, None)[:] for split in (data.train, data.test)]
    (x, y), (images, labels) = ((p["pixel_values"].float() / 255, torch.as_tensor(p["labels"])) for p in pixels)
    x, images = F.avg_pool2d(x, 2), F.avg_pool2d(images, 2)  # as small as they were drawn
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(4):
        for rows in torch.randperm(len(x)).split(64):
            adversarial = pgd_attack(net.eval(), x[rows], y[rows], AttackConfig(eps=0.1, num_steps=3))
            optimizer.zero_grad()
            F.cross_entropy(net.train()(adversarial), y[rows]).backward()
            optimizer.step()
    return net.eval(), images, labels


def attacked(method, net, images, labels, attack, indices=None, seed=0):
    if method == "apgd":
        return apgd_attack(net, images, labels, attack)
    targets = net(images).detach().scatter(1, labels[:, None], -math.inf).argmax(1)
    if method == "apgd-t":
        return apgd_attack(net, images, labels, attack, targets=targets)
    if method == "fab-t":
        return fab_attack(net, images, labels, attack, targets=targets)
    return square_attack(net, images, labels, attack, indices=indices or range(len(images)), seed=seed)


@pytest.mark.parametrize("norm, eps", BALLS)
@pytest.mark.parametrize("method, steps", [("apgd", 20), ("apgd-t", 20), ("fab-t", 20), ("square", 100)])
def test_what_is_found_lies_in_the_ball_and_no_image_depends_on_the_others(digits, method, steps, norm, eps):
    net, images, labels = digits[0], *(rows[:24] for rows in digits[1:])
    attack = AttackConfig(norm, eps, num_steps=steps)
    found = attacked(method, net, images, labels, attack)
    distance = (found - images).flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1)
    assert distance.max() <= eps * (1 + 1e-5)
    assert found.min() >= 0 and found.max() <= 1
    clean, robust = ((net(x).argmax(1) == labels) for x in (images, found))
    assert robust.sum() < clean.sum() and distance.max() > eps / 2
    torch.manual_seed(9)  # the global generator is not read
    order = list(range(23, -1, -1))
    parts = [attacked(method, net, images[o], labels[o], attack, indices=o) for o in (order[:5], order[5:])]
    alone = torch.cat(parts).flip(0)
    assert torch.equal(net(alone).argmax(1) == labels, robust)
    # Rounding differs with the batch; where it decided a sign, it decided those of a few pixels.
    assert ((alone - found).abs().flatten(1).amax(1) < 1e-4).float().mean() > 0.8


@pytest.mark.parametrize("method", ["apgd", "apgd-t", "fab-t", "square"])
def test_the_model_is_left_as_it_was_and_eps_0_leaves_the_images(digits, method):
    net, images, labels = copy.deepcopy(digits[0]), *(rows[:4] for rows in digits[1:])
    net.zero_grad()
    assert torch.equal(attacked(method, net, images, labels, AttackConfig(eps=0.0)), images)
    net[1].train()
    net[3].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    targets, attack = (labels + 1) % 10, AttackConfig(eps=0.1, num_steps=2)
    {
        "apgd": lambda: apgd_attack(net, images, labels, attack),
        "apgd-t": lambda: apgd_attack(net, images, labels, attack, targets=targets),
        "fab-t": lambda: fab_attack(net, images, labels, attack, targets=targets),
        "square": lambda: square_attack(net, images, labels, attack, indices=range(4)),
    }[method]()
    assert [module.training for module in net.children()] == [module is net[1] for module in net.children()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [p is not net[3].bias for p in net.parameters()]
    assert all(p.grad is None for p in net.parameters())


def test_targeted_loss_is_that_of_the_paper_and_the_margin_below_four_classes():
    logits = torch.tensor([[3.0, 1.0, 7.0, 2.0, -5.0]])
    # (z_t - z_y) / (z_1 - (z_3 + z_4) / 2) = (1 - 3) / (7 - 1.5)
    value = targeted_loss(logits, torch.tensor([0]), torch.tensor([1]))
    assert value.item() == pytest.approx(-2 / 5.5)
    assert targeted_loss(9 * logits, torch.tensor([0]), torch.tensor([1])).item() == pytest.approx(value.item())
    for classes in (2, 3):
        assert targeted_loss(logits[:, :classes], torch.tensor([0]), torch.tensor([1])).item() == -2


def test_checkpoints_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_step_to_a_hyperplane_is_the_shortest_within_the_box(norm):
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(40, 30, generator=generator, dtype=torch.float64)
    points[:, ::4] = points[:, ::4].round()
    normal = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    normal[:, ::7] = 0
    value = torch.randn(40, generator=generator, dtype=torch.float64)
    step = to_hyperplane(points, normal, value, norm)
    assert (points + step).min() >= -1e-12 and (points + step).max() <= 1 + 1e-12
    assert (value + (normal * step).sum(1)).abs().max() < 1e-9
    # The same by bisection over how far coordinates go.
    low, high = torch.zeros(40, dtype=torch.float64), torch.full((40,), 1e3, dtype=torch.float64)
    toward = -value.sign()[:, None] * (normal.sign() if norm == "linf" else normal)
    for _ in range(100):
        middle = (low + high) / 2
        moved = (points + middle[:, None] * toward).clamp(0, 1) - points
        short = (normal * moved).sum(1).abs() < value.abs()
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    assert (step - moved).abs().max() < 1e-9
    # A hyperplane out of reach: the corner that is closest to it.
    far = to_hyperplane(points, normal, torch.full((40,), 1e6, dtype=torch.float64), norm)
    corner = torch.where(normal > 0, 0.0, torch.where(normal < 0, 1.0, points))
    assert torch.allclose(points + far, corner)


def test_squares_shrink_on_the_published_schedule():
    # sqrt(0.8 * 32 * 32) = 28.6, halved areas after 10, 50, 200, ... queries.
    assert [side(query, 32, 32) for query in (0, 10, 11, 51, 201, 501, 4001)] == [29, 29, 20, 14, 10, 7, 3]
    assert side(0, 4, 9) == 4 and side(9000, 8, 8) == 1


def test_a_bump_of_an_edge_is_made_once_however_many_queries_move_it(monkeypatch):
    made = []
    monkeypatch.setattr("hf_mrpf.square._bump", lambda edge, real=square._bump: [made.append(edge), real(edge)][1])
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    images = torch.full((1, 3, 16, 16), 0.5)
    labels = net(images).argmax(1)
    start = square._start_l2(images, AttackConfig("l2", 1e-4), [0], 0)
    assert start[0].shape == images.shape
    first = len(made)
    square_attack(net, images, labels, AttackConfig("l2", 1e-4, num_steps=60), indices=[0])
    # Edges of 15, 11 and 7 pixels.
    assert sorted(made[2 * first :]) == [7, 11, 15]


@pytest.mark.parametrize("norm, eps", BALLS)
def test_square_answers_alike_whatever_device_is_the_default(digits, norm, eps):
    net, images, labels = digits[0], *(rows[:4] for rows in digits[1:])
    attack = AttackConfig(norm, eps, num_steps=20)
    expected = attacked("square", net, images, labels, attack)
    with torch.device("meta"):
        assert torch.equal(square_attack(net, images, labels, attack, indices=range(4)), expected)


def test_two_classes_up_to_ten_are_named_for_what_is_run():
    attack = AttackConfig()
    standard = settings_of("autoattack", attack, 10)
    assert standard["standard"] and "differs" not in standard
    assert list(standard["parts"]) == ["apgd_ce", "apgd_t", "fab_t", "square"]
    assert standard["parts"]["apgd_t"] | {"loss": "dlr", "steps": 100, "targets": 9} == standard["parts"]["apgd_t"]
    assert standard["parts"]["square"]["queries"] == 5000 and standard["parts"]["fab_t"]["targets"] == 9
    assert [len(runs_of("autoattack", classes)) for classes in (1000, 10, 5, 2)] == [20, 20, 10, 4]
    five, two = (settings_of("autoattack", attack, classes) for classes in (5, 2))
    assert not five["standard"] and five["differs"] == "4 of 9 targets"
    assert five["parts"]["apgd_t"]["loss"] == "dlr" and two["parts"]["apgd_t"]["loss"] == "margin"
    assert two["differs"] == "1 of 9 targets; margin in the place of targeted DLR, which needs 4 classes"
    assert len(runs_of("pgd50x5", 10)) == 5


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_attacked_to_the_known_verdicts(classes):
    # Logits linear in the pixels, and images far from 0 and 1: what withstands is known.
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    images = 0.3 + 0.4 * torch.rand(40, 3, 4, 4, generator=generator)
    logits = net(images).detach()
    labels, weight = logits.argmax(1), net[1].weight.detach()
    # The largest eps at which each label still holds against every other class.
    held = (logits.gather(1, labels[:, None]) - logits) / (weight[labels][:, None] - weight).abs().sum(2)
    held = held.scatter(1, labels[:, None], math.inf).amin(1)
    eps = held.sort().values[19:21].mean().item()
    expected = held > eps
    assert expected.sum() == 20 and eps < 0.2
    clear = (held / eps - 1).abs() > 0.02  # FAB ends a little beyond the boundary
    assert clear.sum() > 30
    # With three classes the steepest cross-entropy may lead to the wrong one of the other two.
    for name in ("apgd_t", "fab_t", *(["apgd_ce"] if classes == 2 else [])):
        found = evaluate_robustness(net, (images, labels), (name,), AttackConfig(eps=eps)).verdicts[name]
        assert torch.equal(torch.tensor(found)[clear], expected[clear]), name


def shorter(monkeypatch, steps=20, queries=100):
    """AutoAttack at a fraction of its steps."""
    parts = [
        NamedAttack(part.loss, queries if part.method == "square" else steps, method=part.method, targets=part.targets)
        for part in ATTACKS["autoattack"]
    ]
    names = ("apgd_ce", "apgd_t", "fab_t", "square")
    for name, part in zip(names, parts, strict=True):
        monkeypatch.setitem(ATTACKS, name, (part,))
    monkeypatch.setitem(ATTACKS, "autoattack", tuple(parts))
    return names


def verdicts_of(net, data, distributed):
    with pytest.MonkeyPatch.context() as monkeypatch:  # here, as another process knows nothing of a test's patches
        shorter(monkeypatch, 6, 30)
        return evaluate_robustness(
            net, data, ("autoattack",), AttackConfig(eps=0.12), batch_size=8, distributed=distributed
        ).verdicts


def test_shares_of_two_processes_give_every_image_the_verdict_of_one(digits):
    data = tuple(rows[:41] for rows in digits[1:])
    first, second = on_processes(2, verdicts_of, digits[0], data, True)
    assert first == second == verdicts_of(digits[0], data, False)
    assert 0 < sum(first["autoattack"]) < sum(first["clean"]) < 41


@pytest.mark.slow
def test_an_evaluation_of_a_thousand_images_goes_on_after_an_interruption(digits, monkeypatch, tmp_path):
    shorter(monkeypatch, 20, 200)
    net, images, labels = digits
    # As many as there are, and as many of the same brightened a little.
    data = torch.cat([images, (images * 1.05).clamp(0, 1)]), torch.cat([labels, labels])
    assert len(data[1]) == 1000
    attack, calls, stop = AttackConfig(eps=0.12), [], []

    def count(module, inputs):
        calls.append(len(inputs[0]))
        if stop and len(calls) > stop[0]:
            raise KeyboardInterrupt

    def evaluated(**options):
        calls.clear()
        report = evaluate_robustness(net, data, ("clean", "pgd20", "autoattack"), attack, batch_size=100, **options)
        return report, len(calls)

    with net.register_forward_pre_hook(count):
        whole, passes = evaluated()
        stop.append(passes // 2)
        with pytest.raises(KeyboardInterrupt):
            evaluated(journal=tmp_path / "verdicts.jsonl")
        stop.clear()
        again, left = evaluated(journal=tmp_path / "verdicts.jsonl")
    assert again == whole
    assert left < 0.75 * passes


@pytest.mark.parametrize("norm, eps", BALLS)
def test_the_union_over_parts_is_exact_whatever_the_batches(digits, norm, eps, monkeypatch, tmp_path):
    parts = shorter(monkeypatch, 6, 30)
    net, images, labels = digits[0], *(rows[:40] for rows in digits[1:])
    attack, data = AttackConfig(norm, eps), (images, labels)
    together = evaluate_robustness(net, data, ("autoattack",), attack, batch_size=40)
    assert 0 < together.attacks["autoattack"] < together.clean_accuracy
    # Each part on all images, batch by batch, with no thought of what the others found.
    apart = [evaluate_robustness(net, data, (part,), attack, batch_size=7).verdicts[part] for part in parts]
    union = [all(bits) for bits in zip(*apart, strict=True)]
    assert union == together.verdicts["autoattack"]
    # An evaluation that is broken off goes on, and runs nothing twice.
    passes, broken = [], []

    def count(module, inputs):
        passes.append(len(inputs[0]))
        if broken and len(passes) == broken[0]:
            raise KeyboardInterrupt

    hook = net.register_forward_pre_hook(count)
    evaluate_robustness(net, data, ("autoattack",), attack, batch_size=8)
    whole = len(passes)
    passes.clear()
    broken.append(whole * 2 // 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(net, data, ("autoattack",), attack, batch_size=8, journal=tmp_path / "verdicts.jsonl")
    broken.clear()
    passes.clear()
    again = evaluate_robustness(net, data, ("autoattack",), attack, batch_size=8, journal=tmp_path / "verdicts.jsonl")
    hook.remove()
    assert again.verdicts == together.verdicts and 0 < len(passes) < whole * 0.6


def test_survivors_run_in_full_batches_over_pools_of_bounded_size(digits, monkeypatch):
    shorter(monkeypatch, 4, 10)
    net, images, labels = digits[0], *(rows[:48] for rows in digits[1:])
    attack = AttackConfig(eps=0.12)
    whole = evaluate_robustness(net, (images, labels), ("autoattack",), attack, batch_size=16)
    sizes = []
    hook = net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    evaluate_robustness(net, (images, labels), ("square", "autoattack"), attack, batch_size=16)
    hook.remove()
    assert max(sizes) == 16
    monkeypatch.setattr("hf_mrpf.indexed_images.pools.__defaults__", (20 * images[0].nbytes,))
    small = evaluate_robustness(net, (images, labels), ("autoattack",), attack, batch_size=16)
    assert small.verdicts == whole.verdicts and small.images == whole.images


def published(net, images, labels, norm, eps):
    """Which images withstand the standard set of the package by the authors of AutoAttack."""
    package = pytest.importorskip("pyautoattack")
    official = package.AutoAttack(net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0, device="cpu")
    found, _ = official.run_standard_evaluation(images, labels, batch_size=250)
    assert official.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    return net(found).argmax(1) == labels


@pytest.mark.slow
@pytest.mark.parametrize("norm, eps", BALLS)
def test_autoattack_is_that_of_its_authors_within_half_a_point_on_500_images(digits, norm, eps):
    net, images, labels = digits[0], *(rows[:500] for rows in digits[1:])
    assert len(images) == 500
    theirs = published(net, images, labels, norm, eps).float().mean().item()
    ours = evaluate_robustness(net, (images, labels), ("autoattack",), AttackConfig(norm, eps), batch_size=250)
    assert 0.1 < ours.attacks["autoattack"] < 0.9
    assert abs(ours.attacks["autoattack"] - theirs) <= 0.005


@pytest.mark.parametrize("norm, eps", BALLS)
def test_fab_is_that_of_the_authors_package(digits, norm, eps):
    base = pytest.importorskip("pyautoattack.fab_pt")
    net, images, labels = digits[0], *(rows[:60] for rows in digits[1:])
    right = net(images).argmax(1) == labels
    official = base.FABAttack_PT(
        net,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=eps,
        n_iter=20,
        n_restarts=1,
        seed=0,
        targeted=True,
        device="cpu",
    )
    official.n_target_classes = 1
    theirs = net(official.perturb(images, labels)).argmax(1) == labels
    ours = net(attacked("fab-t", net, images, labels, AttackConfig(norm, eps, num_steps=20))).argmax(1) == labels
    assert 0 < (theirs & right).sum() < right.sum()
    assert ((theirs & right) != (ours & right)).sum() <= 1


@pytest.mark.parametrize("norm, eps", [("linf", 0.04), ("l2", 0.3)])
def test_apgd_climbs_as_high_as_the_authors(digits, norm, eps):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    net, images, labels = digits[0], *(rows[:80] for rows in digits[1:])
    official = base.APGDAttack(
        net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, n_iter=60, seed=0, loss="ce", device="cpu"
    )
    official.init_hyperparam(images)
    _, withstand, highest, _ = official.attack_single_run(images, labels, x_init=images.clone())
    ours = apgd_attack(net, images, labels, AttackConfig(norm, eps, num_steps=60))
    held = (net(ours).argmax(1) == labels) & withstand.bool()  # those that left the batch stopped climbing
    assert held.sum() > 40
    losses = F.cross_entropy(net(ours), labels, reduction="none")
    assert torch.allclose(losses[held], highest[held], rtol=0.01, atol=1e-4)

"""MRS equals a naive reference and the closed form of the linear model, and leaves the model bit for bit as it was."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from hf_mrpf.attacks import AttackConfig, keyed_start, pgd_attack
from hf_mrpf.calibration import attacked_batches
from hf_mrpf.sensitivity import (
    METHODS,
    SensitivityResult,
    check_finite_weights,
    module_robustness_sensitivity,
    unit_sensitivity,
)

ATTACK = AttackConfig(eps=0.05, num_steps=3)


class Net(nn.Module):
    """Convolutions with BatchNorm, a depthwise one, dropout, a module that is never run, and an output with .logits."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.unused = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.fc1 = nn.Linear(128, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, pixels):
        x = F.relu(self.depthwise(F.relu(self.norm(self.conv1(pixels)))))
        return SimpleNamespace(logits=self.fc2(self.drop(F.relu(self.fc1(x.flatten(1))))))


SCORED = ["conv1", "depthwise", "unused", "fc1", "fc2"]


def calibration(count: int = 24, sets: int = 1, dtype: torch.dtype = torch.float32):
    return [(torch.rand(count, 3, 8, 8, dtype=dtype), torch.randint(0, 5, (count,))) for _ in range(sets)]


@pytest.fixture
def net():
    net = Net().train()
    (images, labels), *_ = calibration(64)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(net(images).logits, labels).backward()
        optimizer.step()
    net.zero_grad()
    return net


def fixed_adversarial_images(net, images, labels, attack=ATTACK, seed=0, first=0):
    start = keyed_start(images, range(first, first + len(images)), attack, seed)
    return pgd_attack(net, images, labels, attack, start=start)


class Layouts(TorchDispatchMode):
    """Whether weights or only images get a gradient, and the layout of the images, at each convolution."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            contiguous = args[1].is_contiguous() and not args[1].is_contiguous(memory_format=torch.channels_last)
            self.seen.add(("weights" if args[-1][1] else "images", "contiguous" if contiguous else "channels last"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("eps", [0, 0.05])
def test_weights_get_no_gradient_in_channels_last_which_corrupts_the_heap(net, eps):
    # oneDNN issue 6035, on processors without AVX-512 at fewer than 8 channels, as pruned networks have them
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in calibration()]
    with Layouts() as layouts:
        module_robustness_sensitivity(net, batches, AttackConfig(eps=eps, num_steps=1), num_steps=2)
    expected = {("weights", "contiguous"), ("images", "contiguous")}  # of layers before the one that changes
    assert layouts.seen - {("images", "channels last")} == expected
    assert (("images", "channels last") in layouts.seen) is (eps > 0)


class Leaves(nn.Module):
    """Its first layer leaves what it returned, or doubled, for another place to find."""

    def __init__(self, in_a_list):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.stem, self.in_a_list = nn.Sequential(), in_a_list
        self.stem.forward = self.leave

    def leave(self, pixels, found):
        x = self.first(pixels)
        found.append(x)
        self.left = x * 2
        return x

    def forward(self, pixels):
        found = []
        x = self.stem(pixels, found)
        other = found[0] if self.in_a_list else self.left
        return self.third(F.relu(self.second(x)).mean((2, 3)) + other.mean((2, 3)))


@pytest.mark.parametrize("in_a_list", [False, True])
def test_a_network_that_leaves_values_aside_is_passed_through_whole(in_a_list, monkeypatch, caplog):
    net, batches = Leaves(in_a_list).eval(), calibration()
    with caplog.at_level("INFO", "hf_mrpf"):
        found = module_robustness_sensitivity(net, batches, ATTACK, batch_size=8)
    assert "raises IndexError" if in_a_list else "gives other logits" in caplog.text
    monkeypatch.setattr("hf_mrpf.prefix.Prefix.stop_before", lambda *_: None)
    whole = module_robustness_sensitivity(net, batches, ATTACK, batch_size=8)
    assert dict(found) == pytest.approx(dict(whole), rel=1e-6)


class Accumulates(nn.Module):
    """Its stem resets a sum that goes on from call to call of what follows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.stem = nn.Sequential()
        self.stem.forward = self.reset

    def reset(self, pixels):
        self.total = 0
        return self.first(pixels)

    def forward(self, pixels):
        x = self.second(self.stem(pixels))
        self.total = self.total + x.mean((2, 3))
        return self.third(self.total)


def test_a_sum_that_a_kept_module_resets_is_seen_by_the_second_pass(monkeypatch, caplog):
    net, batches = Accumulates().eval(), calibration()
    with caplog.at_level("INFO", "hf_mrpf"):
        found = module_robustness_sensitivity(net, batches, ATTACK, batch_size=8)
    assert "gives other logits" in caplog.text
    monkeypatch.setattr("hf_mrpf.prefix.Prefix.stop_before", lambda *_: None)
    whole = module_robustness_sensitivity(net, batches, ATTACK, batch_size=8)
    assert dict(found) == pytest.approx(dict(whole), rel=1e-6)


def naive_mrs(net, images, labels, weight, gamma, steps):
    """The definition, one module at a time: projected ascent in ten lines."""
    theta, radius = weight.detach().clone(), gamma * weight.norm().item()
    loss = lambda: F.cross_entropy(net(images).logits, labels)  # noqa: E731
    base, best, d = loss().item(), 0.0, torch.zeros_like(theta)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(), weight, allow_unused=True)
        if gradient is None:
            return 0.0
        d = d + radius * gradient / gradient.norm()
        d = d * min(1.0, radius / d.norm().item())
        weight.data = theta + d
        best = max(best, loss().item() - base)
    weight.data = theta
    return best


# --- values ---


def test_steps_of_each_method():
    assert METHODS == {"ascent": 3, "exact": 10, "first_order": 0}


@pytest.mark.parametrize("method", ["ascent", "exact"])
def test_equals_the_naive_reference(net, method):
    ((images, labels),) = calibration()
    result = module_robustness_sensitivity(net, [(images, labels)], ATTACK, method=method)
    net.eval()
    adversarial = fixed_adversarial_images(net, images, labels)
    weights = {name: net.get_submodule(name).weight for name in SCORED}
    expected = {name: naive_mrs(net, adversarial, labels, w, 0.1, METHODS[method]) for name, w in weights.items()}
    assert list(result) == SCORED
    assert dict(result) == pytest.approx(expected, rel=1e-4)
    assert result["unused"] == 0
    assert min(result[name] for name in SCORED if name != "unused") > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_gives_the_same_scores_to_its_own_precision(net, method):
    kinds = []

    (images, labels), *_ = calibration(64)
    adversarial = [(pgd_attack(net, images, labels, ATTACK), labels)]
    single = module_robustness_sensitivity(net, adversarial, AttackConfig(eps=0), method=method)
    half = AttackConfig(eps=0, dtype="bfloat16")
    with_hook = net.fc2.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    found = module_robustness_sensitivity(net, adversarial, half, method=method)
    with_hook.remove()
    assert set(kinds) == {torch.bfloat16} and found.settings["attack"]["dtype"] == "bfloat16"
    assert dict(found) != dict(single), "float32 was computed in"
    assert dict(found) == pytest.approx(dict(single), rel=0.05, abs=1e-3)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    # What a weight that is not changed scores is no difference between two forms of the network.
    still = module_robustness_sensitivity(net, adversarial, half, method=method, gamma=1e-6)
    assert max(still.values()) < 1e-5
    # Autocast keeps the casts of weights, which are other ones after a step.
    with torch.autocast("cpu", torch.bfloat16):
        around = module_robustness_sensitivity(net, adversarial, AttackConfig(eps=0), method=method)
    assert dict(around) == dict(found)


def test_first_order_is_norm_times_gradient_norm(net):
    ((images, labels),) = calibration()
    result = module_robustness_sensitivity(net, [(images, labels)], ATTACK, method="first_order", gamma=0.2)
    net.eval()
    F.cross_entropy(net(fixed_adversarial_images(net, images, labels)).logits, labels).backward()
    for name in SCORED:
        weight = net.get_submodule(name).weight
        expected = 0.0 if weight.grad is None else 0.2 * (weight.norm() * weight.grad.norm()).item()
        assert result[name] == pytest.approx(expected, rel=1e-4)


def test_linear_model_in_closed_form():
    """Two classes, one image: the loss falls with the margin alone, so both maxima are known."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images, labels = torch.rand(1, 3, 2, 2) * 0.4 + 0.3, torch.tensor([1])
    weight, bias = net[1].weight.detach(), net[1].bias.detach()
    towards = weight[0] - weight[1]
    # No random start and a step as long as the radius: the attack ends in the known corner.
    attack = AttackConfig(eps=0.1, step_size=0.1, num_steps=2, random_start=False)
    x = images.flatten() + 0.1 * towards.sign()
    margin = weight[1] @ x + bias[1] - weight[0] @ x - bias[0]
    radius = 0.1 * weight.norm()
    # The margin's gradient in the weights is (-x, x): it falls by at most radius * sqrt(2) * |x|.
    highest = F.softplus(-(margin - radius * math.sqrt(2) * x.norm())) - F.softplus(-margin)
    for method in ("ascent", "exact"):
        result = module_robustness_sensitivity(net, [(images, labels)], attack, method=method)
        assert result["1"] == pytest.approx(highest.item(), rel=1e-4)
    # (p - y) x^T has norm |p - y| * |x|.
    wrong = torch.stack([1 - torch.sigmoid(margin), torch.sigmoid(margin) - 1])
    result = module_robustness_sensitivity(net, [(images, labels)], attack, method="first_order")
    assert result["1"] == pytest.approx((radius * wrong.norm() * x.norm()).item(), rel=1e-4)


def test_ascent_is_at_least_its_first_step_and_exact_no_less_than_ascent(net):
    sets = calibration()
    one = module_robustness_sensitivity(net, sets, ATTACK, num_steps=1)
    ascent, exact = (module_robustness_sensitivity(net, sets, ATTACK, method=method) for method in ("ascent", "exact"))
    for name in SCORED:
        assert 0 <= one[name] <= ascent[name] <= exact[name]
    assert any(ascent[name] > one[name] for name in SCORED)


def test_a_descending_loss_scores_zero_not_less():
    class Hill(nn.Module):
        """The loss rises a little along its gradient, then falls: a step of the whole radius overshoots."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.scale.weight, 1.0)

        def forward(self, pixels):
            w = self.scale(torch.ones(len(pixels), 1))
            return torch.cat([w * 0, 0.1 * (w - 1) - 10 * (w - 1) ** 2], 1)

    images, labels = torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.long)
    result = module_robustness_sensitivity(Hill(), [(images, labels)], AttackConfig(eps=0), num_steps=1)
    assert result["scale"] == 0


@pytest.mark.parametrize("method", list(METHODS))
def test_zero_gamma_scores_zero(net, method):
    result = module_robustness_sensitivity(net, calibration(), ATTACK, method=method, gamma=0)
    assert set(result.values()) == {0.0}


def test_zero_eps_is_the_clean_sensitivity(net):
    ((images, labels),) = calibration()
    result = module_robustness_sensitivity(net, [(images, labels)], AttackConfig(eps=0))
    net.eval()
    expected = {name: naive_mrs(net, images, labels, net.get_submodule(name).weight, 0.1, 3) for name in SCORED}
    assert dict(result) == pytest.approx(expected, rel=1e-4)
    assert result.settings["forwards"] == 1 + 3 * 4
    assert dict(result) != pytest.approx(dict(module_robustness_sensitivity(net, [(images, labels)], ATTACK)), rel=1e-2)


def test_batch_size_changes_nothing(net):
    net = net.double()
    sets = calibration(24, 2, torch.float64)
    whole = module_robustness_sensitivity(net, sets, ATTACK)
    parts = module_robustness_sensitivity(net, sets, ATTACK, batch_size=7)
    assert dict(parts) == pytest.approx(dict(whole), rel=1e-8)
    assert parts.settings["forwards"] == whole.settings["forwards"]


def test_sets_are_averaged_and_compared(net):
    sets = calibration(24, 3)
    result = module_robustness_sensitivity(net, iter(sets), ATTACK)
    assert len(result.per_set) == 3
    first = module_robustness_sensitivity(net, sets[:1], ATTACK)
    assert first.per_set[0] == result.per_set[0] and first.spearman is None
    for name in SCORED:
        assert result[name] == pytest.approx(sum(scores[name] for scores in result.per_set) / 3)
    assert -1 <= result.spearman <= 1
    stats = pytest.importorskip("scipy.stats")
    columns = [list(scores.values()) for scores in result.per_set]
    pairs = [stats.spearmanr(columns[i], columns[j]).statistic for i, j in [(0, 1), (0, 2), (1, 2)]]
    assert result.spearman == pytest.approx(sum(pairs) / 3)


def test_spearman_with_ties_and_where_it_is_not_defined():
    from hf_mrpf.sensitivity import _mean_spearman

    def sets(*columns):
        return [dict(enumerate(column)) for column in columns]

    assert _mean_spearman(sets([1, 2, 3], [3, 2, 1])) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: by hand 4.5 / sqrt(4.5 * 5).
    assert _mean_spearman(sets([0.1, 5, 5, 9], [1, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(22.5))
    assert _mean_spearman(sets([0, 0, 0], [1, 2, 3])) is None
    assert _mean_spearman(sets([1], [2])) is None
    assert _mean_spearman(sets([1, 2])) is None


def test_the_seed_and_the_position_key_the_noise(net):
    sets = calibration(24, 2)
    same = module_robustness_sensitivity(net, sets, ATTACK, seed=1)
    torch.manual_seed(123)
    assert dict(module_robustness_sensitivity(net, sets, ATTACK, seed=1)) == dict(same)
    assert dict(module_robustness_sensitivity(net, sets, ATTACK, seed=2)) != dict(same)
    twice = module_robustness_sensitivity(net, [sets[0], sets[0]], ATTACK)
    assert twice.per_set[0] != twice.per_set[1]


# --- what is scored ---


def test_a_tied_weight_is_scored_once_and_perturbed_everywhere():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
            self.b.weight = self.a.weight

        def forward(self, pixels):
            return SimpleNamespace(logits=self.head(F.relu(self.b(F.relu(self.a(pixels.flatten(1)))))))

    net = Tied().eval()
    images, labels = torch.rand(8, 3, 2, 2), torch.randint(0, 5, (8,))
    result = module_robustness_sensitivity(net, [(images, labels)], AttackConfig(eps=0))
    assert list(result) == ["a", "head"]
    assert result["a"] == pytest.approx(naive_mrs(net, images, labels, net.a.weight, 0.1, 3), rel=1e-4)


def test_groups_are_perturbed_as_one_vector(net):
    sets = calibration()
    groups = {"all": ["conv1", "fc1"], "alone": ["fc2"]}
    result = module_robustness_sensitivity(net, sets, ATTACK, groups=groups)
    single = module_robustness_sensitivity(net, sets, ATTACK)
    assert list(result) == ["all", "alone"]
    assert result["alone"] == pytest.approx(single["fc2"], rel=1e-5)
    assert result["all"] > max(single["conv1"], single["fc1"])
    assert result.settings["groups"] == groups
    first = module_robustness_sensitivity(net, sets, ATTACK, groups=groups, method="first_order")
    net.eval()
    images, labels = sets[0]
    F.cross_entropy(net(fixed_adversarial_images(net, images, labels)).logits, labels).backward()
    weights = [net.conv1.weight, net.fc1.weight]
    norm, slope = (math.hypot(*(tensor.norm().item() for tensor in t)) for t in (weights, [w.grad for w in weights]))
    assert first["all"] == pytest.approx(0.1 * norm * slope, rel=1e-4)


def test_slices_are_scored_as_rows_of_a_weight():
    """A fused layer and the same weights as separate modules have the same scores."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(12, 18), nn.Linear(6, 5)

        def forward(self, pixels):
            q, k, v = self.qkv(pixels.flatten(1)).chunk(3, 1)
            return self.head(torch.sigmoid(q) * k + v)

    class Split(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.q, self.k, self.v, self.head = (nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 6), fused.head)
            for part, module in enumerate((self.q, self.k, self.v)):
                module.weight.data = fused.qkv.weight.data[6 * part : 6 * part + 6].clone()
                module.bias.data = fused.qkv.bias.data[6 * part : 6 * part + 6].clone()

        def forward(self, pixels):
            x = pixels.flatten(1)
            return self.head(torch.sigmoid(self.q(x)) * self.k(x) + self.v(x))

    fused = Fused()
    images, labels = torch.rand(16, 3, 2, 2), torch.randint(0, 5, (16,))
    slices = {f"qkv:{part}": ("qkv", slice(6 * i, 6 * i + 6)) for i, part in enumerate("qkv")}
    before = fused.qkv.weight.detach().clone()
    ours = module_robustness_sensitivity(fused, [(images, labels)], ATTACK, slices=slices)
    split = module_robustness_sensitivity(Split(fused), [(images, labels)], ATTACK)
    assert list(ours) == ["qkv", "qkv:q", "qkv:k", "qkv:v", "head"]
    for part in "qkv":
        assert ours[f"qkv:{part}"] == pytest.approx(split[part], rel=1e-3)
    assert torch.equal(fused.qkv.weight, before)
    whole = module_robustness_sensitivity(
        fused, [(images, labels)], ATTACK, slices=slices, groups={"u": ["qkv:q", "qkv:k", "qkv:v"]}
    )
    assert whole["u"] == pytest.approx(ours["qkv"], rel=1e-4)
    with pytest.raises(ValueError, match="members of group 'u' overlap"):
        module_robustness_sensitivity(fused, [(images, labels)], ATTACK, slices=slices, groups={"u": ["qkv", "qkv:q"]})
    with pytest.raises(ValueError, match="slice 'x:q' is of 'x', which is not scored; scored: qkv, head"):
        module_robustness_sensitivity(fused, [(images, labels)], ATTACK, slices={"x:q": ("x", slice(0, 2))})


def test_slices_that_hold_nothing_or_take_the_place_of_a_module_are_refused(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 5))
    sets = [(torch.rand(8, 3, 2, 2), torch.arange(8) % 5)]
    for slices, message in (
        ({"3": ("1", slice(0, 2))}, "slice '3' has the name of a module, whose score it would take"),
        ({"a": ("1", slice(6, 9))}, r"slice 'a' is slice\(6, 9, None\) of the 6 rows of '1'"),
        ({"a": ("1", [0, 2])}, r"slice 'a' is \[0, 2\] of the 6 rows of '1'; a slice"),
    ):
        with pytest.raises(ValueError, match=message):
            module_robustness_sensitivity(net, sets, ATTACK, slices=slices)
    with pytest.raises(ValueError, match=r"group 'g' is '1'; a list of members is needed, such as \['1'\]"):
        module_robustness_sensitivity(net, sets, ATTACK, groups={"g": "1"})
    # What a journal keeps is of these rows, and of a network that computes this.
    found = [
        module_robustness_sensitivity(net, sets, ATTACK, slices={"a": ("1", rows)}, journal=tmp_path / "scores.jsonl")
        for rows in (slice(0, 6), slice(0, 6, 2), slice(0, 6))
    ]
    assert found[0]["a"] == found[2]["a"] != found[1]["a"]


# --- the model is left as it was ---


def state_of(net):
    return (
        {name: tensor.clone() for name, tensor in net.state_dict().items()},
        [module.training for module in net.modules()],
        [parameter.requires_grad for parameter in net.parameters()],
    )


def assert_unchanged(net, state):
    tensors, modes, flags = state
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("method", list(METHODS))
def test_everything_is_restored_bit_for_bit(net, method):
    net.norm.eval()
    net.fc1.weight.requires_grad_(False)
    state, pointers = state_of(net), [parameter.data_ptr() for parameter in net.parameters()]
    with torch.no_grad():
        module_robustness_sensitivity(net, calibration(), ATTACK, method=method)
    assert_unchanged(net, state)
    assert [parameter.data_ptr() for parameter in net.parameters()] == pointers


def test_everything_is_restored_when_a_forward_fails(net):
    calls = []

    def fail_late(*_):
        calls.append(1)
        if len(calls) == ATTACK.num_steps + 3:
            raise RuntimeError("out of memory")

    state = state_of(net)
    net.register_forward_pre_hook(fail_late)
    with pytest.raises(RuntimeError, match="out of memory"):
        module_robustness_sensitivity(net, calibration(), ATTACK)
    assert_unchanged(net, state)


def test_passes_are_counted_and_none_is_wasted(net):
    calls = []
    # Single images are those that passes are tried on.
    net.register_forward_hook(lambda _, given, __: calls.extend([torch.is_grad_enabled()] * (len(given[0]) > 1)))
    for method, steps in METHODS.items():
        calls.clear()
        settings = module_robustness_sensitivity(net, calibration(24, 2), ATTACK, method=method).settings
        assert settings["forwards"] == len(calls)
        assert settings["backwards"] == sum(calls)
        # `unused` has no gradient and takes no pass.
        assert settings["forwards"] == 2 * (ATTACK.num_steps + 1 + 4 * steps)
        assert settings["backwards"] == 2 * (ATTACK.num_steps + 1 + 4 * max(steps - 1, 0))


def test_only_the_perturbed_weight_takes_a_gradient(net):
    """Else every pass would keep the activations of the whole network for its backward."""
    taking = []

    def look(_, given):
        if len(given[0]) > 1:  # single images are those that passes are tried on
            taking.append([name for name, parameter in net.named_parameters() if parameter.requires_grad])

    net.register_forward_pre_hook(look)
    module_robustness_sensitivity(net, calibration(), AttackConfig(eps=0))
    # The first of each comes to where the weight is read, and no further.
    each = [[[], [f"{name}.weight"], [f"{name}.weight"], []] for name in SCORED if name != "unused"]
    assert taking == [[f"{name}.weight" for name in SCORED], *(names for module in each for names in module)]


def test_settings_are_complete_and_json(net):
    result = module_robustness_sensitivity(net, calibration(24, 2), ATTACK, gamma=0.05, seed=4, num_steps=2)
    settings = json.loads(json.dumps(result.settings))
    assert settings["attack"] == {
        "norm": "linf",
        "eps": 0.05,
        "step_size": ATTACK.step,
        "num_steps": 3,
        "random_start": True,
        "dtype": "float32",
    }
    expected = {"method": "ascent", "gamma": 0.05, "num_steps": 2, "seed": 4, "images_per_set": [24, 24]}
    assert {name: settings[name] for name in expected} == expected
    assert settings["batch_size"] == 128 and settings["dtype"] == "float32"
    images, labels = calibration(24, 1)[0]
    result = module_robustness_sensitivity(net, [(images, labels)], ATTACK, seed=4)
    net.eval()
    loss = F.cross_entropy(net(fixed_adversarial_images(net, images, labels, seed=4)).logits, labels)
    assert result.settings["robust_losses"] == pytest.approx([loss.item()], rel=1e-5)


def test_progress_bar_only_on_request(net, capsys):
    module_robustness_sensitivity(net, calibration(), ATTACK, method="first_order")
    assert "sensitivity" not in capsys.readouterr().err
    module_robustness_sensitivity(net, calibration(), ATTACK, method="first_order", progress=True)
    assert "5/5" in capsys.readouterr().err


# --- refusals ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "hessian"}, "method is 'hessian'; known methods: ascent, exact, first_order"),
        ({"gamma": 10}, r"gamma is 10; it must be a fraction of the weights' norm in \[0, 1\]"),
        ({"gamma": -0.1}, "gamma is -0.1"),
        ({"gamma": True}, "gamma is True"),
        ({"gamma": math.nan}, "gamma is nan"),
        ({"num_steps": 0}, "num_steps is 0; it must be an integer of at least 1"),
        ({"num_steps": 1.0}, "num_steps is 1.0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"method": "first_order", "num_steps": 3}, "num_steps is 3, but 'first_order' takes no steps"),
        ({"groups": {"u": ["conv1", "cnv2"]}}, "group 'u' has the unknown member 'cnv2'; known members: conv1, depth"),
        ({"groups": {}}, "groups is empty; give at least one group of modules, or None"),
        ({"groups": {"u": []}}, "group 'u' has no members; known members: conv1"),
        ({"groups": {"u": ["conv1", "conv1"]}}, "members of group 'u' overlap"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        module_robustness_sensitivity(net, calibration(), ATTACK, **arguments)


def test_bad_calibration_sets(net):
    images, labels = calibration()[0]
    for batches, message in [
        ([], "batches is empty"),
        ((images, labels), "batches holds a Tensor; each entry must be a pair"),
        ([(images, labels, labels)], "each entry must be a pair"),
        ([(images * 255, labels)], r"must stay in \[0, 1\]"),
        ([(images, labels[:3])], r"of shape \[3\] for images of shape \[24, 3, 8, 8\]"),
        ([(images, labels.float())], "labels are torch.float32"),
        ([(images, labels.tolist())], "labels are list"),
        ([(images, labels - 100)], "class index of at least 0"),
        ([(images[:0], labels[:0])], "at least one image is needed"),
    ]:
        with pytest.raises(ValueError, match=message):
            module_robustness_sensitivity(net, batches, ATTACK)


def test_weights_that_are_not_finite_are_named(net):
    check_finite_weights(net)
    net.norm.running_var[2] = math.nan
    with pytest.raises(ValueError, match=r"buffer 'norm.running_var' holds NaN"):
        module_robustness_sensitivity(net, calibration(), ATTACK)
    net.norm.running_var[2] = math.inf
    check_finite_weights(net)
    for value in (math.nan, math.inf):
        net.fc1.weight.data[3, 4] = value
        with pytest.raises(ValueError, match=r"parameter 'fc1.weight' holds NaN or infinity"):
            module_robustness_sensitivity(net, calibration(), ATTACK)


def test_a_loss_that_is_not_finite_is_refused(net):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pixels):
            return self.net(pixels).logits * math.inf

    state = state_of(net)
    with pytest.raises(ValueError, match="the robust loss is not finite"):
        module_robustness_sensitivity(Broken(), calibration(), AttackConfig(eps=0))
    assert_unchanged(net, state)


def test_models_that_cannot_be_scored():
    bare = nn.Sequential(nn.Flatten(), nn.LayerNorm(192))
    with pytest.raises(
        ValueError, match="Sequential has no module to score; a Conv1d, Conv2d, Conv3d, Linear, ConvTranspose1d,"
    ):
        module_robustness_sensitivity(bare, calibration(), ATTACK)
    computed = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    weight_norm(computed[1])
    with pytest.raises(ValueError, match=r"the weight of module '1' is computed \(parametrized\)"):
        module_robustness_sensitivity(computed, calibration(), ATTACK)


# --- units ---

UNITS = [SimpleNamespace(name="stream", members=("a", "b")), SimpleNamespace(name="c", members=("c",))]
SCORES = {"a": 1.0, "b": 3.0, "c": 0.5}


@pytest.mark.parametrize("combine, expected", [("sum", 4.0), ("max", 3.0), ("mean", 2.0)])
def test_unit_scores(combine, expected):
    for scores in (SCORES, SensitivityResult(SCORES, (SCORES,), None, {})):
        combined = unit_sensitivity(scores, UNITS, combine)
        assert combined == {"stream": expected, "c": 0.5}
        assert list(combined) == ["stream", "c"]


def test_unit_scores_pass_through_and_refusals():
    assert unit_sensitivity({"stream": 7.0, "c": 2.0, "other": 1.0}, UNITS, "joint") == {"stream": 7.0, "c": 2.0}
    # A unit may be called after one of its members: scores by module name are still combined.
    named = [SimpleNamespace(name="a", members=("a", "b"))]
    assert unit_sensitivity(SCORES, named) == {"a": 4.0}
    assert unit_sensitivity({"a": 9.0}, named) == {"a": 9.0}
    with pytest.raises(ValueError, match="member 'c' of unit 'a' has no score"):
        unit_sensitivity({"a": 1.0, "b": 3.0}, [SimpleNamespace(name="a", members=("a", "b", "c"))])
    with pytest.raises(ValueError, match=r"combine is 'median'; known combiners: sum, max, mean.*groups="):
        unit_sensitivity(SCORES, UNITS, "median")
    with pytest.raises(ValueError, match=r"member 'b' of unit 'stream' has no score \(1 such"):
        unit_sensitivity({"a": 1.0, "c": 2.0}, UNITS)


def test_images_come_in_the_precision_of_the_weights_and_half_precision_is_measured_in_single(net):
    batches = calibration()
    found = module_robustness_sensitivity(net, batches, ATTACK)
    doubles = [(images.double(), labels) for images, labels in batches]
    assert dict(module_robustness_sensitivity(net, doubles, ATTACK)) == dict(found)
    half = net.bfloat16()
    scores = module_robustness_sensitivity(half, batches, ATTACK)
    assert next(half.parameters()).dtype == torch.bfloat16
    assert dict(scores) == dict(module_robustness_sensitivity(net.float(), batches, ATTACK))


class Squeezes(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, pixels):
        return self.fc(F.adaptive_avg_pool2d(self.convolution(pixels).relu(), 1).squeeze())


def test_a_network_that_squeezes_and_a_set_without_images():
    found = module_robustness_sensitivity(Squeezes(), calibration(), ATTACK)
    assert set(found) == {"convolution", "fc"} and min(found.values()) > 0
    (images, labels), *_ = calibration()
    parts = list(attacked_batches(Squeezes(), [(images, labels), (images[:0], labels[:0])], ATTACK))
    assert [len(part.labels) for part in parts] == [24]


@pytest.mark.parametrize("eps", [0, 0.1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images, labels.tolist()), "labels are list for images of shape"),
        (lambda images, labels: (images, labels - 9), "a label is -9; each must be a class index of at least 0"),
        (lambda images, labels: (images.round().byte(), labels), "images are torch.uint8"),
        (lambda images, labels: images, "batches holds a Tensor; each entry must be a pair"),
    ],
)
def test_a_bad_set_is_named_when_its_turn_comes(eps, change, message):
    (images, labels), *_ = calibration()
    parts = attacked_batches(Squeezes(), iter([(images, labels), change(images, labels)]), AttackConfig(eps=eps))
    assert len(next(parts).labels) == 24
    with pytest.raises(ValueError, match=message):
        next(parts)


def test_transposed_convolutions_are_scored():
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert module_robustness_sensitivity(net, calibration(), ATTACK)["0"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": None}, "batches is empty"),
        ({"attack": 0.1}, "attack is 0.1"),
        (
            {"batches": [(torch.rand(2, 3, 8, 8), torch.tensor([0, 6]))]},
            "a label is 6; the model knows the classes 0 to 4",
        ),
    ],
)
def test_what_cannot_be_scored_is_named(net, change, message):
    with pytest.raises(ValueError, match=message):
        module_robustness_sensitivity(net, **({"batches": calibration(), "attack": ATTACK} | change))

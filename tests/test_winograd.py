"""Convolutions of small maps with fewer multiplications: the same function, and undone afterwards."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mrpf import AttackConfig, module_robustness_sensitivity, pgd_attack
from hf_mrpf.attacks import under_attack
from hf_mrpf.folding import folded_batchnorm, folded_except
from hf_mrpf.modes import frozen
from hf_mrpf.winograd import MANY_MAPS, _filtering, minimal_filtering, suits

torch.set_num_threads(1)
IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 5
FEW_STEPS = AttackConfig(num_steps=3)


def network() -> nn.Sequential:
    """A convolution with BatchNorm and one without, both of 192 channels on maps of 8 and of 4 pixels."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 192, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(192, 200, 3, padding=1, bias=False),
        nn.BatchNorm2d(200),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(200, 192, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(192, 5),
    )
    net[3].running_mean.normal_(0, 0.1)
    net[3].running_var.uniform_(0.5, 2)
    return net.eval()


def filtered(net: nn.Module) -> list[int]:
    return [number for number, module in enumerate(net) if isinstance(module, nn.Conv2d) and "forward" in vars(module)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [3, MANY_MAPS])
@pytest.mark.parametrize("size", [(2, 2), (3, 4), (4, 4), (6, 5), (5, 7), (7, 7), (8, 8), (8, 2)])
def test_outputs_and_gradients_are_those_of_a_direct_convolution(size, count, dtype):
    draw = torch.Generator().manual_seed(1)
    maps, weight = torch.randn(count, 6, *size, generator=draw), torch.randn(5, 6, 3, 3, generator=draw)
    bias, above = torch.randn(5, generator=draw), torch.randn(count, 5, *size, generator=draw)
    results = []
    for convolve in (
        lambda maps, kind: F.conv2d(maps, weight.to(kind), bias.to(kind), padding=1),
        lambda maps, kind: minimal_filtering(weight.to(kind), bias.to(kind), torch.Size(size), count)(maps),
    ):
        kind = dtype if results else torch.float64
        given = maps.to(kind).requires_grad_()
        output = convolve(given, kind)
        results.append((output.detach(), *torch.autograd.grad((output * above.to(kind)).sum(), given)))
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6 if max(size) <= 6 and count == 3 else 1e-5
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape and found.dtype == dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("changed", "size"),
    [
        ({}, (9, 8)),
        ({}, (1, 4)),
        ({"in_channels": 191}, (4, 4)),
        ({"out_channels": 191}, (4, 4)),
        ({"kernel_size": 1, "padding": 0}, (4, 4)),
        ({"stride": 2}, (4, 4)),
        ({"dilation": 2, "padding": 2}, (4, 4)),
        ({"padding": 0}, (4, 4)),
        ({"padding": "same"}, (4, 4)),
        ({"padding_mode": "circular"}, (4, 4)),
        ({"groups": 2}, (4, 4)),
    ],
)
def test_other_convolutions_and_maps_are_left_as_they_are(changed, size):
    usual = {"in_channels": 192, "out_channels": 192, "kernel_size": 3, "padding": 1}
    assert suits(nn.Conv2d(**usual), torch.Size((4, 4)))
    assert not suits(nn.Conv2d(**usual | changed), torch.Size(size))


def test_small_maps_are_filtered_during_an_attack_and_the_images_found_are_the_same():
    net, images = network().double(), IMAGES.double()
    expected = images.clone()
    for _ in range(3):
        expected.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(expected), LABELS, reduction="sum"), expected)
        moved = expected.detach() + FEW_STEPS.step * gradient.sign()
        expected = torch.min(torch.max(moved, images - FEW_STEPS.eps), images + FEW_STEPS.eps).clamp(0, 1)
    assert (pgd_attack(net, images, LABELS, FEW_STEPS, start=images) - expected).abs().max() <= 1e-12
    with under_attack(net, images):
        assert filtered(net) == [2, 6]  # the one before has three channels
    assert not filtered(net)
    with under_attack(net, images[:7]):
        assert not filtered(net)  # too few for it to pay
    with pytest.raises(KeyboardInterrupt), under_attack(net, images):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in net)


def test_maps_of_another_size_or_dtype_and_an_autocast_are_convolved_directly():
    net = network()
    with torch.no_grad(), frozen(net):
        others = torch.rand(2, 3, 6, 12), IMAGES, IMAGES[:0]
        expected = [net(other) for other in others]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(IMAGES)
        with folded_batchnorm(net, IMAGES):
            assert filtered(net) == [2, 6]
            for other, logits in zip(others, expected, strict=True):
                assert torch.allclose(net(other), logits, rtol=1e-4, atol=1e-6)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.allclose(net(IMAGES), half, rtol=0.02, atol=0.002)
                maps = torch.rand(8, 200, 4, 4)
                assert torch.equal(net[6](maps), F.conv2d(maps, net[6].weight, net[6].bias, padding=1))
            with pytest.raises(RuntimeError, match="bias type"):
                net[2:](torch.rand(8, 192, 8, 8).double())
        with torch.autocast("cpu", dtype=torch.bfloat16), folded_batchnorm(net, IMAGES):
            assert not filtered(net)
        # Another size of images: what is small is seen anew.
        with folded_batchnorm(net, torch.rand(8, 3, 16, 16)):
            assert filtered(net) == [6]


def test_a_pass_that_turns_autocast_on_by_itself_is_left_alone():
    class InHalf(nn.Sequential):
        def forward(self, images):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(images)

    net = InHalf(*network())
    with frozen(net), folded_batchnorm(net, IMAGES):
        assert not filtered(net)


def test_hooked_and_half_precise_convolutions_are_left_alone():
    net = network()
    net[2].register_forward_hook(lambda *_: None)
    with frozen(net), folded_batchnorm(net, IMAGES):
        assert filtered(net) == [6]
    net = network().bfloat16()
    with frozen(net), folded_batchnorm(net, IMAGES.bfloat16()):
        assert not filtered(net)


def test_sensitivities_are_those_of_passes_without_it(monkeypatch):
    net, images = network().double(), IMAGES.double()
    scores, seen = [], []
    for least in (192, 10_000):
        monkeypatch.setattr("hf_mrpf.winograd.LEAST_CHANNELS", least)
        net = network().double()
        spared = net[6].weight
        with frozen(net), folded_except(net, images, [spared], coarsely=False, made={}):
            seen.append(filtered(net))
        scores.append(module_robustness_sensitivity(net, [(images, LABELS)], FEW_STEPS, method="exact"))
    assert seen == [[2], []]
    assert all(score > 0 for score in scores[0].values())
    for name, score in scores[0].items():
        assert score == pytest.approx(scores[1][name], rel=1e-8)


def test_passes_in_half_precision_are_left_alone():
    net = network()
    with frozen(net), folded_except(net, IMAGES, [], coarsely=True, made={}):
        assert not filtered(net)


def test_matrices_that_were_first_needed_in_inference_mode_serve_gradients_too():
    weight, size = torch.rand(3, 2, 3, 3), torch.Size((3, 7))
    with torch.inference_mode():
        minimal_filtering(weight, None, size, 1)
    maps = torch.rand(1, 2, 3, 7, requires_grad=True)
    minimal_filtering(weight, None, size, 1)(maps).sum().backward()
    assert maps.grad.abs().sum() > 0


class PreActivated(nn.Module):
    """Adds in place to what a convolution without bias returns."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(a, 192, 3, padding=1, bias=False) for a in (3, 192))
        self.head = nn.Linear(192, 5)

    def forward(self, images):
        start = self.first(images)
        out = self.second(start.relu())
        out += start
        return self.head(out.relu_().mean((2, 3)))


def test_what_a_convolution_returns_may_be_changed_in_place():
    torch.manual_seed(0)
    net = PreActivated().eval()
    found = pgd_attack(net, IMAGES, LABELS, FEW_STEPS, start=IMAGES)
    scores = module_robustness_sensitivity(net, [(IMAGES, LABELS)], FEW_STEPS)
    assert found.shape == IMAGES.shape and all(score > 0 for score in scores.values())


def test_weights_that_others_put_into_a_place_are_the_ones_that_count():
    class Shadowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, images):
            weights = {name: 1.5 * value for name, value in self.net.named_parameters()}
            return torch.func.functional_call(self.net, weights, (images,))

    net = Shadowed().eval()
    with torch.no_grad(), frozen(net):
        expected = net(IMAGES)
        with folded_batchnorm(net, IMAGES):
            assert torch.allclose(net(IMAGES), expected, rtol=1e-4, atol=1e-5)
    plain = network()
    other = {"6.weight": torch.randn(192, 200, 3, 3) / 40}
    with torch.no_grad(), frozen(plain):
        expected = torch.func.functional_call(plain, other, (IMAGES,))
        with folded_batchnorm(plain, IMAGES):
            assert filtered(plain) == [2, 6]
            assert torch.allclose(torch.func.functional_call(plain, other, (IMAGES,)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"stride": (2, 2)}, {"padding": (0, 0)}, {"dilation": (2, 2), "padding": (2, 2)}])
def test_a_convolution_that_was_changed_since_is_left_as_it_is(change):
    net = network()
    with frozen(net), folded_batchnorm(net, IMAGES):
        assert filtered(net) == [2, 6]
    for name, value in change.items():
        setattr(net[2], name, value)
    with torch.no_grad(), frozen(net):
        expected = net(IMAGES)
        with folded_batchnorm(net, IMAGES):
            assert 2 not in filtered(net)
            assert torch.allclose(net(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_transforms_of_functions_and_channels_last_go_through():
    net = network()
    with torch.no_grad(), frozen(net):
        expected = net(IMAGES)
        with folded_batchnorm(net, IMAGES):
            mapped = torch.vmap(lambda group: net(group))(IMAGES[None])[0]
            assert torch.allclose(mapped, expected, rtol=1e-4, atol=1e-6)
            maps = torch.rand(8, 192, 8, 8).contiguous(memory_format=torch.channels_last)
            assert net[2](maps).is_contiguous(memory_format=torch.channels_last)


def test_a_default_device_is_no_matter_of_the_matrices():
    _filtering.cache_clear()
    weight = torch.rand(3, 2, 3, 3)
    with torch.device("meta"):
        convolve = minimal_filtering(weight, None, torch.Size((3, 7)), 1)
    assert convolve(torch.rand(1, 2, 3, 7)).device.type == "cpu"
    _filtering.cache_clear()


@pytest.mark.parametrize(("dtype", "kernels"), [("float32", 2), ("bfloat16", 0)])
def test_kernels_are_made_once_for_all_targets_and_not_for_half_precision(dtype, kernels, monkeypatch):
    made = []

    def counted(*given):
        made.append(given)
        return minimal_filtering(*given)

    net = network()
    with under_attack(net, IMAGES):
        assert filtered(net) == [2, 6]
    monkeypatch.setattr("hf_mrpf.folding.minimal_filtering", counted)
    module_robustness_sensitivity(net, [(IMAGES, LABELS)], AttackConfig(eps=0, dtype=dtype), num_steps=1)
    assert len(made) == kernels and all(count == 8 for *_, count in made)

"""BatchNorm folded during attacks: the same function, found for any network, undone afterwards."""

import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from hf_mrpf import AttackConfig, PrunedForImageClassification, evaluate_robustness, pgd_attack
from hf_mrpf.attacks import logits_of
from hf_mrpf.folding import CONVOLUTIONS, fast_layout, folded_batchnorm
from hf_mrpf.modes import frozen

torch.set_num_threads(1)
IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def randomised(net: nn.Module) -> nn.Module:
    """Statistics, scales and shifts that are not the defaults, which hide faults."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.1, generator=generator)
    return net.eval()


def block(**settings) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=settings.get("bias", False)),
        nn.BatchNorm2d(8, affine=settings.get("affine", True)),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=settings.get("groups", 1)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def learnt(net: nn.Module) -> int:
    """How many norms do nothing any more once a first pass has been made."""
    images = IMAGES.to(next(net.parameters()).dtype)
    with torch.no_grad(), frozen(net), folded_batchnorm(net, images):
        return sum("forward" in vars(module) for module in net.modules() if isinstance(module, NORMS))


NETWORKS = {
    "plain": lambda: block(),
    "bias, groups, no affine": lambda: block(bias=True, affine=False, groups=4),
    "timm resnet": lambda: PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=5, image_size=32, small_images=True
    ),
    "timm mobilenetv3": lambda: timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5),
    "timm regnet": lambda: timm.create_model("regnety_002", num_classes=5),
    "mobilevit": lambda: PrunedForImageClassification.from_backbone(
        "timm/mobilevit_xxs", num_labels=5, image_size=32, small_images=True
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_of_a_network_is_folded_and_logits_move_by_rounding_alone(name):
    net = randomised(NETWORKS[name]()).double()
    images = IMAGES.double()
    with torch.no_grad(), frozen(net):
        expected = logits_of(net(images))
        with folded_batchnorm(net, images):
            folded = logits_of(net(images))
        assert torch.equal(logits_of(net(images)), expected)
    # Channels last, convolutions sum in another order.
    assert (folded - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert learnt(net) == sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


class ByName(nn.Module):
    """`block()` with every layer called by the name of its argument, which timm's norm has another one for."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers
        self.layers[4] = BatchNormAct2d(8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(**{"x" if isinstance(layer, BatchNormAct2d) else "input": x})
        return x


def test_layers_that_are_called_by_the_name_of_their_argument_are_folded_too():
    net = randomised(ByName(block())).double()
    images = IMAGES.double()
    with torch.no_grad(), frozen(net):
        expected = net(images)
        with folded_batchnorm(net, images):
            assert (net(images) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert learnt(net) == 2
    assert pgd_attack(net, images, torch.arange(6) % 5, AttackConfig(num_steps=1)).shape == images.shape


def test_an_attack_finds_the_same_images_with_and_without():
    net = randomised(NETWORKS["timm resnet"]()).double()
    labels, attack, images = torch.arange(6) % 5, AttackConfig(num_steps=5), IMAGES.double()
    adversarial = images.clone()
    for _ in range(5):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(net(adversarial).logits, labels, reduction="sum"), adversarial
        )
        moved = adversarial.detach() + attack.step * gradient.sign()
        adversarial = torch.min(torch.max(moved, images - attack.eps), images + attack.eps).clamp(0, 1)
    results = []
    for _ in range(2):  # the first attack learns which modules belong together, the second knows
        found = pgd_attack(net, images, labels, attack, start=images)
        assert (found - adversarial).abs().max() <= 1e-12
        assert found.is_contiguous()
        results.append(found)
    assert torch.equal(*results)  # else a run that goes on in another process would end with other weights


class Reads(nn.Module):
    """A network in which something else than the norm may read what the first convolution writes."""

    def __init__(self, other):
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.other = other

    def forward(self, images):
        written = self.convolution(images)
        extra = self.other(self, images, written)
        normed = self.norm(written)
        return self.head((normed.relu() + extra).mean((2, 3)))


def in_place(net, images, written):
    written.add_(0.5)
    return 0


OTHERS = {
    "nothing else": (1, lambda net, images, written: 0),
    "a shape": (1, lambda net, images, written: written.shape[0] * 0),
    "a residual": (0, lambda net, images, written: written),
    "a gate outside the graph": (0, lambda net, images, written: written.detach().mean()),
    "a decision": (0, lambda net, images, written: float((written > 0).sum() > 10)),
    "a change in place": (0, in_place),
    "the convolution twice": (0, lambda net, images, written: net.convolution(images)),
    "its weight": (0, lambda net, images, written: F.conv2d(images, net.convolution.weight).sigmoid()),
    "its bias": (0, lambda net, images, written: net.convolution.bias.sum()),
    "the norm twice": (0, lambda net, images, written: net.norm(images[:, :1, 2:, 2:].expand(-1, 8, -1, -1))),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_norm_is_folded_only_where_it_alone_reads_the_convolution(other):
    count, read = OTHERS[other]
    net = randomised(Reads(read))
    assert learnt(net) == count
    with torch.no_grad(), frozen(net):
        expected = net(IMAGES)
        with folded_batchnorm(net, IMAGES):
            assert torch.allclose(net(IMAGES), expected, rtol=1e-4, atol=1e-6)


def test_what_others_watch_or_compute_is_left_alone():
    class Mine(nn.Conv2d):
        def forward(self, images):
            return super().forward(images) * 2

    net = randomised(block())
    net[0] = Mine(3, 8, 3)
    assert learnt(net) == 1
    net = randomised(block())
    seen = []
    net[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert learnt(net) == 1
    assert not torch.equal(seen[0], seen[0].clamp_min(0)) and len(seen) == 1
    net = randomised(block())
    torch.nn.utils.parametrizations.weight_norm(net[3])
    assert learnt(net) == 1
    net = randomised(block()).to(torch.bfloat16)
    with torch.no_grad(), folded_batchnorm(net, IMAGES.bfloat16()):
        assert not any("forward" in vars(module) for module in net)
    compiled = torch.compile(randomised(block()), backend="eager")
    with folded_batchnorm(compiled, IMAGES):
        assert not any("forward" in vars(module) for module in compiled._orig_mod.modules())


def test_a_module_that_was_exchanged_or_watched_since_is_looked_at_again():
    net = randomised(block())
    assert learnt(net) == 2
    net[4] = nn.BatchNorm2d(8, track_running_stats=False).eval()
    assert learnt(net) == 1
    net[1].register_forward_hook(lambda *_: None)
    assert learnt(net) == 0


def test_a_flag_that_was_set_since_is_noticed():
    net = randomised(Reads(lambda net, images, written: written if net.skip else 0))
    net.skip = False
    assert learnt(net) == 1
    net.skip = True
    assert learnt(net) == 0


def test_a_flag_that_every_pass_changes_does_not_have_each_attack_look_again():
    def toggles(net, images, written):
        net.odd, net.passes = not net.odd, net.passes + 1
        return 0

    net = randomised(Reads(toggles))
    net.odd, net.passes = False, 0
    for _ in range(4):
        assert learnt(net) == 1
    assert net.passes == 1


def test_a_norm_that_stays_in_training_is_not_folded():
    net = randomised(block())
    net[1].train = lambda mode=True: net[1]
    net[1].training = True
    assert learnt(net) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_and_forwards_are_put_back(fails):
    net = randomised(block())
    before, values = dict(net.named_parameters()), copy.deepcopy(net.state_dict())
    learnt(net)
    try:
        with folded_batchnorm(net, IMAGES):
            assert net[0].weight is not before["0.weight"] and net[0].bias is not None
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert list(dict(net.named_parameters())) == list(before)
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert list(net.state_dict()) == list(values)
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    assert not any("forward" in vars(module) for module in net) and net[0].bias is None


@pytest.mark.parametrize(
    ("first", "folded", "level"), [((), "2 of 2", "DEBUG"), ((nn.BatchNorm2d(3),), "2 of 3", "INFO")]
)
def test_no_pass_is_made_to_learn_and_the_log_says_what_is_folded(first, folded, level, caplog):
    passes = []
    net = randomised(nn.Sequential(*first, *block()))
    net.register_forward_hook(lambda *_: passes.append(1))
    with caplog.at_level(logging.DEBUG, "hf_mrpf"):
        for _ in range(2):
            pgd_attack(net, IMAGES, torch.zeros(6, dtype=torch.long), AttackConfig(num_steps=3))
    assert len(passes) == 6
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (level, f"{folded} BatchNorm layers are folded into convolutions during attacks.")
    ]


def test_the_log_does_not_count_what_somebody_looks_at(caplog):
    net = randomised(block())
    net[1].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "hf_mrpf"):
        assert learnt(net) == 1
    assert caplog.messages == ["1 of 2 BatchNorm layers are folded into convolutions during attacks."]


def test_bfloat16_reaches_convolutions_and_pixels_stay_float32():
    kinds = []

    net = randomised(block())
    net.register_forward_pre_hook(lambda module, inputs: kinds.append((inputs[0].dtype, module[3].weight.dtype)))
    labels = torch.zeros(6, dtype=torch.long)
    attack = AttackConfig(num_steps=2, dtype="bfloat16")
    found = pgd_attack(net, IMAGES, labels, attack, start=IMAGES)
    assert kinds == [(torch.float32, torch.bfloat16)] * 2
    assert found.dtype == torch.float32 and (found - IMAGES).abs().max() <= attack.eps + 1e-6
    plain = pgd_attack(net, IMAGES, labels, AttackConfig(num_steps=2), start=IMAGES)
    assert ((found - plain).abs() > 1e-6).float().mean() <= 0.2
    assert net[0].weight.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype is 'float16'; an attack computes in one of float32, bfloat16"):
        AttackConfig(dtype="float16")
    assert "bfloat16" in attack.describe()


def test_convolutions_are_known_by_classes_that_exist():
    for module, name in CONVOLUTIONS:
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_a_network_that_cannot_take_channels_last_gets_images_as_they_are():
    class Flat(nn.Module):
        """Flattens by `view` what a convolution returns, as many a tutorial does."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 3)

        def forward(self, images):
            found = self.norm(self.conv(images))
            return self.head(found.view(len(images), -1))

    torch.manual_seed(0)
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    flat = Flat().eval()
    report = evaluate_robustness(flat, (images, labels), ["clean", "pgd20", "square", "apgd_ce"], AttackConfig(eps=0.1))
    same = nn.Sequential(flat.conv, flat.norm, nn.Flatten(), flat.head)
    assert report.verdicts == evaluate_robustness(same, (images, labels), list(report), AttackConfig(eps=0.1)).verdicts
    assert (fast_layout(flat, images), fast_layout(same, images)) == (torch.contiguous_format, torch.channels_last)


def test_a_hook_of_all_modules_that_changes_outputs_is_heeded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    net.eval()[1].running_mean.normal_()
    images, labels, attack = torch.rand(4, 3, 8, 8), torch.arange(4), AttackConfig(random_start=False, num_steps=1)

    def doubled(module, inputs, output):
        return 2 * output if isinstance(module, nn.Conv2d) else None

    with nn.modules.module.register_module_forward_hook(doubled):
        adversarial = pgd_attack(net, images, labels, attack)
        leaf = images.clone().requires_grad_()
        F.cross_entropy(net(leaf), labels).backward()
    step = attack.eps * leaf.grad.sign()
    torch.testing.assert_close(adversarial, (images + step).clamp(0, 1))

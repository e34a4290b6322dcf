"""Passes from some weights on: the same output and gradient as whole passes, at the cost of what comes after."""

import copy
import dataclasses
import itertools
import logging

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from hf_mrpf import PrunedForImageClassification
from hf_mrpf.attacks import logits_of
from hf_mrpf.modes import frozen
from hf_mrpf.prefix import Prefix, ReadingOrder

torch.set_num_threads(1)
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Odd(nn.Module):
    """Shared modules, a module without a call, tuples, changes in place, operations between modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.shared, self.bare, self.pair = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), Pair()
        self.late, self.head, self.never = nn.Conv2d(8, 8, 3), nn.Linear(8, 5), nn.Linear(2, 2)

    def forward(self, images):
        x = self.norm(self.stem(images)).mul(2)
        self.act(x)  # what it returns is what it was given
        x = self.shared(x) + x
        x.add_(0.1)
        left, right = self.pair(x)  # it has changed what it was given, which is read again
        x = nn.functional.linear(left.movedim(1, -1), self.bare.weight).movedim(-1, 1) + right["half"] + x
        kept = self.late(x)
        kept += self.shared(x)[..., 1:-1, 1:-1]
        return self.head(kept.sigmoid().mean((2, 3)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x.mul_(2)
        x = self.convolution(x)
        return x, {"half": x / 2, "name": "right"}


def small(name, **settings):
    torch.manual_seed(0)
    return PrunedForImageClassification.from_backbone(name, num_labels=5, image_size=32, small_images=True, **settings)


NETWORKS = {
    "odd": Odd,
    "resnet": lambda: small("timm/resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)),
    "mobilevit": lambda: small("timm/mobilevit_xxs"),
    "densenet": lambda: timm.create_model("densenet121", num_classes=5, growth_rate=4, block_config=(2, 2, 2, 2)),
    "transformers vit": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32,
                  patch_size=8, num_labels=5)
    ),
}  # fmt: skip


def weights_in_order(net):
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    with ReadingOrder(weights.values()) as order, torch.no_grad():
        net(IMAGES)
    return sorted(weights.items(), key=lambda item: order.place(item[1]))


def pass_of(run, weight):
    weight.requires_grad_()
    logits = logits_of(run())
    loss = logits.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight, allow_unused=True) if loss.requires_grad else (None,)
    weight.requires_grad_(False)
    return logits.detach(), gradient


IN_THREE_ORDERS = [
    # A large network finds nothing in the last two orders that the small ones do not.
    pytest.param(name, order, marks=pytest.mark.slow if name == "mobilevit" and order != "read" else ())
    for name in NETWORKS for order in ("read", "backwards", "shuffled")
]  # fmt: skip


@pytest.mark.parametrize(("name", "order"), IN_THREE_ORDERS)
def test_every_pass_equals_a_whole_one_bit_for_bit(name, order):
    net = NETWORKS[name]().eval()
    weights = weights_in_order(net)
    if order == "backwards":
        weights = weights[::-1]
    elif order == "shuffled":
        weights = [weights[i] for i in torch.randperm(len(weights), generator=torch.Generator().manual_seed(1))]
    prefix = Prefix(net, IMAGES)
    with frozen(net):
        for _, weight in weights[:: 1 if len(weights) < 20 else 4]:
            prefix.stop_before([weight])
            with torch.no_grad():
                weight.mul_(1.1)
            for _ in range(2):
                logits, gradient = pass_of(prefix, weight)
                expected, right = pass_of(lambda: net(IMAGES), weight)
                assert torch.equal(logits, expected)
                assert (gradient is None) is (right is None)
                assert right is None or torch.equal(gradient, right)
    assert not any("forward" in vars(module) or module._forward_hooks for module in net.modules())


def counted(net, run):
    calls = []
    hooks = [module.register_forward_pre_hook(lambda module, _: calls.append(module)) for module in net.modules()]
    # What is kept is returned without a call of what is inside.
    run()
    for hook in hooks:
        hook.remove()
    return calls


def test_what_comes_before_is_not_computed_and_takes_no_memory():
    net = small("timm/resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)).eval()
    prefix = Prefix(net, IMAGES)
    with frozen(net), torch.no_grad():
        prefix.stop_before([net.backbone.layer3[0].conv2.weight])
        calls = counted(net, prefix)
    inside = {module for stage in (net.backbone.layer1, net.backbone.layer2) for module in stage.modules()}
    assert not set(calls) & (inside - {net.backbone.layer1, net.backbone.layer2})
    assert net.backbone.layer4[0].conv1 in calls
    kept = [leaf for outputs in prefix._kept.values() for leaf, _ in outputs if any(leaf.stride())]
    # The block's input, for its shortcut, and what conv2 reads; the stem's output alone is 16 times as large.
    assert sum({leaf.data_ptr(): leaf.nbytes for leaf in kept}.values()) <= 2 * 3 * 8 * 16 * 16 * 4


class Arithmetic(nn.Module):
    """What it computes before its first module is gone when the modules return, and its ids are free again."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x):
        for _ in range(8):
            x = x * 2 + 1
        for stage in self.stages:
            x = stage(x)
        return x


def holds(prefix):
    return [module for module, outputs in prefix._kept.items() for leaf, _ in outputs if any(leaf.stride())]


def test_an_output_that_took_the_id_of_a_tensor_that_is_gone_is_not_kept():
    net = Arithmetic().eval()
    for _ in range(20):
        prefix = Prefix(net, IMAGES)
        with frozen(net), torch.no_grad():
            prefix.stop_before([net.stages[-1].weight])
        assert holds(prefix) == [net.stages[-2]]


def test_what_was_kept_for_an_earlier_weight_is_let_go():
    net = Arithmetic().eval()
    prefix = Prefix(net, IMAGES)
    with frozen(net), torch.no_grad():
        for before, stage in itertools.pairwise(net.stages):
            prefix.stop_before([stage.weight])
            assert holds(prefix) == [before]


def test_a_module_that_others_watch_runs_each_time_and_is_watched_once_a_pass():
    net = small("timm/resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)).eval()
    net.backbone.global_pool.register_forward_hook(lambda module, inputs, output: output * 2)  # fc reads it
    prefix = Prefix(net, IMAGES)
    with frozen(net), torch.no_grad():
        prefix.stop_before([net.backbone.fc.weight])
        assert torch.equal(prefix().logits, net(IMAGES).logits)


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act, self.convolution = act, nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.convolution(self.act(x))


def blocks(act, watched):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *[Block(act()) for _ in range(3)], nn.Conv2d(8, 5, 3), *pooled).eval()
    if watched:
        net[2].register_forward_hook(lambda *_: None)
    return net


SHARED = {inplace: nn.ReLU(inplace=inplace) for inplace in (False, True)}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("act", [lambda: SHARED[False], lambda: SHARED[True], lambda: nn.ReLU(inplace=True)])
def test_what_a_block_calls_is_kept_though_it_overwrites_its_input_or_is_watched(act, watched):
    net = blocks(act, watched)
    weights, prefix = [p for p in net.parameters() if p.ndim > 1], Prefix(net, IMAGES)
    with frozen(net):
        for weight in weights:
            prefix.stop_before([weight])
            for _ in range(2):
                for found, expected in zip(pass_of(prefix, weight), pass_of(lambda: net(IMAGES), weight), strict=True):
                    assert torch.equal(found, expected)
        with FlopCounterMode(display=False) as counter:
            prefix()
    if not net[1].act.inplace:
        assert counter.get_total_flops() == 2 * weights[-1].numel() * 3 * 28 * 28


@dataclasses.dataclass
class Box:
    content: torch.Tensor


class Boxes(nn.Module):
    def forward(self, x):
        return Box(x)


class Boxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.box, self.second = nn.Conv2d(3, 8, 3), Boxes(), nn.Conv2d(8, 5, 3)

    def forward(self, x):
        box = self.box(self.first(x) * 2)
        box.content.mul_(1.5)
        return self.second(box.content)


def test_what_cannot_be_copied_is_not_kept():
    net = Boxed().eval()
    prefix = Prefix(net, IMAGES)
    with frozen(net), torch.no_grad():
        prefix.stop_before([net.second.weight])
        for _ in range(3):
            assert torch.equal(prefix(), net(IMAGES))


def test_what_is_overwritten_by_operations_is_not_kept_and_the_log_says_so(caplog):
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, images):
            x = self.first(images)
            x.mul_(3)
            return self.second(x)

    net, images = Overwrites().eval(), torch.rand(2, 8)
    prefix = Prefix(net, images)
    with frozen(net), torch.no_grad(), caplog.at_level(logging.INFO, "hf_mrpf"):
        prefix.stop_before([net.second.weight])
        for _ in range(2):
            assert torch.equal(prefix(), net(images))
    assert caplog.messages == ["Passes are whole ones up to Linear: an output before it is overwritten."]


def test_compiled_networks_run_whole_and_the_log_says_so(caplog):
    net = small("timm/resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)).eval()
    compiled = torch.compile(copy.deepcopy(net), backend="eager")
    with caplog.at_level(logging.INFO, "hf_mrpf"):
        prefix = Prefix(compiled, IMAGES)
    assert caplog.messages == ["Every pass is a whole one: this OptimizedModule is compiled."]
    with torch.no_grad():
        prefix.stop_before([compiled.backbone.fc.weight])
        assert torch.allclose(prefix().logits, net(IMAGES).logits, atol=1e-5)
    assert not prefix._kept

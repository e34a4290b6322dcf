"""Test networks, and the masked original that a rightly pruned network must equal."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_mrpf.attacks import logits_of
from hf_mrpf.efficiency import count_macs, count_parameters
from hf_mrpf.plan import PruningPlan, trace_for
from hf_mrpf.pruning import plan_pruning, prune


def narrow_resnet() -> nn.Module:
    return timm.create_model(
        "resnet18", num_classes=10, layers=(1, 1, 1, 1), channels=(16, 32, 64, 64), stem_type="deep", stem_width=8
    )


def narrow_bottleneck() -> nn.Module:
    return timm.create_model("resnet50", num_classes=10, layers=(2, 1, 2, 1), channels=(16, 24, 32, 48))


def narrow_vgg() -> nn.Module:
    from timm.models.vgg import VGG

    config = [16, "M", 24, 24, "M", 32, "M"]
    return VGG(config, num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=0.02)


def mobilenet() -> nn.Module:
    return timm.create_model("mobilenetv3_small_050", num_classes=10)


def hf_resnet() -> nn.Module:
    config = ResNetConfig(embedding_size=16, hidden_sizes=[24, 32, 48], depths=[2, 1, 2], num_labels=7)
    return ResNetForImageClassification(config)


class ConcatFlatten(nn.Module):
    """Two branches joined by concatenation, then a flatten of 4x4 maps into a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(20)
        self.mix = nn.Conv2d(20, 16, 3, stride=2, padding=1)
        self.hidden = nn.Linear(16 * 16, 24)
        self.classes = nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        joined = torch.relu(self.norm(torch.cat([self.left(images), self.right(images)], dim=1)))
        return self.classes(torch.relu(self.hidden(torch.relu(self.mix(joined)).flatten(1))))


EXACT = 1e-12

# Name -> (network, image size).
NETWORKS = {
    "resnet": (narrow_resnet, 32),
    "bottleneck": (narrow_bottleneck, 32),
    "vgg": (narrow_vgg, 32),
    "mobilenet": (mobilenet, 64),
    "hf_resnet": (hf_resnet, 32),
    "concat_flatten": (ConcatFlatten, 8),
}


def randomise(model: nn.Module) -> nn.Module:
    """Random weights, biases and BatchNorm tensors in float64: defaults of 0 and 1 would hide wrong indices."""
    generator = torch.Generator().manual_seed(1)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scale = 1.4 / parameter[0].numel() ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            else:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return model


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[nn.Module]:
    """
    The dense model with every channel that the plan removes set to zero behind its layers and norms, and in parameters
    without a layer; layer and group norms take their statistics over what is kept.
    """
    graph = trace_for(plan, model)
    handles, restore = [], []
    for (name, side), zero in graph.removed_positions(plan.kept).items():
        if side == "in":
            continue
        if graph.layers[name].kind == "parameter":
            parameter = model.get_parameter(name)
            restore.append((parameter, parameter.detach().clone()))
            with torch.no_grad():
                parameter.index_fill_(graph.layers[name].axis, torch.tensor(zero), 0.0)
            continue
        module = model.get_submodule(name)

        def hook(module: nn.Module, inputs: tuple, output: Tensor, zero: list[int] = zero) -> Tensor:
            axis = -1 if isinstance(module, nn.Linear) or _last(module) else 1
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                output = _norm_of_kept(module, inputs[0], zero, axis)
            return output.index_fill(axis, torch.tensor(zero), 0.0)

        handles.append(module.register_forward_hook(hook))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for parameter, value in restore:
                parameter.copy_(value)


def _last(module: nn.Module) -> bool:
    first = "2d" in type(module).__name__ or getattr(module, "data_format", "") == "channels_first"
    return isinstance(module, nn.LayerNorm) and not first


def _norm_of_kept(module: nn.Module, features: Tensor, zero: list[int], axis: int) -> Tensor:
    """The formula of LayerNorm and of GroupNorm with one group, with moments of the kept channels alone."""
    kept = torch.tensor([index for index in range(features.shape[axis]) if index not in set(zero)])
    own = features.index_select(axis, kept)
    axes = tuple(range(1, features.ndim)) if isinstance(module, nn.GroupNorm) else (axis,)
    mean, variance = own.mean(axes, keepdim=True), own.var(axes, correction=0, keepdim=True)
    shape = [1] * features.ndim
    shape[axis] = -1
    normal = (features - mean) / (variance + module.eps).sqrt()
    return normal * module.weight.reshape(shape) + module.bias.reshape(shape)


@torch.no_grad()
def relative_error(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    expected = logits_of(reference(images))
    return ((logits_of(model(images)) - expected).abs().max() / expected.abs().max()).item()


def check_against_masked(model, images, **options):
    """Prunes `model`, compares it with its masked original, with the counted cost and with its own gradients."""
    plan = plan_pruning(model, images, importance="random", **options)
    dense, original = copy.deepcopy(model), copy.deepcopy(model)
    prune(model, plan)
    with masked(original, plan):
        assert relative_error(model, original, images) <= EXACT
    assert relative_error(model, dense, images) > 1e-3
    assert plan.after == {"macs": count_macs(model, images), "params": count_parameters(model)}
    assert plan.before == {"macs": count_macs(dense, images), "params": count_parameters(dense)}
    logits_of(model(images)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad()
    return plan


def check_family(build, size, targets, rounds=3, tolerance=0.01, **options):
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    dense = randomise(build())
    for seed, target in enumerate(targets):
        plan = check_against_masked(
            copy.deepcopy(dense), images, target=target, allocation="global", seed=seed, **options
        )
        assert plan.achieved["macs"] == pytest.approx(target, rel=tolerance)
    for seed in range(rounds):
        check_against_masked(
            dense, images, target=0.7, allocation="uniform", seed=seed, **({"min_channels": 2} | options)
        )

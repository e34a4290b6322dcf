"""Test networks, and the masked original that a rightly pruned network must equal."""

from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_mrpf.attacks import logits_of
from hf_mrpf.plan import PruningPlan
from hf_mrpf.units import trace_units


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
    """The dense model with every channel that the plan removes set to zero behind its layers and norms."""
    graph = trace_units(model, torch.zeros(plan.example_shape))
    handles = []
    for unit in plan.units:
        gone = set(range(unit.width)) - set(plan.kept[unit.name])
        for slot in graph.slots[unit.name]:
            if slot.side == "in":
                continue
            zero = [index for channel in gone for index in slot.positions[channel]]

            def hook(module: nn.Module, inputs: tuple, output: Tensor, zero: list[int] = zero) -> Tensor:
                output = output.clone()
                output[:, zero] = 0
                return output

            handles.append(model.get_submodule(slot.layer).register_forward_hook(hook))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def relative_error(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    expected = logits_of(reference(images))
    return ((logits_of(model(images)) - expected).abs().max() / expected.abs().max()).item()

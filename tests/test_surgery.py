"""Layers lose just the channels that they are told to lose, and keep the order and the flags of the others."""

import pytest
import torch
from torch import nn

from hf_mrpf.layers import Layer
from hf_mrpf.surgery import cut_layer, scale_rows


@pytest.mark.parametrize("norm", [nn.LayerNorm(768), nn.GroupNorm(1, 768), nn.BatchNorm1d(768)])
def test_wide_norms_keep_the_order_of_what_stays(norm):
    """torch-pruning 1.6.1 permutes LayerNorm from about this width."""
    with torch.no_grad():
        norm.weight.copy_(torch.arange(768.0))
        norm.bias.copy_(-torch.arange(768.0))
    norm.weight.requires_grad_(False)
    removed = sorted(torch.randperm(768, generator=torch.Generator().manual_seed(0))[:576].tolist())
    kept = [float(index) for index in range(768) if index not in removed]
    model = nn.Sequential(norm)
    cut_layer(model, "0", Layer("norm", 768, 1, 0, 1, 1), "both", removed)
    assert model[0].weight.tolist() == kept and model[0].bias.tolist() == [-index for index in kept]
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (False, True)
    sizes = {"normalized_shape": (192,), "num_channels": 192, "num_features": 192}
    assert [value for name, value in sizes.items() if name in vars(norm)] == [
        vars(norm)[name] for name in sizes if name in vars(norm)
    ]


def test_a_grouped_convolution_loses_whole_groups_or_the_same_channels_of_each():
    images = torch.rand(1, 12, 5, 5)
    whole = nn.Conv2d(12, 24, 3, groups=6)
    weight = whole.weight.detach().clone()
    layer = Layer("grouped", 24, 2, 0, 9, 1, groups=6)
    assert layer.loses_groups
    model = nn.Sequential(whole)
    cut_layer(model, "0", layer, "in", [2, 3, 10, 11])
    cut_layer(model, "0", layer, "out", [4, 5, 6, 7, 20, 21, 22, 23])
    assert (whole.groups, whole.in_channels, whole.out_channels) == (4, 8, 16)
    assert torch.equal(whole.weight, weight[[*range(4), *range(8, 20)]])
    assert model(images[:, :8]).shape == (1, 16, 3, 3)

    inside = nn.Conv2d(12, 6, 1, groups=2)
    weight = inside.weight.detach().clone()
    layer = Layer("grouped", 6, 6, 0, 1, 1, groups=2)
    assert not layer.loses_groups
    model = nn.Sequential(inside)
    cut_layer(model, "0", layer, "in", [1, 4, 7, 10])
    cut_layer(model, "0", layer, "out", [0, 3])
    assert torch.equal(inside.weight, weight[[1, 2, 4, 5]][:, [0, 2, 3, 5]])
    assert model(images[:, :8]).shape == (1, 4, 5, 5)


def test_a_parameter_without_a_layer_is_cut_along_its_axis():
    model = nn.Module()
    model.position = nn.Parameter(torch.arange(24.0).reshape(1, 4, 6), requires_grad=False)
    cut_layer(model, "position", Layer("parameter", 6, 1, 0, 4, 0, axis=2), "out", [0, 3])
    assert torch.equal(model.position, torch.arange(24.0).reshape(1, 4, 6)[:, :, [1, 2, 4, 5]])
    assert not model.position.requires_grad


def test_rows_are_scaled_with_their_bias():
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    scale_rows(layer, [2.0, 0.5])
    assert torch.equal(layer.weight, weight * torch.tensor([[2.0], [0.5]]))
    assert torch.equal(layer.bias, bias * torch.tensor([2.0, 0.5]))


def test_the_memory_format_of_weights_stays():
    model = nn.Sequential(nn.Conv2d(8, 6, 3)).to(memory_format=torch.channels_last)
    cut_layer(model, "0", Layer("conv", 6, 8, 0, 9, 1), "in", [0, 5])
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) and not model[0].weight.is_contiguous()

"""The check before every plan tells a right removal from a wrong one, whatever the model's weights are."""

import torch
from torch import nn

from hf_mrpf.exactness import TOLERANCE, removal_error
from hf_mrpf.layers import Layer
from hf_mrpf.surgery import cut_layer

LAYERS = {
    "0": Layer("conv", 8, 3, 0, 1, 1),
    "1": Layer("norm", 8, 1, 0, 1, 1),
    "3": Layer("conv", 5, 8, 0, 1, 1),
}
REMOVED = {("0", "out"): [1, 6], ("1", "both"): [1, 6], ("3", "in"): [1, 6]}


def network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # hides every fault from a check on these weights
    return model


def error(removed):
    def cut(model):
        for (name, side), indices in removed.items():
            cut_layer(model, name, LAYERS[name], side, indices)

    return removal_error(network(), torch.zeros(2, 3, 6, 6), LAYERS, REMOVED, cut)


def test_a_right_removal_differs_by_rounding_alone():
    assert error(REMOVED) <= 1e-14


def test_indices_that_do_not_belong_together_show():
    for place in REMOVED:
        assert error(REMOVED | {place: [1, 5]}) > 1e6 * TOLERANCE


class OnGPU(torch.Tensor):
    """Stands for a tensor on a GPU: nothing on the CPU takes it before it is brought there."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__deepcopy__:
            return args[0]
        if function is not torch.Tensor.cpu:
            raise RuntimeError("Expected all tensors to be on the same device")
        with torch._C.DisableTorchFunctionSubclass():
            return args[0].as_subclass(torch.Tensor)


class Normalised(nn.Module):
    """Holds its mean as robust networks often do, by hand: no buffer, so that `to()` leaves it where it is."""

    def __init__(self):
        super().__init__()
        self.mean = torch.tensor(0.5).as_subclass(OnGPU)

    def forward(self, images):
        return images - self.mean


def test_a_tensor_that_is_no_buffer_is_brought_to_where_the_check_computes():
    layers = {f"1.{name}": layer for name, layer in LAYERS.items()}
    removed = {(f"1.{name}", side): indices for (name, side), indices in REMOVED.items()}

    def cut(model):
        for (name, side), indices in removed.items():
            cut_layer(model, name, layers[name], side, indices)

    model = nn.Sequential(Normalised(), network())
    assert removal_error(model, torch.zeros(1, 3, 6, 6), layers, removed, cut) <= 1e-14
    assert isinstance(model[0].mean, OnGPU)


def test_the_model_and_the_random_state_are_left_as_they_were():
    model = network().train().half()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    removal_error(model, torch.zeros(1, 3, 6, 6), LAYERS, {}, lambda copied: None)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(parameter.dtype == torch.float16 and not parameter.any() for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())

"""Importances against short formulas written here, and the traps of torch-pruning's classes."""

from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from pruning_reference import NETWORKS, ConcatFlatten, narrow_resnet
from torch import nn

from hf_mrpf.importance import IMPORTANCES, get_importance
from hf_mrpf.pruning import plan_pruning, prune
from hf_mrpf.units import trace_units
from hf_mrpf.weight_scores import first_order, lamp_norms, precise, second_order, squared_norms


class Chain(nn.Module):
    """conv -> norm -> relu -> pool -> hidden -> classes"""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 7)
        self.classes = nn.Linear(7, 4)

    def forward(self, images):
        return self.classes(torch.relu(self.hidden(torch.relu(self.norm(self.conv(images))).mean((2, 3)))))


def traced(model, size=8):
    return trace_units(model, torch.rand(1, 3, size, size)).groups


def sums(weights_by_channel):
    total = sum(weights_by_channel) / len(weights_by_channel)
    return total / total.mean()


def rows(tensors, weight, norm, following):
    """Per-channel sums over the convolution's rows, the norm's weights and the next layer's columns."""
    return sums([tensors[weight].flatten(1).sum(1), tensors[norm], tensors[following].sum(0)])


def test_magnitude_is_the_mean_squared_norm_of_all_that_a_channel_touches():
    model = Chain()
    torch.nn.init.uniform_(model.norm.weight)
    squares = {name: parameter.detach() ** 2 for name, parameter in model.named_parameters()}
    scores = IMPORTANCES["magnitude"](model, traced(model), (), 0)
    torch.testing.assert_close(scores["conv"], rows(squares, "conv.weight", "norm.weight", "hidden.weight"))
    torch.testing.assert_close(
        scores["hidden"], sums([squares["hidden.weight"].sum(1), squares["classes.weight"].sum(0)])
    )


def test_taylor_reads_the_mean_gradient_over_all_batches():
    model = Chain().eval()
    images, labels = torch.rand(7, 3, 8, 8), torch.randint(4, (7,))
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(parameters.values()))
    products = {
        name: (parameter * gradient).abs().detach()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    scores = IMPORTANCES["taylor"](model, traced(model), batches, 0)
    # torch-pruning leaves the norm out here.
    expected = sums([products["conv.weight"].flatten(1).sum(1), products["hidden.weight"].sum(0)])
    torch.testing.assert_close(scores["conv"], expected)


def test_hessian_averages_squared_gradients_of_every_single_image():
    model = Chain().eval()
    images, labels = torch.rand(6, 3, 8, 8), torch.randint(4, (6,))
    parameters = dict(model.named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            squares[name] += gradient**2 / len(images)
    products = {name: (parameter**2 * squares[name]).detach() for name, parameter in parameters.items()}
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    scores = IMPORTANCES["hessian"](model, traced(model), batches, 0)
    torch.testing.assert_close(scores["conv"], rows(products, "conv.weight", "norm.weight", "hidden.weight"))


def test_lamp_divides_a_norm_by_the_sum_of_all_that_are_at_least_as_large():
    model = Chain()
    groups = traced(model)
    lamp, magnitude = (IMPORTANCES[name](model, groups, (), 0) for name in ("lamp", "magnitude"))
    for unit, squares in magnitude.items():
        expected = torch.stack([square / squares[squares >= square].sum() for square in squares])
        torch.testing.assert_close(lamp[unit], expected)


class Gated(nn.Module):
    """Two convolutions write a stream that two others and a grouped one read; gates stand on the stream."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.grouped, self.plain = nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(6, 4, 3)
        self.classes = nn.Linear(4, 3)
        self.gates = None

    def forward(self, images):
        stream = torch.relu(self.norm(self.left(images) + self.right(images)))
        if self.gates is not None:
            stream = stream * self.gates[:, :, None, None]
        return self.classes(torch.relu(self.grouped(stream) + self.plain(stream)).mean((2, 3)))


def test_fisher_is_half_the_mean_square_of_the_derivative_by_a_gate_that_all_readers_share():
    torch.manual_seed(0)
    model = Gated().eval()
    images, labels = torch.rand(5, 3, 8, 8), torch.randint(3, (5,))
    scores = IMPORTANCES["fisher"](model, traced(model), [(images[:2], labels[:2]), (images[2:], labels[2:])], 0)
    model.gates = torch.ones(5, 6, requires_grad=True)  # one an image: no image sees another in eval mode
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    (derivatives,) = torch.autograd.grad(loss, model.gates)
    both = derivatives[:, :3] + derivatives[:, 3:]  # the same channel of either group goes with the other
    torch.testing.assert_close(scores["left"], (both**2).sum(0) / (2 * 5), rtol=1e-4, atol=0)


def touched_by(graph, unit, tensors):
    """For each channel of a unit the sum over what writes it, and what reads it in its own group of a layer."""
    sums = torch.zeros(unit.width)
    for slot in graph.slots[unit.name]:
        weight, groups = tensors[f"{slot.layer}.weight"], graph.layers[slot.layer].groups
        for channel, own in enumerate(slot.positions):
            for index in own:
                if slot.side == "in":
                    group, place = divmod(index, weight.shape[1])
                    sums[channel] += weight.chunk(groups)[group][:, place].sum()
                else:
                    sums[channel] += weight[index].sum()
    return sums


def grouped_networks():
    ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    whole = (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 12, 1), *ends, nn.Linear(12, 3))
    multiplied = (nn.Conv2d(3, 12, 3), nn.Conv2d(12, 24, 3, groups=12), *ends, nn.Linear(24, 3))
    return {"tied": Gated(), "whole groups": nn.Sequential(*whole), "multiplied": nn.Sequential(*multiplied)}


@pytest.mark.parametrize("network", grouped_networks())
def test_an_input_of_a_grouped_convolution_is_read_by_the_outputs_of_its_group_alone(network):
    model = grouped_networks()[network].eval()
    graph = trace_units(model, torch.rand(1, 3, 8, 8))
    images, labels = torch.rand(3, 3, 8, 8), torch.randint(3, (3,))
    weights = dict(model.named_parameters())
    gradients = [
        torch.autograd.grad(F.cross_entropy(model(images[i, None]), labels[i, None]), list(weights.values()))
        for i in range(3)
    ]
    found = {name: torch.stack(each) for name, each in zip(weights, zip(*gradients, strict=True), strict=True)}
    terms = {
        "magnitude": {name: weight**2 for name, weight in weights.items()},
        "taylor": {name: (weight * found[name].mean(0)).abs() for name, weight in weights.items()},
        "hessian": {name: weight**2 * (found[name] ** 2).mean(0) for name, weight in weights.items()},
    }
    if network == "tied":
        terms["taylor"]["norm.weight"] = torch.zeros(6)  # as torch-pruning has it
    for importance, tensors in terms.items():
        scores = IMPORTANCES[importance](model, graph.groups, [(images, labels)], 0)
        for unit in graph.units:
            expected = touched_by(graph, unit, tensors).detach()
            torch.testing.assert_close(scores[unit.name], expected / expected.mean(), rtol=1e-4, atol=1e-6)
    magnitude, lamp = (IMPORTANCES[name](model, graph.groups, (), 0) for name in ("magnitude", "lamp"))
    assert all(torch.equal(lamp[unit].argsort(), magnitude[unit].argsort()) for unit in magnitude)


@pytest.mark.parametrize("heads", [False, True])
def test_tracing_and_pruning_leave_the_random_state(heads):
    """Of a unit with several indices a channel, a group begins with a layer of zeros that is made up."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    model = vit if heads else Gated()
    before = torch.get_rng_state()
    plan = plan_pruning(
        model, torch.rand(1, 3, 8, 8, generator=torch.Generator()), target=0.8, allocation="uniform",
        min_channels=1, heads=heads,
    )  # fmt: skip
    prune(model, plan)
    assert torch.equal(torch.get_rng_state(), before)


def test_hessian_goes_back_through_one_image_at_a_time():
    seen = []
    model = Chain()
    model.classes.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    IMPORTANCES["hessian"](model, traced(model), [(torch.rand(4, 3, 8, 8), torch.randint(4, (4,)))], 0)
    assert seen[-4:] == [1, 1, 1, 1]


def test_fisher_waits_for_the_device_once_an_image(monkeypatch):
    model, copies = Gated().eval(), []
    groups = traced(model)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor, real=torch.Tensor.cpu: [copies.append(1), real(tensor)][1])
    scores = IMPORTANCES["fisher"](model, groups, [(torch.rand(5, 3, 8, 8), torch.randint(3, (5,)))], 0)
    assert len(copies) == 5 + len(scores)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_scores_are_alike_whatever_device_is_the_default(name):
    model = Gated().eval()
    groups, batches = traced(model), [(torch.rand(3, 3, 8, 8), torch.randint(3, (3,)))]
    expected = IMPORTANCES[name](model, groups, batches, 0)
    with torch.device("meta"):
        found = IMPORTANCES[name](model, groups, batches, 0)
    assert all(torch.equal(found[unit], expected[unit]) for unit in expected)


@pytest.mark.parametrize("name", sorted(IMPORTANCES.keys() - {"random"}))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_are_alike_whatever_dtype_is_the_default(set_default_dtype, name, dtype):
    model = Gated().eval()
    groups, batches = traced(model), [(torch.rand(3, 3, 8, 8), torch.randint(3, (3,)))]
    expected = IMPORTANCES[name](model, groups, batches, 0)
    set_default_dtype(dtype)
    found = IMPORTANCES[name](model, groups, batches, 0)
    assert all(torch.equal(found[unit], expected[unit]) for unit in expected)


def test_float64_of_a_gpu_that_knows_none_is_on_the_cpu():
    values = torch.rand(3)
    on_gpu = SimpleNamespace(device=torch.device("mps"), cpu=lambda: values)  # it has no double
    assert torch.equal(precise(on_gpu), values.double()) and precise(on_gpu).device.type == "cpu"
    assert precise(values.to("meta")).device.type == "meta"


def filters_of(model):
    """Of `Gated`'s stream: channel i of either group is written by rows i and i + 3 of both convolutions."""
    return torch.stack(
        [
            torch.cat(
                [layer.weight.detach()[row].flatten() for layer in (model.left, model.right) for row in (i, i + 3)]
            )
            for i in range(3)
        ]
    )


def test_l1_is_the_norm_of_all_filters_that_write_a_channel():
    model = Gated()
    scores = IMPORTANCES["l1"](model, traced(model), (), 0)
    torch.testing.assert_close(scores["left"], filters_of(model).abs().sum(1))
    expected = sum(layer.weight.detach().abs().sum((1, 2, 3)) for layer in (model.grouped, model.plain))
    # The grouped convolution's outputs come in two groups of two, which lose the same.
    torch.testing.assert_close(scores["grouped"].sum(), expected.sum())


def test_fpgm_is_the_summed_distance_to_the_other_channels_filters():
    model = Gated()
    filters = filters_of(model)
    expected = torch.stack([sum((own - other).norm() for other in filters) for own in filters])
    torch.testing.assert_close(IMPORTANCES["fpgm"](model, traced(model), (), 0)["left"], expected)


def test_fpgm_keeps_the_signs_of_weights_and_gives_up_what_others_can_stand_for():
    """Of 1, 2, 3 and -2 the geometric median is near 1 and 2; by squares 2 and -2 would be the same filter."""
    model = Chain()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([1.0, 2, 3, -2, 4, 5])[:, None, None, None].expand_as(model.conv.weight))
    scores = IMPORTANCES["fpgm"](model, traced(model), (), 0)["conv"] / 27**0.5
    torch.testing.assert_close(scores, torch.tensor([13.0, 11, 11, 25, 13, 17]))


def test_l1_and_fpgm_of_heads_take_all_rows_of_a_head_together():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    groups = trace_units(model.eval(), torch.rand(1, 3, 8, 8), heads=True).groups
    heads = model.blocks[0].attn.qkv.weight.detach().reshape(3, 2, -1).transpose(0, 1).flatten(1)
    l1, fpgm = (IMPORTANCES[name](model, groups, (), 0)["blocks.0.attn"] for name in ("l1", "fpgm"))
    torch.testing.assert_close(l1, heads.abs().sum(1))
    torch.testing.assert_close(fpgm, (heads[0] - heads[1]).norm().repeat(2))


def test_fisher_of_queries_and_keys_is_that_of_a_gate_on_their_products():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    model.reset_classifier(3)
    model.eval()
    images, labels = torch.rand(3, 3, 8, 8), torch.randint(3, (3,))
    scores = IMPORTANCES["fisher"](model, traced(model), [(images, labels)], 0)
    gates = torch.ones(3, 3, 8, requires_grad=True)  # image, which of q, k, v, channel
    scale = torch.stack([gates[:, 0], torch.ones(3, 8), gates[:, 2]], 1).flatten(1)
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: output * scale[:, None])
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    (derivatives,) = torch.autograd.grad(loss, gates)
    expected = (derivatives**2).mean(0) / 2
    torch.testing.assert_close(scores["blocks.0.attn:qk"], expected[0], rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(scores["blocks.0.attn:v"], expected[2], rtol=1e-3, atol=1e-12)


def test_random_is_seeded_and_leaves_the_random_state(monkeypatch):
    model, seeded = Chain(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    groups, state = traced(model), torch.get_rng_state()
    first, again, other = (IMPORTANCES["random"](model, groups, (), seed) for seed in (3, 3, 4))
    assert torch.equal(first["conv"], again["conv"]) and not torch.equal(first["conv"], other["conv"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded  # training draws from the generator of its GPU


@pytest.mark.parametrize("name", IMPORTANCES)
@pytest.mark.parametrize("build", [narrow_resnet, ConcatFlatten])
def test_every_importance_gives_one_finite_score_a_channel(name, build):
    model, size = build().train(), 8 if build is ConcatFlatten else 32
    model.requires_grad_(False)
    keep = next(model.parameters())
    keep.grad = torch.ones_like(keep)
    graph = trace_units(model, torch.rand(1, 3, size, size))
    batches = [(torch.rand(3, 3, size, size), torch.tensor([0, 1, 2]))]
    scores = IMPORTANCES[name](model, graph.groups, batches, 0)
    assert {unit.name: unit.width for unit in graph.units} == {unit: len(score) for unit, score in scores.items()}
    assert all(score.isfinite().all() for score in scores.values())
    # Gradients and flags are borrowed and given back.
    assert torch.equal(keep.grad, torch.ones_like(keep))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_unit_of_zeros_has_no_preference_and_nan_is_refused():
    model = Chain()
    for parameter in (model.conv.weight, model.norm.weight, model.hidden.weight):
        torch.nn.init.zeros_(parameter)
    assert torch.equal(IMPORTANCES["magnitude"](model, traced(model), (), 0)["conv"], torch.zeros(6))
    model.classes.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="importance of unit 'hidden' is not finite"):
        IMPORTANCES["magnitude"](model, traced(model), (), 0)


@pytest.mark.parametrize("name", ["taylor", "hessian", "fisher"])
def test_gradients_need_images(name):
    model = Chain()
    with pytest.raises(ValueError, match=f"importance '{name}' needs images"):
        IMPORTANCES[name](model, traced(model), (), 0)


def test_unknown_importances_are_refused():
    with pytest.raises(ValueError, match="importance is 'l0'; known importances: magnitude, random, taylor"):
        get_importance("l0")


@pytest.mark.parametrize("network", [*NETWORKS, "test_vit", "convnext_atto"])
def test_sums_of_weights_and_gradients_are_those_of_torch_pruning_to_the_bit(network):
    """Whatever makes them faster: a plan must not hang on the order of a sum."""
    from torch_pruning.pruner import importance as theirs

    build, size = (
        NETWORKS[network] if network in NETWORKS else (lambda: timm.create_model(network, num_classes=10), 160)
    )
    model = build()
    groups = traced(model, size)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    for ours, their in (
        (squared_norms, theirs.GroupMagnitudeImportance(p=2)),
        (lamp_norms, theirs.LAMPImportance()),
        (first_order, theirs.GroupTaylorImportance()),
        (second_order, theirs.GroupHessianImportance()),
    ):
        assert all(torch.equal(ours(group), their(group)) for group in groups.values()), ours

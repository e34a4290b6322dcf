"""Units of coupled channels, what they cost, and the refusal of whatever cannot be pruned rightly."""

import copy

import pytest
import timm
import torch
from pruning_reference import (
    NETWORKS,
    ConcatFlatten,
    check_against_masked,
    narrow_bottleneck,
    narrow_resnet,
    randomise,
)
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import l1_unstructured
from torch_pruning.dependency import Group, index_mapping
from transformers.utils import ModelOutput

from hf_mrpf.architectures import known_layers, refresh
from hf_mrpf.attacks import logits_of
from hf_mrpf.coupling import couple
from hf_mrpf.efficiency import count_macs, count_parameters
from hf_mrpf.layers import shapes_only
from hf_mrpf.pruning import plan_pruning, prune
from hf_mrpf.units import UnitGraph, pruning_units, trace_units


@pytest.mark.parametrize("network", NETWORKS)
def test_the_analytic_size_is_the_measured_one(network):
    build, size = NETWORKS[network]
    model, example = build(), torch.rand(2, 3, size, size)
    measured = {"macs": count_macs(model, example), "params": count_parameters(model)}
    assert trace_units(model, example).size({}) == measured


def test_the_units_of_a_bottleneck_network():
    units = {unit.name: unit for unit in pruning_units(narrow_bottleneck(), torch.rand(1, 3, 32, 32))}
    stream = units["layer3.0.conv3"]
    assert stream.members == ("layer3.0.conv3", "layer3.0.downsample.0", "layer3.1.conv3")
    assert (stream.kind, stream.width) == ("channels", 128)
    assert units["layer1.0.conv2"].members == ("layer1.0.conv2",)
    assert next(iter(units)) == "conv1" and not any("fc" in unit.members for unit in units.values())


def test_the_cost_of_a_unit_is_what_touches_it():
    units = {unit.name: unit for unit in pruning_units(ConcatFlatten(), torch.rand(1, 3, 8, 8))}
    assert [unit.width for unit in units.values()] == [8, 12, 16, 24]
    # Own products at 8x8 positions, then the eight of twenty inputs of the next layer at 4x4.
    assert units["left"].cost == 64 * 9 * 3 * 8 + 16 * 9 * 8 * 16
    assert units["mix"].cost == 16 * 9 * 20 * 16 + 256 * 24
    assert units["hidden"].cost == 256 * 24 + 24 * 5


def test_concatenation_shifts_and_flatten_repeats_positions():
    slots = trace_units(ConcatFlatten(), torch.rand(1, 3, 8, 8)).slots
    right = {(slot.layer, slot.side): slot.positions for slot in slots["right"]}
    assert right["right", "out"][3] == (3,)
    assert right["norm", "both"][3] == right["mix", "in"][3] == (11,)
    hidden = {slot.layer: slot.positions for slot in slots["mix"]}["hidden"]
    assert hidden[2] == tuple(range(32, 48))


def test_tracing_leaves_the_model_and_the_random_state_as_they_were():
    model = narrow_resnet().train()
    model.layer2.eval()
    model.conv1[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with torch.no_grad():
        pruning_units(model, torch.zeros(1, 3, 32, 32))
    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "size", "culprit"),
    [
        ("levit_128s", 224, r"timm\.models\.levit\.Attention\) is attention"),
        ("nest_tiny", 224, r"timm\.models\.nest\.Attention\) is attention"),
        ("swinv2_tiny_window8_256", 256, r"timm\.models\.swin_transformer_v2\.WindowAttention\) is attention"),
        ("xcit_nano_12_p16_224", 224, r"timm\.models\.cait\.ClassAttn\) is attention"),
        ("ecaresnet26t", 64, r"torch\.nn\.modules\.conv\.Conv1d\) holds parameters \(weight\)"),
        pytest.param(
            "res2net50_14w_8s",
            64,
            r"'layer1\.0' \(timm\.models\.res2net\.Bottle2neck\) splits or mixes channels",
            marks=pytest.mark.slow,
        ),
        ("resnetblur18", 64, r"timm\.layers\.blur_pool\.BlurPool2d\) multiplies matrices or convolves"),
    ],
)
def test_what_cannot_be_pruned_rightly_is_refused_by_its_full_name(name, size, culprit):
    model = timm.create_model(name, num_classes=10)
    with pytest.raises(ValueError, match=culprit) as error:
        pruning_units(model, torch.rand(1, 3, size, size))
    assert "refused rather than pruned wrongly" in str(error.value) and "architectures.py" in str(error.value)


class Mixing(nn.Module):
    """Products of channels with channels, without any parameter or class name that would show it."""

    def forward(self, features):
        flat = features.flatten(2)
        return (flat @ flat.transpose(1, 2)).softmax(-1).matmul(flat).reshape(features.shape)


class Shuffle(nn.Module):
    def forward(self, features):
        n, c, h, w = features.shape
        return features.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def test_nameless_attention_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Mixing(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"module '1' \(.*Mixing\) multiplies matrices"):
        pruning_units(model, torch.rand(1, 3, 8, 8))


def around(move):
    class Moves(nn.Module):
        def forward(self, features):
            return move(features)

    head = [nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 8, 1), Moves(), *head)


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.transpose(1, 2).flip(1).transpose(1, 2).roll(2, 3),
        lambda x: x.reshape(x.shape[0] * x.shape[1] * 2, -1, 2).reshape(x.shape),
        lambda x: x.relu().tanh() * x.mean((2, 3), keepdim=True).sigmoid(),
    ],
)
def test_pixels_may_move_and_channels_may_change_each_by_itself(move):
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    check_against_masked(randomise(around(move)), images, target=0.5, allocation="uniform", min_channels=1)


@pytest.mark.parametrize(
    "move",
    [
        Shuffle(),
        lambda x: x.flip(1),
        lambda x: x.roll(1, 1),
        lambda x: torch.cat([x[:, 4:], x[:, :4]], dim=1),
        lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
        lambda x: torch.nn.functional.pixel_shuffle(torch.cat([x, x, x, x], dim=1), 2),
        lambda x: x.unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2),
        lambda x: x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2),
        lambda x: x * x.mean(1, keepdim=True),
        lambda x: x.softmax(1),
        lambda x: x.amax(1, keepdim=True) + x,
        lambda x: x - x.sum(),
        lambda x: x.transpose(1, 2),
        lambda x: x.cumsum(1),
        lambda x: x.sigmoid(),
        lambda x: torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    ],
)
def test_operations_that_move_mix_or_count_channels_are_refused(move):
    """They would give other channels in a narrower network."""
    what = "moves, mixes or shifts channels|does not run with fewer channels|splits or mixes channels around"
    with pytest.raises(ValueError, match=rf"torch\.nn\.modules\.container\.Sequential\) ({what})"):
        pruning_units(around(move), torch.rand(1, 3, 8, 8))


def test_one_layer_that_is_coupled_to_two_others_is_refused():
    class Overlapping(ConcatFlatten):
        def __init__(self):
            super().__init__()
            self.whole = nn.Conv2d(3, 20, 1)

        def forward(self, images):
            joined = torch.cat([self.left(images), self.right(images)], dim=1) + self.whole(images)
            return self.classes(self.hidden(self.mix(joined).flatten(1)))

    with pytest.raises(ValueError, match=r"Overlapping\) splits or mixes channels around 'left'"):
        pruning_units(Overlapping(), torch.rand(1, 3, 8, 8))


class Branches(nn.Module):
    """Two convolutions and a head; `middle` is what stands between them."""

    def __init__(self, middle):
        super().__init__()
        self.middle = middle
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, images):
        features = self.middle(self, self.first(images).relu())
        return self.head(self.second(features).mean((2, 3)))


def test_a_removal_is_checked_at_the_widths_of_the_plan():
    """Planning tries other, odd widths, at which this network is harmless."""
    model = Branches(lambda self, x: x.flip(1) if x.shape[1] in (6, 8, 10) else x)
    images = torch.rand(1, 3, 8, 8)
    plan = plan_pruning(model, images, allocation="uniform", importance="random", target=0.72, min_channels=1)
    assert len(plan.kept["first"]) in (6, 8, 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Branches\) moves, mixes or shifts channels"):
        prune(model, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_code_that_changed_since_the_plan_is_checked_again():
    model, images = Branches(lambda self, x: x), torch.rand(1, 3, 8, 8)
    plan = plan_pruning(model, images, allocation="uniform", importance="random", target=0.6, min_channels=1)
    model.middle = lambda self, x: x.flip(1)
    with pytest.raises(ValueError, match="moves, mixes or shifts channels"):
        prune(model, plan)
    with pytest.raises(ValueError, match="plan is a dict; a PruningPlan is needed"):
        prune(model, plan.to_dict())


def test_a_branch_for_training_alone_is_refused():
    model = Branches(lambda self, x: x + self.aux(x.mean((2, 3))).mean() if self.training else x)
    model.aux = nn.Linear(12, 5)
    with pytest.raises(
        ValueError, match=r"Branches\) does not run with fewer channels \(.*\); they are those of first"
    ):
        pruning_units(model, torch.rand(1, 3, 8, 8))


def test_a_second_head_is_named_whose_output_the_logits_do_not_depend_on():
    class TwoHeads(Branches):
        def forward(self, images):
            logits = super().forward(images)
            return ModelOutput(logits=logits, aux=self.aux(self.first(images).mean((2, 3))))

    model = TwoHeads(lambda self, x: x)
    model.aux = nn.Linear(12, 5)
    with pytest.raises(ValueError, match="no unit has aux: does what it computes reach the logits, as pruning needs"):
        pruning_units(model, torch.rand(1, 3, 8, 8))


def compiled(model):
    return torch.compile(model, backend="eager")


def normalised(norm):
    def change(model):
        model.second = norm(model.second)
        return model

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compiled, r"the model was made by torch\.compile.*Give the network itself, model\._orig_mod, and compile"),
        (lambda model: nn.Sequential(compiled(model)), r"module '0' was made.*model\.0\._orig_mod"),
        (nn.DataParallel, r"the model is a DataParallel.*Give the network itself, model\.module"),
        (normalised(parametrizations.weight_norm), r"remove_parametrizations\(model\.second, 'weight'\)"),
        (
            normalised(nn.utils.spectral_norm),
            r"module 'second' .*first: torch\.nn\.utils\.remove_spectral_norm\(model\.sec",
        ),
        (
            normalised(lambda layer: l1_unstructured(layer, "weight", 0.5)),
            r"utils\.prune\.remove\(model\.second, name\)",
        ),
    ],
)
def test_what_hides_layers_or_weights_is_named_with_what_takes_it_off(change, message):
    model, images = Branches(lambda self, x: x), torch.rand(1, 3, 8, 8)
    plan = plan_pruning(model, images, allocation="uniform")
    hidden = change(model)
    for work in (
        lambda: pruning_units(hidden, images),
        lambda: plan_pruning(hidden, images, allocation="uniform"),
        lambda: prune(hidden, plan),
    ):
        with pytest.raises(ValueError, match=message):
            work()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the function that is told apart here
def test_the_older_weight_norm_is_named_too():
    with pytest.raises(ValueError, match=r"first: torch\.nn\.utils\.remove_weight_norm\(model\.second\)"):
        pruning_units(normalised(nn.utils.weight_norm)(Branches(lambda self, x: x)), torch.rand(1, 3, 8, 8))


def test_a_network_that_was_compiled_in_place_is_pruned():
    model, images = Branches(lambda self, x: x).eval(), torch.rand(1, 3, 8, 8)
    model.compile(backend="eager")
    model(images)
    plan = plan_pruning(model, images, allocation="uniform")
    assert prune(model, plan)(images).shape == (1, 5)


def test_a_network_that_cannot_train_at_all_is_not_blamed_on_pruning():
    def middle(self, x):
        if self.training:
            raise RuntimeError("for inference")
        return x

    assert pruning_units(Branches(middle), torch.rand(1, 3, 8, 8))


def test_shared_parameters_are_refused_by_name():
    model = Branches(lambda self, x: self.third(x))
    model.third = nn.Conv2d(12, 12, 3, padding=1)
    model.third.weight = model.second.weight
    with pytest.raises(ValueError, match=r"module 'third'.*shares its parameter 'weight' with 'second\.weight'"):
        pruning_units(model, torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "middle", lambda self, x: None), "(?s).*"),
        (lambda model: setattr(model.head, "forward", lambda x: (x, 1)), "(?s).*"),
    ],
)
def test_nothing_stays_on_a_model_that_is_refused(change, message):
    model = Branches(lambda self, x: x)
    change(model)
    with pytest.raises((ValueError, AttributeError, TypeError), match=message):
        pruning_units(model, torch.rand(1, 3, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_of_the_dependency_graph_go_with_it():
    model = Branches(lambda self, x: x if not torch.is_grad_enabled() else x.missing)
    with pytest.raises(ValueError, match="cannot follow"):
        pruning_units(model, torch.rand(1, 3, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_what_has_no_weights_or_no_channels_is_refused():
    with pytest.raises(ValueError, match="has no weights"):
        pruning_units(nn.Flatten(), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="has no channels that could go"):
        pruning_units(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(1, 3, 8, 8))
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        pruning_units(Branches(lambda self, x: x), torch.rand(1, 3, 8, 8))


class Pair(nn.Module):
    """Hands a view of a parameter to a module of its own, as PiT does with its class token."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.patches, self.mix, self.head = nn.Conv2d(3, 8, 2, stride=2), Sum(), nn.Linear(8, 5)

    def forward(self, images):
        return self.head(self.mix((self.patches(images), self.bias.expand(len(images), -1, -1, -1))).mean((2, 3)))


class Sum(nn.Module):
    def forward(self, pair):
        return pair[0] + pair[1]


def test_views_of_parameters_may_go_through_modules():
    images = torch.rand(1, 3, 8, 8)
    (unit,) = pruning_units(Pair(), images)
    assert unit.members == ("patches",) and unit.cost == count_macs(Pair(), images)


def test_a_norm_over_groups_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"EfficientNet\) reshapes channels in a way that torch-pruning cannot follow"):
        pruning_units(timm.create_model("test_efficientnet_evos", num_classes=10), torch.rand(1, 3, 64, 64))


def test_groups_without_end_are_refused_in_seconds():
    with pytest.raises(ValueError, match=r"RexNet\) holds an operation that torch-pruning cannot follow"):
        pruning_units(timm.create_model("rexnet_100", num_classes=10), torch.rand(1, 3, 64, 64))
    assert Group.add_dep.__module__ == "torch_pruning.dependency.group"  # the library is as it was
    assert index_mapping.update_index_mapping.__module__ == "torch_pruning.dependency.index_mapping"


def test_a_subclass_of_a_known_layer_is_refused():
    class Standardised(nn.Conv2d):
        pass

    with pytest.raises(ValueError, match=r"module '0' \(.*Standardised\) holds parameters"):
        known_layers(nn.Sequential(Standardised(3, 8, 3)))


def norm_and_relu(inplace):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), timm.layers.LayerNorm2d(16), nn.ReLU(inplace), nn.Conv2d(16, 12, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def test_an_activation_that_overwrites_what_a_norm_gives_changes_no_unit(monkeypatch):
    images = torch.rand(1, 3, 8, 8)
    model = norm_and_relu(inplace=True)
    assert pruning_units(model, images) == pruning_units(norm_and_relu(inplace=False), images)
    assert model[2].inplace
    check_against_masked(model.double().eval(), images.double(), target=0.5, allocation="uniform")

    seen = []

    def fail(graph, *args, **kwargs):
        seen.append(args[0][2].inplace)
        raise RuntimeError("no graph")

    monkeypatch.setattr("torch_pruning.DependencyGraph.build_dependency", fail)
    with pytest.raises(ValueError, match="no graph"):
        pruning_units(model, images)
    assert model[2].inplace and set(seen) == {False}


def test_a_convolutional_head_belongs_to_no_unit():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [unit.name for unit in pruning_units(model, torch.rand(1, 3, 8, 8))] == ["0"]


@pytest.mark.parametrize("example", [torch.rand(3, 8, 8), torch.rand(0, 3, 8, 8), "image"])
def test_a_wrong_example_is_refused(example):
    with pytest.raises(ValueError, match=r"at least one image \[N, 3, H, W\] is needed"):
        pruning_units(ConcatFlatten(), example)


@pytest.mark.parametrize("network", ["resnet", "vgg", "mobilenet"])
def test_refresh_takes_sizes_from_shapes_so_that_heads_can_be_made_anew(network):
    from hf_mrpf.pruning import plan_pruning, prune

    build, size = NETWORKS[network]
    model, images = build().eval(), torch.rand(2, 3, size, size)
    prune(model, plan_pruning(model, images, allocation="uniform", target=0.4))
    assert model.num_features == model.forward_features(images).shape[1]
    assert (
        model.head_hidden_size
        == model.get_classifier().in_features
        == model.forward_head(model.forward_features(images), pre_logits=True).shape[1]
    )
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)


def test_refresh_leaves_other_networks_alone():
    model = ConcatFlatten()
    assert refresh(model) is model


@pytest.mark.parametrize("network", ["resnet", "bottleneck", "vgg", "hf_resnet", "concat_flatten"])
def test_units_are_those_of_the_dependency_graph_of_torch_pruning(network):
    """An independent trace, through autograd's graph, finds the same layers, sides and channels."""
    import torch_pruning as tp

    build, size = NETWORKS[network]
    model, example = build().eval(), torch.rand(1, 3, size, size)
    names = {module: name for name, module in model.named_modules()}

    def forward(traced, images):
        return logits_of(traced(images)) + 0.0

    theirs = set()
    for group in tp.DependencyGraph().build_dependency(model, example, forward_fn=forward).get_all_groups():
        if any(dep.target.type == tp.ops.OPTYPE.OUTPUT for dep, _ in group):
            continue
        sides = set()
        for item in group.items:
            module = item.dep.target.module
            if module in names and hasattr(module, "weight"):
                norm = isinstance(module, nn.BatchNorm2d)
                side = "both" if norm else "out" if item.dep.handler.__name__.endswith("out_channels") else "in"
                sides |= {(names[module], side, pair) for pair in zip(item.root_idxs, item.idxs, strict=True)}
        theirs.add(frozenset(sides))
    ours = {
        frozenset(
            (slot.layer, slot.side, (channel, index))
            for slot in slots
            for channel, positions in enumerate(slot.positions)
            for index in positions
        )
        for slots in trace_units(model, example).slots.values()
    }
    assert ours == theirs


def test_a_plan_runs_a_network_with_values_for_its_check_alone(monkeypatch):
    """However many candidates the search counts: no copy, no trace and no forward pass for any of them."""
    counts = {"forwards": 0, "shape forwards": 0, "copies": 0, "traces": 0, "sizes": 0}

    class Counted(Branches):
        def forward(self, images):
            counts["shape forwards" if images.is_meta else "forwards"] += 1
            return super().forward(images)

        def __deepcopy__(self, memo):
            counts["copies"] += 1
            made = Counted(self.middle)
            made._modules = copy.deepcopy(self._modules, memo)
            return made

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("hf_mrpf.units.couple", counting("traces", couple))
    monkeypatch.setattr(UnitGraph, "size", counting("sizes", UnitGraph.size))
    plan_pruning(Counted(lambda self, x: x), torch.rand(1, 3, 96, 96), allocation="uniform", min_channels=1)
    # The masked original and the pruned copy have values; the other copies are for the trace and the size of its image.
    assert counts.pop("sizes") > 20
    assert counts == {"forwards": 2, "shape forwards": 4, "copies": 3, "traces": 1}


def test_code_that_reads_values_is_traced_with_them():
    images = torch.rand(1, 3, 8, 8)
    plain = trace_units(Branches(lambda self, x: x), images)
    reading = trace_units(Branches(lambda self, x: x * float(x.abs().max() < 1e9)), images)
    assert (reading.slots, reading.layers) == (plain.slots, plain.layers)


@pytest.mark.parametrize("size", [64, 96])
def test_shapes_alone_tell_what_values_do(size, monkeypatch):
    networks = [build() for build, _ in NETWORKS.values() if build is not ConcatFlatten]
    shapes = [trace_units(model, torch.rand(1, 3, size, size), check=False) for model in networks]
    monkeypatch.setattr("hf_mrpf.units.skeleton", None)  # cannot be called
    for model, quick in zip(networks, shapes, strict=True):
        plain = trace_units(model, torch.rand(1, 3, size, size), check=False)
        assert (quick.units, quick.slots, quick.layers) == (plain.units, plain.slots, plain.layers)


def test_what_a_small_image_hides_is_refused_at_the_full_size_before_a_cut():
    """Planning checks on small images; removing checks on those of the plan."""
    model = Branches(lambda self, x: x.flip(1) if x.shape[-1] > 64 else x)
    plan = plan_pruning(model, torch.rand(1, 3, 96, 96), allocation="uniform", min_channels=1)
    with pytest.raises(ValueError, match="moves, mixes or shifts channels"):
        prune(model, plan)
    assert model.first.out_channels == 12


def test_what_a_small_image_alone_shows_is_not_refused():
    model = Branches(lambda self, x: x.flip(1) if x.shape[-1] <= 64 else x)
    assert pruning_units(model, torch.rand(1, 3, 96, 96))


@pytest.mark.parametrize(
    ("norm", "features"),
    [
        (nn.BatchNorm2d(4), (2, 4, 3, 3)),
        (nn.BatchNorm2d(4), (2, 5, 3, 3)),
        (nn.BatchNorm2d(4, affine=False), (2, 5, 3, 3)),
        (nn.BatchNorm2d(4), (1, 4, 1, 1)),
        (nn.BatchNorm1d(4), (2, 4)),
        (nn.LayerNorm(4), (2, 4)),
        (nn.LayerNorm(4), (2, 5)),
        (nn.LayerNorm((3, 4)), (2, 3, 4)),
    ],
)
def test_norms_of_no_values_pass_and_refuse_as_others_do(norm, features):
    def outcome(images):
        try:
            return norm(images).shape
        except (RuntimeError, ValueError) as error:
            return type(error)

    real = outcome(torch.rand(features))
    with shapes_only():
        norm.to("meta")
        assert outcome(torch.zeros(features)) == real

"""Planning and removal. The check that counts: the pruned network equals the masked original in float64."""

import copy
import dataclasses
import json
import math

import pytest
import timm
import torch
from pruning_reference import (
    NETWORKS,
    ConcatFlatten,
    check_against_masked,
    check_family,
    narrow_resnet,
    narrow_vgg,
    randomise,
)

from hf_mrpf.attacks import AttackConfig
from hf_mrpf.efficiency import count_macs, count_parameters
from hf_mrpf.fingerprint import weights_sha256
from hf_mrpf.modeling import PrunedForImageClassification
from hf_mrpf.plan import PruningPlan
from hf_mrpf.pruning import plan_pruning, prune
from hf_mrpf.repair import repair
from hf_mrpf.sensitivity import module_robustness_sensitivity
from hf_mrpf.units import pruning_units


# What is slow here is fast in test_families.py, pruned once less.
@pytest.mark.parametrize(
    "network", [pytest.param(name, marks=pytest.mark.slow if name == "mobilenet" else ()) for name in NETWORKS]
)
def test_a_pruned_network_equals_its_masked_original(network):
    check_family(*NETWORKS[network], targets=(0.5,), rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_so_it_does_at_other_targets_and_pruned_three_times(network):
    check_family(*NETWORKS[network], targets=(0.3, 0.7), rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv3_small_100", "densenet121", "inception_v3"])
def test_a_pruned_timm_network_equals_its_masked_original(name):
    size = 96 if name == "inception_v3" else 64
    check_family(lambda: timm.create_model(name, num_classes=10), size, targets=(0.3, 0.5, 0.7))


@pytest.mark.slow
def test_a_pruned_vgg16_equals_its_masked_original():
    def build():
        return PrunedForImageClassification.from_backbone(
            "timm/vgg16_bn", num_labels=10, image_size=32, small_images=True
        )

    check_family(build, 32, targets=(0.3, 0.5, 0.7))


def test_plans_removals_and_repairs_are_alike_whatever_device_is_the_default():
    dense, images = narrow_resnet().eval(), torch.rand(4, 3, 32, 32)
    batches, attack = [(images, torch.arange(4))], AttackConfig(num_steps=1)

    def pruned():
        plan = plan_pruning(dense, images, allocation="uniform")
        smaller = prune(copy.deepcopy(dense), plan)
        repair(smaller, dense, plan, batches, attack)
        return weights_sha256(smaller)

    expected = pruned()
    with torch.device("meta"):
        assert pruned() == expected
        # What it takes is another time each time.
        assert plan_pruning(dense, images, allocation="uniform", target=0.8, round_to="auto").latency


def test_channels_kept_by_hand_give_the_same_network():
    """No code of the library in the reference: tensors of a concatenation and a flatten sliced here, by name."""
    model = randomise(ConcatFlatten())
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    plan = plan_pruning(model, images, target=0.4, allocation="uniform", importance="random")
    left, right, mix, hidden = (plan.kept[name] for name in ("left", "right", "mix", "hidden"))
    joined = left + [8 + channel for channel in right]
    flat = [16 * channel + position for channel in mix for position in range(16)]
    index = {
        "left.weight": (left,),
        "left.bias": (left,),
        "right.weight": (right,),
        **{f"norm.{name}": (joined,) for name in ("weight", "bias", "running_mean", "running_var")},
        "mix.weight": (mix, joined),
        "mix.bias": (mix,),
        "hidden.weight": (hidden, flat),
        "hidden.bias": (hidden,),
        "classes.weight": (range(5), hidden),
    }
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, axes in index.items():
        for axis, kept in enumerate(axes):
            expected[name] = expected[name].index_select(axis, torch.tensor(list(kept)))
    pruned = prune(model, plan).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in pruned.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert all(torch.equal(pruned[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_target_is_met_and_measured(metric, allocation):
    model, images = narrow_resnet(), torch.rand(1, 3, 32, 32)
    for target in (0.2, 0.5, 0.9):
        plan = plan_pruning(
            model, images, target=target, target_metric=metric, allocation=allocation, max_ratio=0.9, min_channels=1
        )
        assert plan.achieved[metric] == pytest.approx(target, rel=0.01)
        assert all(ratio <= 0.9 for ratio in plan.ratios.values())
    pruned = prune(copy.deepcopy(model), plan)
    measured = {"macs": count_macs(pruned, images), "params": count_parameters(pruned)}
    assert plan.after == measured
    assert plan.achieved == {name: measured[name] / plan.before[name] for name in measured}


def test_scores_decide_who_gives():
    model, images = narrow_resnet(), torch.rand(1, 3, 32, 32)
    units = pruning_units(model, images)
    scores = {unit.name: 10.0 ** (i % 4) for i, unit in enumerate(units)}
    plan = plan_pruning(model, images, scores=scores)
    assert plan.scores == scores and plan.module_scores == {} and plan.sensitivity is None
    for a in units:
        for b in units:
            # Rounding to whole channels may cost one of a narrow unit's eight.
            if scores[a.name] > scores[b.name]:
                assert plan.ratios[a.name] <= plan.ratios[b.name] + 1 / 8
    assert plan.ratios[units[0].name] > plan.ratios[units[3].name] + 0.2


def test_module_scores_are_combined_by_unit():
    model, images = narrow_resnet(), torch.rand(1, 3, 32, 32)
    units = pruning_units(model, images)
    modules = {member: 0.1 + i for i, member in enumerate(m for unit in units for m in unit.members)} | {"fc": 7.0}
    for combine, function in (("sum", sum), ("max", max), ("mean", lambda v: sum(v) / len(v))):
        plan = plan_pruning(model, images, scores=modules, combine=combine)
        assert plan.module_scores == modules
        expected = {unit.name: function([modules[member] for member in unit.members]) for unit in units}
        assert plan.scores == pytest.approx(expected)


@pytest.mark.parametrize("combine", ["sum", "joint"])
def test_scores_are_measured_on_batches_where_none_are_given(combine):
    model = ConcatFlatten().eval()
    batches = [(torch.rand(6, 3, 8, 8), torch.randint(5, (6,))) for _ in range(2)]
    attack = AttackConfig(eps=0.1, num_steps=2)
    plan = plan_pruning(model, batches[0][0], batches=iter(batches), attack=attack, combine=combine, seed=5)
    units = pruning_units(model, batches[0][0])
    groups = {unit.name: unit.members for unit in units} if combine == "joint" else None
    measured = module_robustness_sensitivity(model, batches, attack, seed=5, groups=groups)
    assert plan.scores == pytest.approx({unit.name: measured[unit.name] for unit in units})
    assert plan.sensitivity["spearman"] == measured.spearman and len(plan.sensitivity["per_set"]) == 2
    assert plan.sensitivity["settings"]["attack"]["eps"] == 0.1
    assert PruningPlan.from_dict(plan.to_dict()).scores == plan.scores


@pytest.mark.parametrize("importance", ["taylor", "hessian", "fisher"])
def test_data_driven_importances_use_adversarial_images(importance):
    model = ConcatFlatten().eval()
    batches = [(torch.rand(6, 3, 8, 8), torch.randint(5, (6,)))]
    options = {"allocation": "uniform", "importance": importance, "batches": batches}
    attack = AttackConfig(eps=0.5, num_steps=3)
    plan = plan_pruning(model, batches[0][0], attack=attack, **options)
    again = plan_pruning(model, batches[0][0], attack=attack, **options)
    clean = plan_pruning(model, batches[0][0], attack=AttackConfig(eps=0.0), **options)
    assert plan == again and plan.kept != clean.kept


def test_the_most_important_channels_are_kept():
    model = ConcatFlatten()
    with torch.no_grad():
        model.hidden.weight[::2] *= 10
    plan = plan_pruning(model, torch.rand(1, 3, 8, 8), allocation="uniform", target=0.3)
    assert set(plan.kept["hidden"]) <= set(range(0, 24, 2))


@pytest.mark.parametrize(("round_to", "min_channels"), [(8, 4), (4, 8), (1, 12)])
def test_rounding_and_least_widths_are_honoured(round_to, min_channels):
    plan = plan_pruning(
        narrow_resnet(),
        torch.rand(1, 3, 32, 32),
        target=0.6,
        allocation="uniform",
        round_to=round_to,
        min_channels=min_channels,
    )
    for unit in plan.units:
        kept = len(plan.kept[unit.name])
        assert kept % round_to == 0 and kept >= min(min_channels, unit.width)
    assert plan.achieved["macs"] == pytest.approx(0.6, rel=0.1)


def test_a_target_that_is_missed_by_more_than_a_percent_is_said(caplog):
    plan = plan_pruning(ConcatFlatten(), torch.rand(1, 3, 8, 8), allocation="uniform", target=0.9, round_to=12)
    (record,) = caplog.records
    achieved = plan.achieved["macs"]
    assert f"keeps {achieved:.4f} of the macs, which is" in record.message and achieved < 0.88
    assert "off the target 0.9" in record.message and "multiples of 12: a smaller round_to" in record.message
    caplog.clear()
    assert plan_pruning(narrow_resnet(), torch.rand(1, 3, 32, 32), allocation="uniform") and not caplog.records


def test_ignored_units_stay_whole():
    model, images = narrow_resnet(), torch.rand(1, 3, 32, 32)
    plan = plan_pruning(model, images, target=0.7, allocation="uniform", ignore=["layer3", "conv1.0", "fc"])
    for unit in plan.units:
        whole = unit.name == "conv1.0" or any(member.startswith("layer3") for member in unit.members)
        assert (len(plan.kept[unit.name]) == unit.width) == whole
    assert plan.achieved["macs"] == pytest.approx(0.7, rel=0.01)


def test_plans_are_reproducible_and_survive_json(tmp_path):
    model, images = narrow_resnet(), torch.rand(1, 3, 32, 32)
    plan = plan_pruning(model, images, allocation="global", importance="random", seed=3, ignore=["layer1"])
    assert plan == plan_pruning(
        copy.deepcopy(model), images, allocation="global", importance="random", seed=3, ignore=["layer1"]
    )
    path = plan.save(tmp_path / "pruning_plan.json")
    assert PruningPlan.load(path) == plan
    assert json.loads(path.read_text())["format_version"] == 1
    assert {"python", "torch", "timm", "transformers", "torch-pruning"} <= set(plan.versions)
    assert plan.example_shape == (1, 3, 32, 32)


def test_pruning_keeps_modes_flags_dtypes_and_replaces_nothing_else():
    model = narrow_resnet().train().double()
    model.layer2.eval()
    model.conv1[0].weight.requires_grad_(False)
    plan = plan_pruning(model, torch.rand(1, 3, 32, 32), allocation="uniform")
    modes = [module.training for module in model.modules()]
    assert prune(model, plan) is model
    assert modes == [module.training for module in model.modules()]
    assert not model.conv1[0].weight.requires_grad and model.fc.weight.requires_grad
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert all(parameter.is_leaf for parameter in model.parameters())


def test_the_wrapped_model_is_pruned_like_its_backbone():
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=4, image_size=32, small_images=True, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32)
    ).eval()
    images = torch.rand(2, 3, 32, 32)
    plan = check_against_masked(model.double(), images.double(), target=0.5, allocation="uniform")
    assert all(unit.name.startswith("backbone.") for unit in plan.units)
    assert model.backbone.num_features == model.backbone.fc.in_features == len(plan.kept[plan.units[-2].name])


def test_other_weights_warn_and_other_widths_are_refused_before_any_cut():
    images = torch.rand(1, 3, 32, 32)
    model = narrow_resnet()
    plan = plan_pruning(model, images, allocation="uniform")
    with pytest.warns(UserWarning, match="weights are not those that the plan was made on"):
        prune(narrow_resnet(), plan)
    prune(model, plan)
    before = weights_sha256(model)
    with pytest.raises(ValueError, match=r"not for this model: unit 'conv1\.0' is 8 channels wide .* in the plan"):
        prune(model, plan)
    with pytest.raises(
        ValueError, match=r"unit 'conv1\.0' is 8 channels wide with members conv1\.0 in the plan and absent"
    ):
        prune(narrow_vgg(), plan)
    assert weights_sha256(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, r"target is 1\.0; .*fraction KEPT"),
        ({"target": True}, "target is True"),
        ({"max_ratio": 0}, r"max_ratio is 0; .*REMOVED"),
        ({"target_metric": "bytes"}, "target_metric is 'bytes'; known metrics: macs, params, latency"),
        ({"allocation": "best"}, "known allocations: mrs, uniform, global"),
        ({"importance": "l0"}, "known importances: magnitude"),
        ({"combine": "min"}, "combine is 'min'; known: .*sum.*joint"),
        ({"min_channels": 0}, "min_channels is 0; an integer of at least 1"),
        ({"round_to": 2.5}, r"round_to is 2\.5; an integer of at least 1, or 'auto', is needed"),
        ({"round_to": "best"}, r"round_to is 'best'; an integer of at least 1, or 'auto', is needed"),
        ({"round_to": True}, "round_to is True"),
        ({"latency_batch_size": 0}, "latency_batch_size is 0; an integer of at least 1 is needed"),
        ({"seed": True}, "seed is True"),
        ({"ignore": ["layer9"]}, "ignore names 'layer9', which is no unit and no module. Units: left, right"),
        ({"ignore": "left"}, r"a list of names is needed, such as \['left'\]"),
        ({"ignore": ["left", "norm"]}, "ignore names 'norm', a BatchNorm2d without a member of a unit inside"),
        ({"ignore": [""]}, "ignore names '', a ConcatFlatten without a member of a unit inside"),
        ({"ignore": ["left", "right", "mix", "hidden"]}, "smallest fraction of macs that can be kept is 1.0000"),
        (
            {"target": 0.02},
            r"target 0\.02 cannot be met: the smallest fraction of macs that can be kept is 0\.\d+\. Raise",
        ),
        ({"allocation": "mrs"}, "allocation 'mrs' needs scores, or batches and attack to measure them on"),
        ({"allocation": "mrs", "batches": []}, "allocation 'mrs' needs scores, or batches and attack"),
        ({"importance": "taylor"}, "importance 'taylor' needs batches and attack"),
        ({"scores": {"left": 1.0}}, "member without a score|has no score|lacks|Give scores"),
        ({"scores": [1, 2]}, "scores are a list; a mapping of the names of members, or of units, to numbers"),
        ({"scores": {"nowhere": 1.0}}, "scores name 'nowhere', which is no unit and no module"),
        ({"scores": dict.fromkeys(("left", "right", "mix", "hidden"), math.nan)}, "the score of 'left' is nan"),
        ({"scores": {"left": 1.0}, "combine": "joint"}, "combine 'joint' needs scores of all units by unit name"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_pruning(ConcatFlatten(), torch.rand(1, 3, 8, 8), **{"allocation": "uniform"} | options)


def test_weights_that_are_not_finite_are_refused():
    model = ConcatFlatten()
    model.mix.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"mix\.weight"):
        plan_pruning(model, torch.rand(1, 3, 8, 8), allocation="uniform")


def test_scores_are_not_measured_for_an_importance_that_cannot_be():
    measured = []
    with pytest.raises(ValueError, match="importance 'taylor' needs batches and attack"):
        plan_pruning(ConcatFlatten(), torch.rand(1, 3, 8, 8), scores=lambda: measured.append(1), importance="taylor")
    assert not measured


@pytest.fixture(scope="module")
def plan_values():
    return plan_pruning(ConcatFlatten(), torch.rand(1, 3, 8, 8), allocation="uniform").to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2; this version of hf_mrpf reads 1"),
        ({"surprise": 1}, "unknown key 'surprise'; known keys: target"),
        ({"target": "half"}, "key 'target' must be a number"),
        ({"round_to": True}, "key 'round_to' must be an integer"),
        ({"kept": {"left": [0.5]}}, "key 'kept' must be an object of lists of integers"),
        ({"kept": {"left": [0]}}, "kept: must name every unit once"),
        ({"units": [{"name": "left"}]}, "key 'units' must be a list of units"),
        ({"example_shape": [1, 3, 0, 8]}, r"key 'example_shape' must be \[1, channels, height, width\]"),
        ({"example_shape": [1, 3, 10**6, 10**6]}, "key 'example_shape' must be .* up to 8192 pixels"),
        ({"sensitivity": 3}, "key 'sensitivity' must be an object or null"),
        ({"latency": {"fraction": 0.5}}, "key 'latency' must be an object of fraction, quartiles, .*, or null"),
    ],
)
def test_a_broken_plan_file_is_refused_by_file_and_key(plan_values, tmp_path, change, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(plan_values | change))
    with pytest.raises(ValueError, match=message) as error:
        PruningPlan.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("indices", [[], [3, 1], [1, 1], [-1, 2], [0, 8]])
def test_kept_channels_must_be_increasing_and_inside(plan_values, indices):
    with pytest.raises(ValueError, match="pruning plan: kept: unit 'left'"):
        PruningPlan.from_dict(plan_values | {"kept": plan_values["kept"] | {"left": indices}})


def test_other_broken_plans_are_refused(plan_values, tmp_path):
    with pytest.raises(ValueError, match="key 'seed' is missing"):
        PruningPlan.from_dict({key: value for key, value in plan_values.items() if key != "seed"})
    with pytest.raises(ValueError, match="a JSON object is needed, not list"):
        PruningPlan.from_dict([plan_values])
    with pytest.raises(ValueError, match="two units have one name"):
        PruningPlan.from_dict(plan_values | {"units": plan_values["units"] + plan_values["units"][:1]})
    path = tmp_path / "no.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"no\.json: this is no JSON file"):
        PruningPlan.load(path)
    with pytest.raises(FileNotFoundError):
        PruningPlan.load(tmp_path / "absent.json")


def test_a_changed_plan_is_checked_and_can_be_applied():
    model, images = ConcatFlatten(), torch.rand(1, 3, 8, 8)
    plan = plan_pruning(model, images, allocation="uniform")
    changed = dataclasses.replace(plan, kept=plan.kept | {"left": [2, 5]})
    assert prune(model, changed).left.out_channels == 2

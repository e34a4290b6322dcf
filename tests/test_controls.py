"""The controls of MRS and Isomorphic Pruning on networks: what plan_pruning and the trainer hand them."""

import pytest
import torch
from pruning_reference import narrow_resnet
from torch import nn

from hf_mrpf import AttackConfig, MRPFConfig, MRPFTrainer, load_image_data, plan_pruning
from hf_mrpf.allocation import ALLOCATIONS, reads
from hf_mrpf.units import trace_units

EXAMPLE = torch.rand(1, 3, 16, 16)
SCORED = [name for name in ALLOCATIONS if "sensitivities" in reads(name)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return narrow_resnet()


@pytest.fixture(scope="module")
def scores(model):
    return {unit.name: 10.0**-number for number, unit in enumerate(trace_units(model, EXAMPLE).units)}


def test_plans_of_the_controls_share_out_the_same_scores_another_way(model, scores):
    plans = {name: plan_pruning(model, EXAMPLE, scores=scores, allocation=name) for name in SCORED}
    assert set(plans) == {"mrs", "mrs_per_cost", "anti_mrs", "shuffled_mrs"}
    first, *_, last = scores
    assert plans["mrs"].ratios[first] < plans["mrs"].ratios[last]
    assert plans["anti_mrs"].ratios[first] > plans["anti_mrs"].ratios[last]
    for name, plan in plans.items():
        assert plan.achieved["macs"] == pytest.approx(0.5, abs=0.01)
        assert plan.scores == scores, f"the plan of {name} says what was measured, not what was dealt"
    seeds = [plan_pruning(model, EXAMPLE, scores=scores, allocation="shuffled_mrs", seed=seed) for seed in (0, 1)]
    assert seeds[0].kept == plans["shuffled_mrs"].kept != seeds[1].kept


@pytest.mark.parametrize("name", SCORED)
def test_each_that_reads_sensitivities_asks_for_them(model, name):
    with pytest.raises(ValueError, match=f"allocation '{name}' needs scores, or batches and attack to measure"):
        plan_pruning(model, EXAMPLE, allocation=name)


def test_they_are_measured_where_they_are_not_given(model):
    sets = [(torch.rand(4, 3, 16, 16), torch.arange(4))]
    plan = plan_pruning(model, EXAMPLE, allocation="anti_mrs", batches=sets, attack=AttackConfig(eps=0.1, num_steps=1))
    assert set(plan.scores) == {unit.name for unit in plan.units} and plan.sensitivity["settings"]["num_steps"] == 3


def test_the_trainer_measures_them_as_it_is_told(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(8 * 25, 10))
    args = MRPFConfig(
        str(tmp_path), allocation="anti_mrs", sensitivity_method="first_order", gamma=0.05, calibration_sets=1,
        calibration_set_size=20, min_channels=1, recalibration_samples=0, report_to="none", use_cpu=True,
        disable_tqdm=True, eps=0.1, num_steps=1,
    )  # fmt: skip
    plan = MRPFTrainer(net, args, load_image_data(max_train_samples=64).train).prune()
    assert plan.allocation == "anti_mrs"
    assert (plan.sensitivity["settings"]["method"], plan.sensitivity["settings"]["gamma"]) == ("first_order", 0.05)


def test_isomorphic_groups_the_insides_of_blocks_and_prunes_every_group_alike(model):
    graph = trace_units(model, EXAMPLE)
    groups = {}
    for unit in graph.units:
        groups.setdefault(graph.structure(unit), []).append(unit)
    inside = ("channels", "conv out", "norm both", "conv in")
    assert {unit.name for unit in groups[inside]} >= {f"layer{i}.0.conv1" for i in (1, 2, 3, 4)}
    streams = {structure for structure, units in groups.items() if any("conv2" in unit.name for unit in units)}
    assert len(streams) >= 2 and inside not in streams
    plan = plan_pruning(model, EXAMPLE, allocation="isomorphic", importance="l1", min_channels=1, max_ratio=0.9)
    shares = {
        structure: sum(len(plan.kept[unit.name]) for unit in units) / sum(unit.width for unit in units)
        for structure, units in groups.items()
    }
    assert all(share == pytest.approx(shares[inside], abs=0.06) for share in shares.values()), shares
    assert len({plan.ratios[unit.name] for unit in groups[inside]}) > 1
    whole = plan_pruning(model, EXAMPLE, allocation="global", importance="l1", min_channels=1, max_ratio=0.9)
    assert whole.kept != plan.kept

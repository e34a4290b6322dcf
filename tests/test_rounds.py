"""Pruning in rounds: what each aims at, what they keep of the dense model, and the recipe that runs them."""

import copy
import json
import warnings

import pytest
import timm
import torch
from pruning_reference import narrow_resnet, randomise

from hf_mrpf import PruningPlan, plan_pruning, prune
from hf_mrpf.attacks import logits_of
from hf_mrpf.hub import write_plans
from hf_mrpf.rounds import compose_kept, fraction_after, round_target, stage_names

SIZE = 32


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=SIZE, patch_size=8, depth=2, embed_dim=48, num_heads=3
    )


def one_after_another(model, targets, **options) -> list[PruningPlan]:
    """Prunes `model` once for each target, and gives the plans."""
    plans = []
    for target in targets:
        example = torch.zeros(1, 3, SIZE, SIZE)
        plans.append(plan_pruning(model, example, target=target, allocation="uniform", **options))
        prune(model, plans[-1])
    return plans


# ---- What each round aims at --------------------------------------------------------------------------------------


def test_rounds_are_steps_of_equal_proportion_and_end_at_the_target():
    assert [fraction_after(0.25, number, 2) for number in (1, 2)] == [0.5, 0.25]
    assert round_target(0.5, 1, 1, 1.0) == 0.5  # one-shot is exactly what was asked for
    kept = 1.0
    for number in range(1, 4):
        kept *= round_target(0.3, number, 3, kept)
    assert kept == pytest.approx(0.3)


def test_what_a_round_missed_the_next_one_makes_up_for():
    # The first round was to leave 0.5 and left 0.6: the second removes more, not the same step again.
    assert round_target(0.25, 2, 2, 0.6) * 0.6 == pytest.approx(0.25)
    # It left less than the second one wants: nothing is to be removed, and the fraction is still one below 1.
    assert 0.99 < round_target(0.5, 2, 3, 0.4) < 1
    with pytest.raises(ValueError, match="round 3 of 2: rounds are counted from 1 to 2"):
        round_target(0.5, 3, 2, 1.0)


def test_stages_of_one_round_are_called_as_ever():
    assert stage_names(1) == [("pruned", "fine-tuned")]
    assert stage_names(3) == [("pruned-1", "recovered-1"), ("pruned-2", "recovered-2"), ("pruned", "fine-tuned")]


# ---- What rounds keep together ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (narrow_resnet, {"importance": "random"}),
        (vit, {"importance": "random"}),
        (vit, {"importance": "magnitude", "heads": True}),
    ],
    ids=["resnet", "attention channels", "heads"],
)
def test_indices_of_the_dense_model_leave_what_the_rounds_left_one_after_another(tmp_path, build, options):
    torch.manual_seed(0)
    dense = randomise(build())
    stepwise, at_once = copy.deepcopy(dense), copy.deepcopy(dense)
    plans = one_after_another(stepwise, (0.8, 0.75, 0.8), **options)
    write_plans(plans, tmp_path / "pruning_plan.json")
    content = json.loads((tmp_path / "pruning_plan.json").read_text())
    assert set(content) == {"rounds", "kept"}
    assert [PruningPlan.from_dict(one) for one in content["rounds"]] == plans

    loaded = PruningPlan.load(tmp_path / "pruning_plan.json")
    assert loaded.to_dict()["kept"] == content["kept"]
    assert (loaded.before, loaded.after) == (plans[0].before, plans[-1].after)
    assert loaded.target == pytest.approx(0.8 * plans[-1].before["macs"] / plans[0].before["macs"])
    assert loaded.achieved["macs"] == pytest.approx(loaded.target, rel=0.03)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the hash is the dense model's, so nothing is warned of
        prune(at_once, loaded)
    images = torch.rand(3, 3, SIZE, SIZE, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(at_once(images)), logits_of(stepwise(images)), rtol=0, atol=1e-10)
    for (name, one), (other, two) in zip(at_once.state_dict().items(), stepwise.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_rounds_that_cut_groups_in_two_ways_are_kept_as_rounds_alone(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("regnetx_002", num_classes=10)
    again = copy.deepcopy(model)
    plans = one_after_another(model, (0.8, 0.75))
    assert {unit.name for unit in plans[0].units} != {unit.name for unit in plans[1].units}
    write_plans(plans, tmp_path / "pruning_plan.json")
    content = json.loads((tmp_path / "pruning_plan.json").read_text())
    assert content["kept"] is None
    with pytest.raises(ValueError, match="PruningPlan.from_dict and apply them in order"):
        PruningPlan.load(tmp_path / "pruning_plan.json")
    for plan in content["rounds"]:
        prune(again, PruningPlan.from_dict(plan))
    assert all(
        torch.equal(one, two) for one, two in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_kept_of_heads_and_of_their_channels_is_composed_head_by_head():
    first = {"attention": {"heads": [0, 2, 3], "qk": [[0, 2], [1, 3], [0, 1]], "v": [[1, 2], [0, 3], [2, 3]]}}
    second = {"attention": {"heads": [1, 2], "qk": [[1], [0]], "v": [[0], [1]]}}
    assert compose_kept([first, second]) == {"attention": {"heads": [2, 3], "qk": [[3], [0]], "v": [[0], [3]]}}
    assert compose_kept([first]) == first


def test_one_round_is_written_as_a_plan(tmp_path):
    (plan,) = one_after_another(narrow_resnet(), (0.7,))
    write_plans([plan], tmp_path / "pruning_plan.json")
    assert "rounds" not in json.loads((tmp_path / "pruning_plan.json").read_text())
    assert PruningPlan.load(tmp_path / "pruning_plan.json") == plan
    assert PruningPlan.of_rounds([plan]) == plan


@pytest.fixture(scope="module")
def two_rounds():
    plans = one_after_another(narrow_resnet(), (0.8, 0.8))
    return {"rounds": [plan.to_dict() for plan in plans], "kept": PruningPlan.of_rounds(plans).to_dict()["kept"]}


def test_plans_that_do_not_follow_each_other_are_refused(two_rounds):
    first, second = map(PruningPlan.from_dict, two_rounds["rounds"])
    with pytest.raises(ValueError, match=r"round 2 starts from \d+ channels of unit .*the round before it left \d+"):
        PruningPlan.of_rounds([second, first])
    with pytest.raises(ValueError, match="there are none"):
        PruningPlan.of_rounds([])
    with pytest.raises(ValueError, match=r"round 2 .* not the same units: 'b'"):
        compose_kept([{"a": [0], "b": [0]}, {"a": [0]}])
    with pytest.raises(ValueError, match="did not leave"):
        compose_kept([{"a": [0, 2]}, {"a": [2]}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": []}, "file: key 'rounds' must be a list of plans"),
        ({"rounds": 3}, "file: key 'rounds' must be a list of plans"),
        ({"rounds": [{"rounds": [], "kept": {}}]}, "file: round 1: format_version is None"),
        ({"rounds": ["no plan"]}, "file: round 1: a JSON object is needed"),
        ({"kept": {}}, "file: key 'kept' is not what the rounds leave"),
        ({"before": {}}, "file: the rounds do not go together"),
        ({"before": {"macs": 0, "params": 1}}, "file: the rounds do not go together"),
    ],
)
def test_a_file_of_rounds_is_hostile_until_it_is_checked(two_rounds, changes, message):
    content = copy.deepcopy(two_rounds)
    if "before" in changes:
        content["rounds"][0] |= changes
    else:
        content |= changes
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_dict(content, source="file")

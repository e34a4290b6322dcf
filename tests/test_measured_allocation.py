"""Allocations that measure: NetAdapt against its algorithm, what the functions are handed, and what is refused."""

import copy
import itertools
import runpy
import sys
from pathlib import Path

import pytest
import torch
from process_group import on_processes
from pruning_reference import ConcatFlatten
from torch import nn

import hf_mrpf.netadapt
from hf_mrpf import AttackConfig, MRPFConfig, PruningPlan, plan_pruning, prune, recalibrate_batchnorm, repair
from hf_mrpf.fingerprint import weights_sha256
from hf_mrpf.measured_allocation import MEASURED, measured_widths
from hf_mrpf.processes import Processes
from hf_mrpf.pruned_copies import robust_loss

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "prune.py"
EXAMPLE = torch.rand(1, 3, 8, 8)
ATTACK = AttackConfig(eps=0.1, num_steps=2)


def calibration(count=16):
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(count, 3, 8, 8, generator=generator), torch.arange(count) % 5)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ConcatFlatten()


@pytest.fixture
def few_copies(monkeypatch):
    monkeypatch.setattr(hf_mrpf.netadapt, "EVALUATIONS", 8)
    monkeypatch.setattr(hf_mrpf.netadapt, "STEPS", 3)


class Table:
    """Copies that are only their widths, of a cost that is quadratic in them."""

    def size(self, widths):
        return sum(a * b for a, b in itertools.pairwise([3, *widths.values(), 5]))

    def at(self, widths):
        return dict(widths)

    def to_come(self, copies):
        pass


def greedy(size, loss, options, target, steps):
    """NetAdapt, Alg. 1, without its short-term fine-tuning."""
    widths = {name: max(choices) for name, choices in options.items()}
    cut = (size(widths) - target) / steps
    while size(widths) > target:
        lowest = min(size(widths | {name: min(options[name])}) for name in options)
        goal = max(size(widths) - cut, target, lowest)
        proposals = []
        for name, choices in options.items():
            fitting = [c for c in choices if c < widths[name] and size(widths | {name: c}) <= goal]
            proposals += [widths | {name: max(fitting)}] if fitting else []
        widths = min(proposals, key=loss)
    return widths


@pytest.mark.parametrize("target", [0.045, 0.2, 0.5, 0.9])
def test_netadapt_is_the_published_greedy_search(target, monkeypatch):
    options = {"a": list(range(2, 21)), "b": list(range(4, 31)), "c": [8, 16, 24], "d": list(range(1, 8))}
    worth = {"a": 3.0, "b": 1.0, "c": 0.5, "d": 2.0}
    measured = []

    def loss(widths, *rest, **keywords):
        measured.append(widths)
        return sum(worth[name] / width for name, width in widths.items())

    monkeypatch.setattr(hf_mrpf.netadapt, "robust_loss", loss)
    wanted = target * Table().size({name: choices[-1] for name, choices in options.items()})
    found = MEASURED["netadapt"](None, Table(), [], ATTACK, options, wanted, 0)
    assert len(measured) <= hf_mrpf.netadapt.EVALUATIONS
    steps = max(hf_mrpf.netadapt.STEPS, hf_mrpf.netadapt.EVALUATIONS // 4)
    assert found == greedy(Table().size, loss, options, wanted, steps)
    assert Table().size(found) <= wanted


def test_netadapt_ends_where_nothing_can_go(monkeypatch):
    monkeypatch.setattr(hf_mrpf.netadapt, "robust_loss", lambda *given, **keywords: 0.0)
    options = {"a": [2, 3], "b": [4, 5]}
    assert MEASURED["netadapt"](None, Table(), [], ATTACK, options, 0.0, 0) == {"a": 2, "b": 4}


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_netadapt_meets_the_target_within_all_limits_and_leaves_the_model(model, metric, few_copies):
    model.train()
    before = weights_sha256(model)
    options = {"target_metric": metric, "min_channels": 3, "max_ratio": 0.6, "round_to": 2, "ignore": ["right"]}
    options |= {"allocation": "netadapt", "batches": calibration(), "attack": ATTACK, "target": 0.6}
    plan, again = (plan_pruning(model, EXAMPLE, **options) for _ in range(2))
    assert plan.achieved[metric] == pytest.approx(0.6, abs=0.06)  # widths go in steps of two
    kept = {unit: len(channels) for unit, channels in plan.kept.items()}
    assert kept["right"] == 12
    for unit in plan.units:
        if unit.name != "right":
            assert kept[unit.name] % 2 == 0 and kept[unit.name] >= max(3, 0.4 * unit.width)
    assert (plan.allocation, plan.scores, plan.kept) == ("netadapt", {}, again.kept)
    assert weights_sha256(model) == before and all(module.training for module in model.modules())
    pruned = prune(copy.deepcopy(model), plan)
    assert pruned(EXAMPLE).shape == (1, 5)


def test_what_the_loss_hangs_on_stays(few_copies):
    """The second of two branches is all that is read: the first one's channels are the ones to give."""
    torch.manual_seed(0)
    model = ConcatFlatten()  # a channel of either branch is 3 or 4 % of the multiply-accumulates
    with torch.no_grad():
        model.mix.weight[:, :8] = 0
        model.classes.weight.mul_(30)
        images = torch.rand(32, 3, 8, 8)
        recalibrate_batchnorm(model.eval(), [images])
        sets = [(images, model(images).argmax(1))]  # what it says is right: whatever moves it costs
    options = {"batches": sets, "attack": AttackConfig(eps=0.001), "ignore": ["mix", "hidden"], "min_channels": 1}
    plan = plan_pruning(model, EXAMPLE, allocation="netadapt", target=0.85, **options)
    assert plan.ratios["left"] > 0.3 and plan.ratios["right"] == 0


def test_copies_are_what_prune_repair_and_recalibration_make(model, monkeypatch):
    found = {}

    def half(dense, copies, batches, attack, options, target, seed):
        assert dense is model and seed == 5 and attack is ATTACK
        widths = {name: choices[len(choices) // 2] for name, choices in options.items()}
        found["sizes"] = copies.size(widths), copies.size({})
        found["repaired"], found["again"] = copies.at(widths), copies.at(widths)
        found["as cut"] = copies.at(widths, repaired=False)
        return widths

    monkeypatch.setitem(MEASURED, "half", half)
    monkeypatch.setattr("hf_mrpf.measured_allocation.nudged", lambda size, options, widths, target: widths)
    sets = calibration()
    plan = plan_pruning(model, EXAMPLE, target=0.4, allocation="half", batches=sets, attack=ATTACK, seed=5)
    assert found["sizes"] == (plan.after["macs"], plan.before["macs"])
    pruned = prune(copy.deepcopy(model), plan)
    cut = recalibrate_batchnorm(copy.deepcopy(pruned), sets)
    repair(pruned, model, plan, sets, ATTACK, seed=5)
    recalibrate_batchnorm(pruned, sets)
    for name, expected in {"repaired": pruned, "again": pruned, "as cut": cut}.items():
        torch.testing.assert_close(found[name].state_dict(), expected.state_dict())


def test_widths_near_the_target_are_brought_there_by_single_steps(model, monkeypatch):
    monkeypatch.setitem(MEASURED, "most", lambda *given: {name: choices[-1] for name, choices in given[4].items()})
    plan = plan_pruning(model, EXAMPLE, target=0.9, allocation="most", batches=calibration(), attack=ATTACK)
    assert plan.achieved["macs"] == pytest.approx(0.9, abs=0.01)


def test_the_loss_is_that_of_images_attacked_anew_on_the_model(model):
    sets = calibration()
    (images, labels), model = sets[0], model.eval()
    clean = nn.functional.cross_entropy(model(images), labels).item()
    assert robust_loss(model, sets, AttackConfig(eps=0)) == pytest.approx(clean, rel=1e-6)
    halves = [(images[:10], labels[:10]), (images[10:], labels[10:])]
    assert robust_loss(model, halves, ATTACK) == pytest.approx(robust_loss(model, sets, ATTACK), rel=1e-5)
    assert robust_loss(model, sets, ATTACK) > clean + 0.001
    with pytest.raises(ValueError, match="a loss needs at least one calibration set"):
        robust_loss(model, [], ATTACK)


def test_only_the_main_process_measures_and_all_get_what_it_found(model, monkeypatch):
    class Second(Processes):
        def from_main(self, value):
            assert value == (None, None)
            return sent, failure

    def never(*given):
        raise AssertionError("the second process measured")

    monkeypatch.setitem(MEASURED, "half", never)
    options, sent, failure = {"left": [1, 8]}, {"left": 1}, None
    graph = type("Graph", (), {"size": staticmethod(lambda widths: {"macs": sum(widths.values())})})
    arguments = ("half", model, graph, None, (calibration(), ATTACK), options, "macs", 4.0)
    assert measured_widths(*arguments, seed=0, processes=Second(1, 2)) is sent
    sent, failure = None, ValueError("what went wrong on the first")
    with pytest.raises(ValueError, match="what went wrong on the first"):
        measured_widths(*arguments, seed=0, processes=Second(1, 2))


def planned_together(model):
    made = []
    robust = hf_mrpf.netadapt.robust_loss
    hf_mrpf.netadapt.robust_loss = lambda *given, **keywords: made.append(1) or robust(*given, **keywords)
    options = {"allocation": "netadapt", "batches": calibration(), "attack": ATTACK, "min_channels": 1}
    return plan_pruning(model, EXAMPLE, target=0.6, distributed=True, **options).kept, len(made)


@pytest.mark.slow
def test_two_processes_get_the_plan_of_the_first(model):
    (one, measured), (two, none) = on_processes(2, planned_together, model)
    assert one == two and measured > 8 and none == 0


@pytest.mark.slow
def test_a_run_that_was_stopped_after_the_search_does_not_search_again(tmp_path, monkeypatch, few_copies):
    options = ["--allocation", "netadapt", "--max_train_samples", "64", "--max_eval_samples", "20", "--use_cpu"]
    options += ["--base_epochs", "1", "--num_train_epochs", "1", "--num_steps", "1", "--eval_num_steps", "1"]
    options += ["--calibration_sets", "1", "--calibration_set_size", "16", "--recalibration_samples", "32"]
    monkeypatch.setattr(sys, "argv", ["recipes/prune.py", "--output_dir", str(tmp_path / "run"), *options])
    first, made, robust = 0, [], hf_mrpf.netadapt.robust_loss
    monkeypatch.setattr(
        hf_mrpf.netadapt, "robust_loss", lambda *given, **more: made.append(1) or robust(*given, **more)
    )

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    for stopped_at in ("hf_mrpf.trainer.prune", "hf_mrpf.evaluation.evaluate_robustness"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stopped_at, stop)
            runpy.run_path(str(RECIPE), run_name="recipe")["main"]()
        first = first or len(made)
        assert len(made) == first > 8
    plans = [
        PruningPlan.load(tmp_path / "run/stages/pruned" / name) for name in ("measured_plan.json", "pruning_plan.json")
    ]
    assert plans[0].kept == plans[1].kept and plans[0].allocation == "netadapt"


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"left": 8}, "allocation 'wrong' returned widths of left; one of each of left, right, mix, hidden is needed"),
        ({"left": 9, "right": 8, "mix": 8, "hidden": 8}, "returned width 9 for unit 'left'; one of its allowed"),
    ],
)
def test_widths_that_are_not_allowed_are_refused(model, monkeypatch, widths, message):
    monkeypatch.setitem(MEASURED, "wrong", lambda *given: widths)
    with pytest.raises(ValueError, match=message):
        plan_pruning(model, EXAMPLE, allocation="wrong", batches=calibration(), attack=ATTACK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": None}, "allocation 'netadapt' needs batches and attack to measure losses on"),
        ({"target_metric": "latency"}, "target_metric 'latency' would have it do so at every size.*mrs, uniform"),
        ({"round_to": "auto"}, "round_to 'auto' would have it do so at every size"),
        ({"target": 0.01}, "target 0.01 cannot be met"),
        ({"allocation": "best"}, "known allocations: mrs, uniform, global, .*netadapt"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, options, message):
    given = {"allocation": "netadapt", "batches": calibration(), "attack": ATTACK} | options
    with pytest.raises(ValueError, match=message):
        plan_pruning(model, EXAMPLE, **given)


def test_a_config_refuses_it_before_any_training(tmp_path):
    options = {"allocation": "netadapt", "use_cpu": True, "report_to": "none"}
    assert MRPFConfig(str(tmp_path), **options).allocation == "netadapt"
    with pytest.raises(ValueError, match="target_metric 'latency' would have it do so"):
        MRPFConfig(str(tmp_path), **options, target_metric="latency")

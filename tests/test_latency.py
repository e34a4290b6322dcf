"""Targets of latency and the choice of a multiple, by a made-up clock; and once by the real one."""

import copy
import itertools
import json
import random
import re
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
from process_group import on_processes
from pruning_reference import narrow_resnet
from torch import nn
from transformers import TrainerCallback

import hf_mrpf.latency
from hf_mrpf import MRPFConfig, MRPFTrainer, PrunedForImageClassification, load_image_data, prune, pruning_units
from hf_mrpf.cli import GroupedParser
from hf_mrpf.efficiency import count_macs, latency_rounds
from hf_mrpf.fingerprint import weights_sha256
from hf_mrpf.hub import shown_plan, write_plans
from hf_mrpf.latency import TOLERANCE, Timing, fastest_multiple, meet_latency
from hf_mrpf.model_card import CardInfo, PlanSummary, render_card
from hf_mrpf.plan import PruningPlan
from hf_mrpf.pruning import plan_pruning
from hf_mrpf.stage_lines import pruning_figures, stage_line

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLE = torch.zeros(1, 3, 32, 32)


class FakeDevice:
    """
    Stands for `latency_rounds`: `milliseconds` of a model, each round times what else the machine does.

    A share of that slows every model of the round alike, as a busy machine does, and the rest each pass by itself.
    """

    def __init__(self, milliseconds, noise=0.02, drift=0.3):
        self.milliseconds, self.noise, self.drift = milliseconds, noise, drift
        self.random, self.calls, self.batches = random.Random(0), [], []

    def __call__(self, models, images, *, rounds, seconds, most):
        self.calls.append(len(models))
        self.batches.append(tuple(images.shape))
        whole = {name: self.milliseconds(model) for name, model in models.items()}
        times = {name: [] for name in models}
        for _ in range(rounds):
            slow = 1 + self.drift * self.random.random()
            for name in models:
                times[name].append(whole[name] * slow * self.random.gauss(1, self.noise))
        return times


@pytest.fixture
def device(monkeypatch):
    def install(milliseconds, **options) -> FakeDevice:
        fake = FakeDevice(milliseconds, **options)
        monkeypatch.setattr(hf_mrpf.latency, "latency_rounds", fake)
        return fake

    return install


def by_macs(overhead: float):
    """Milliseconds of a launch, and of the work."""
    return lambda model: overhead + count_macs(model, EXAMPLE) / 1e6


def by_padded_channels(multiple: int):
    """A device that computes channels in blocks of so many, whether they are there or not."""

    def milliseconds(model):
        work = []

        def add(layer, inputs, output):
            blocks = -(-layer.out_channels // multiple) * -(-layer.in_channels // multiple)
            work.append(blocks * multiple**2 * layer.weight[0, 0].numel() * output[0, 0].numel())

        handles = [layer.register_forward_hook(add) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        with torch.inference_mode():
            model(EXAMPLE)
        for handle in handles:
            handle.remove()
        return sum(work) / 1e6

    return milliseconds


# ---- The search, without any model --------------------------------------------------------------------------------


CURVES = {
    "line": lambda size: size,
    "overhead": lambda size: 0.25 + 0.75 * size,
    "convex": lambda size: size**2,
    "concave": lambda size: size**0.5,
    "staircase": lambda size: -(-size * 16 // 1) / 16,
    "steep in its last tenth": lambda size: 0.1 + max(0, 9 * (size - 0.9)),
    "slower when hardly pruned": lambda size: 1.3 * size if size < 1 else 1.0,
}


@pytest.mark.parametrize(
    ("curve", "target"), [*itertools.product(CURVES, (0.35, 0.5, 0.8)), ("steep in its last tenth", 0.2)]
)
def test_a_target_is_met_within_ten_percent_in_few_measurements(curve, target):
    noise, calls = random.Random(1), []

    def measure(nominal, effort):
        calls.append(nominal)
        fraction = CURVES[curve](nominal) * noise.gauss(1, 0.01)
        return Timing(fraction, (fraction, fraction), {}, effort.rounds)

    nominal, timing = meet_latency(measure, target, 0.05)
    assert CURVES[curve](nominal) == pytest.approx(target, rel=TOLERANCE)
    assert timing.fraction == pytest.approx(target, rel=TOLERANCE)
    assert timing.rounds == hf_mrpf.latency.DECIDING.rounds and calls[-1] == nominal
    assert len(calls) <= 12


def test_a_measurement_that_only_looked_right_does_not_count():
    truth, lies = CURVES["overhead"], iter([0.5])

    def measure(nominal, effort):
        fraction = truth(nominal)
        if effort is hf_mrpf.latency.SEARCHING and nominal != 0.05:
            fraction = next(lies, fraction)
        return Timing(fraction, (fraction, fraction), {}, effort.rounds)

    nominal, timing = meet_latency(measure, 0.5, 0.05)
    assert timing.fraction == truth(nominal) == pytest.approx(0.5, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("curve", "reached", "measurements"),
    [
        (lambda size: 0.9, 0.9, 2),  # nothing smaller exists, so nothing more is tried
        (lambda size: 0.2 if size < 0.6 else 0.8, 0.2, 11),
    ],
)
def test_what_cannot_be_met_ends_at_the_nearest(curve, reached, measurements):
    calls = []

    def measure(nominal, effort):
        calls.append(nominal)
        return Timing(curve(nominal), (curve(nominal),) * 2, {}, effort.rounds)

    nominal, timing = meet_latency(measure, 0.45, 0.05)
    assert timing.fraction == reached and calls[-1] == nominal and len(calls) == measurements


def rounds_of(medians: dict[int, float], noise: float, drift: float = 0.5) -> dict[int, list[float]]:
    generator = random.Random(2)
    slow = [1 + drift * generator.random() for _ in range(41)]
    return {
        multiple: [median * here * generator.gauss(1, noise) for here in slow] for multiple, median in medians.items()
    }


def test_the_fastest_multiple_is_taken_and_of_equals_the_smallest():
    assert fastest_multiple(rounds_of({1: 5.0, 8: 4.0, 16: 4.6}, noise=0.02)) == 8
    assert fastest_multiple(rounds_of({1: 5.0, 8: 4.0, 16: 4.0}, noise=0.02)) == 8
    assert fastest_multiple(rounds_of({1: 5.0, 4: 5.0, 32: 5.0}, noise=0.02)) == 1
    # Faster by less than a round tells from the next.
    assert fastest_multiple(rounds_of({1: 5.0, 16: 4.9}, noise=0.1)) == 1
    # Surely faster, and by nothing that counts.
    assert fastest_multiple(rounds_of({1: 5.0, 16: 4.98}, noise=0.001)) == 1
    # A machine whose speed changes by half meanwhile blurs nothing: all of a round are compared.
    assert fastest_multiple(rounds_of({1: 5.0, 16: 4.8}, noise=0.02, drift=1.0)) == 16


def test_the_fraction_is_a_median_over_rounds_and_its_spread_their_quartiles():
    timing = Timing.of([10.0, 20.0, 10.0, 10.0, 40.0], [5.0, 12.0, 7.0, 4.0, 32.0])
    assert timing.fraction == 0.6 and timing.quartiles == (0.5, 0.7) and timing.rounds == 5
    assert timing.milliseconds == {"dense": 10.0, "pruned": 7.0}


# ---- Plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.4, 0.6, 0.85])
def test_a_plan_meets_a_target_of_latency(device, tmp_path, target):
    clock, model = device(by_macs(overhead=0.5)), narrow_resnet()
    before = weights_sha256(model)
    plan = plan_pruning(
        model, EXAMPLE, target=target, target_metric="latency", allocation="uniform", latency_batch_size=5
    )
    assert weights_sha256(model) == before
    dense = clock.milliseconds(model)
    pruned = clock.milliseconds(prune(copy.deepcopy(model), plan))
    assert pruned / dense == pytest.approx(target, rel=TOLERANCE)
    assert plan.achieved["latency"] == plan.latency["fraction"] == pytest.approx(target, rel=TOLERANCE)
    assert plan.achieved["macs"] == plan.after["macs"] / plan.before["macs"] < target
    low, high = plan.latency["quartiles"]
    assert low < plan.latency["fraction"] < high
    assert plan.latency["tried"][-1]["fraction"] == plan.latency["fraction"]
    assert plan.latency["tried"][-1]["macs"] == plan.achieved["macs"]
    assert plan.latency["batch_size"] == 5 and set(clock.batches) == {(5, 3, 32, 32)}
    assert "threads" in plan.latency["device"] and plan.target_metric == "latency" and plan.round_to == 1
    measurements = len(clock.calls)
    loaded = PruningPlan.load(plan.save(tmp_path / "pruning_plan.json"))
    assert loaded == plan and prune(model, loaded) and len(clock.calls) == measurements


def test_a_device_that_gains_nothing_is_reported(device):
    device(lambda model: 4.0, noise=0.0)
    with pytest.raises(
        ValueError,
        match=r"target 0\.5 of the latency cannot be met within 10%: the nearest plan takes 1\.000 of the dense "
        r"model's time \(.* ms; half of the rounds between 1\.000 and 1\.000\) with \d+\.\d% of its MACs, the fewest "
        r"that max_ratio, .* allow, at batch 1 on .*threads\. Raise target, or latency_batch_size",
    ):
        plan_pruning(narrow_resnet(), EXAMPLE, target_metric="latency", allocation="uniform")


def test_a_latency_that_jumps_over_the_target_is_reported(device):
    whole = count_macs(narrow_resnet(), EXAMPLE)
    device(lambda model: 8.0 if count_macs(model, EXAMPLE) > 0.6 * whole else 2.0, noise=0.0)
    with pytest.raises(
        ValueError,
        match=r"nearest plan takes 0\.250 of the dense model's time .* of its MACs, at batch .* Give target 0.25",
    ):
        plan_pruning(narrow_resnet(), EXAMPLE, target=0.4, target_metric="latency", allocation="uniform")


def test_a_latency_of_nothing_removed_is_refused_before_it_is_timed(device):
    clock, model = device(lambda model: 4.0, noise=0.0), narrow_resnet()
    every = [unit.name for unit in pruning_units(model, EXAMPLE)]
    with pytest.raises(ValueError, match="target 0.95 of the latency cannot be met: no unit is left"):
        plan_pruning(model, EXAMPLE, target=0.95, target_metric="latency", allocation="uniform", ignore=every)
    assert not clock.calls


@pytest.mark.parametrize(("blocks", "chosen"), [(1, 1), (4, 4), (8, 8)])
def test_the_multiple_is_that_of_the_device(device, blocks, chosen):
    clock = device(by_padded_channels(blocks))
    plan = plan_pruning(wide_resnet(), EXAMPLE, round_to="auto", allocation="uniform")
    assert plan.round_to == chosen and clock.calls == [6]  # the dense one and five candidates, in one go
    assert all(len(kept) % chosen == 0 for kept in plan.kept.values())
    assert plan.achieved["macs"] == pytest.approx(0.5, rel=0.02)
    table = plan.latency["multiples"]
    assert list(table) == ["1", "4", "8", "16", "32"]
    assert plan.achieved["latency"] == plan.latency["fraction"] == table[str(chosen)]["fraction"]
    assert all(row["macs"] == pytest.approx(0.5, rel=0.03) for row in table.values())
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert plan_pruning(wide_resnet(), EXAMPLE, round_to=chosen, allocation="uniform").kept == plan.kept


def wide_resnet():
    torch.manual_seed(0)
    return PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=32, small_images=True, layers=(1, 1, 1, 1),
        channels=(64, 64, 96, 128),
    )  # fmt: skip


def test_multiples_that_miss_the_size_are_not_compared(device):
    # Less work is less time, so a plan that removes more than it should would win.
    clock = device(by_macs(overhead=0.0), noise=0.0)
    plan = plan_pruning(narrow_resnet(), EXAMPLE, target=0.3, round_to="auto", allocation="uniform", min_channels=1)
    sizes = {int(multiple): row["macs"] for multiple, row in plan.latency["multiples"].items()}
    compared = {int(multiple) for multiple, row in plan.latency["multiples"].items() if "fraction" in row}
    assert compared == {multiple for multiple, size in sizes.items() if abs(size / sizes[1] - 1) <= 0.02}
    assert 1 in compared and 32 not in compared and clock.calls == [1 + len(compared)]


def test_both_at_once_and_of_parameters(device):
    clock = device(by_padded_channels(8), noise=0.002)
    model = wide_resnet()
    plan = plan_pruning(model, EXAMPLE, target=0.6, target_metric="latency", round_to="auto", allocation="uniform")
    assert plan.round_to % 8 == 0 and all(len(kept) % plan.round_to == 0 for kept in plan.kept.values())
    assert plan.latency["multiples"][str(plan.round_to)]["macs"] == pytest.approx(0.6, rel=0.02)
    assert clock.milliseconds(prune(copy.deepcopy(model), plan)) / clock.milliseconds(model) == pytest.approx(
        0.6, rel=0.1
    )
    plan = plan_pruning(model, EXAMPLE, target_metric="params", round_to="auto", allocation="uniform")
    table = plan.latency["multiples"]
    assert plan.achieved["params"] == table[str(plan.round_to)]["params"] == pytest.approx(0.5, rel=0.02)
    assert plan.achieved["latency"] == pytest.approx(min(row.get("fraction", 9) for row in table.values()), rel=0.05)


def test_an_ordinary_plan_measures_nothing(device):
    clock = device(by_macs(overhead=0.0))
    plan = plan_pruning(narrow_resnet(), EXAMPLE, allocation="uniform")
    assert clock.calls == [] and plan.latency is None and set(plan.achieved) == {"macs", "params"}
    older = {key: value for key, value in plan.to_dict().items() if key != "latency"}
    assert PruningPlan.from_dict(older) == plan


def test_the_real_clock_gives_a_plan_too():
    model = narrow_resnet().train()
    plan = plan_pruning(model, EXAMPLE, target=0.4, round_to="auto", allocation="uniform")
    assert model.training and plan.round_to in hf_mrpf.latency.MULTIPLES
    assert 0 < plan.latency["quartiles"][0] <= plan.achieved["latency"] <= plan.latency["quartiles"][1]
    assert plan.latency["rounds"] >= hf_mrpf.latency.DECIDING.rounds
    assert plan.achieved["macs"] == pytest.approx(0.4, rel=0.02)


def test_rounds_go_on_until_the_time_is_spent(monkeypatch):
    def rounds(passes, **options):
        ticks = itertools.chain.from_iterable((start, start + passes) for start in itertools.count())
        monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
        return latency_rounds({"a": nn.Identity(), "b": nn.Identity()}, EXAMPLE, **options)

    assert [len(times) for times in rounds(0.25, rounds=2, seconds=3.0, warmup=1).values()] == [5, 5]
    assert len(rounds(0.25, rounds=9, seconds=3.0, warmup=1)["a"]) == 9
    assert len(rounds(0.25, rounds=2, seconds=3.0, warmup=1, most=4)["a"]) == 4
    assert rounds(0.25, rounds=2)["b"] == [250.0, 250.0]


# ---- What comes after a plan ----------------------------------------------------------------------------------------


def test_lines_logs_and_cards_say_what_was_measured(device):
    device(by_macs(overhead=0.5))
    plan = plan_pruning(narrow_resnet(), EXAMPLE, target=0.6, target_metric="latency", allocation="uniform")
    line = stage_line("pruned", pruning_figures(plan, {"seconds": 1.0, "steps": {}}, plan.before))
    low, high = plan.latency["quartiles"]
    assert f" latency={plan.achieved['latency']:.4f}".rstrip("0") in line
    assert f" latency_quartiles={low:.4f}..{high:.4f} latency_batch_size=1 round_to=1" in line
    info = CardInfo(model_name="m", backbone="resnet", plan=PlanSummary.from_plan(plan))
    card = str(render_card(CardInfo.from_dict(json.loads(json.dumps(info.to_dict())))))
    assert f"{100 * plan.achieved['latency']:.1f} % of the latency" in card
    assert re.search(
        r"median of \d+ forward passes .* at batch 1 in eager PyTorch on .* took 0\.\d+ to 0\.\d+ of", card
    )
    plain = plan_pruning(narrow_resnet(), EXAMPLE, allocation="uniform")
    assert "latency" not in stage_line("pruned", pruning_figures(plain, {"seconds": 1.0, "steps": {}}, plain.before))


def test_latencies_of_rounds_multiply(device, tmp_path):
    device(by_macs(overhead=0.5), noise=0.0)
    model = narrow_resnet()
    first = plan_pruning(model, EXAMPLE, target=0.8, target_metric="latency", allocation="uniform")
    prune(model, first)
    second = plan_pruning(model, EXAMPLE, target=0.75, target_metric="latency", allocation="uniform")
    write_plans([first, second], tmp_path / "pruning_plan.json")
    whole = PruningPlan.load(tmp_path / "pruning_plan.json")
    product = first.achieved["latency"] * second.achieved["latency"]
    for plan in (whole, shown_plan([first, second])):
        assert plan.achieved["latency"] == product and plan.latency is None
        assert plan.target == pytest.approx(0.75 * first.achieved["latency"])
        assert plan.achieved["macs"] == second.after["macs"] / first.before["macs"]


def test_rounds_of_which_one_was_not_timed_aim_at_what_they_keep(device, tmp_path):
    device(by_macs(overhead=0.5), noise=0.0)
    model = narrow_resnet()
    first = plan_pruning(model, EXAMPLE, target=0.8, allocation="uniform")
    prune(model, first)
    second = plan_pruning(model, EXAMPLE, target=0.75, target_metric="latency", allocation="uniform")
    write_plans([first, second], tmp_path / "pruning_plan.json")
    for plan in (PruningPlan.load(tmp_path / "pruning_plan.json"), shown_plan([first, second])):
        kept = second.after["macs"] / first.before["macs"]
        assert (plan.target_metric, plan.target) == ("macs", kept) and plan.achieved.keys() == {"macs", "params"}


QUICK = {
    "eps": 0.1, "num_steps": 1, "calibration_sets": 1, "calibration_set_size": 16, "sensitivity_steps": 1,
    "recalibration_samples": 0, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


class Swap(TrainerCallback):
    """Keeps one channel less of a unit."""

    def on_plan_end(self, args, state, control, *, plan, **kwargs):
        unit = plan.units[0].name
        changed = plan.to_dict()
        changed["kept"][unit] = changed["kept"][unit][:-1]
        return PruningPlan.from_dict(changed)


def test_a_trainer_keeps_the_figure_unless_a_hook_changed_what_is_kept(device, tmp_path):
    device(by_macs(overhead=0.5), noise=0.0)
    data = load_image_data(max_train_samples=64, max_eval_samples=20, image_size=32)
    for callbacks, kept in (([], True), ([Swap()], False)):
        torch.manual_seed(0)
        args = MRPFConfig(
            str(tmp_path / str(kept)),
            target_metric="latency",
            target=0.6,
            round_to="auto",
            latency_batch_size=2,
            **QUICK,
        )
        plan = MRPFTrainer(narrow_resnet(), args, data.train, callbacks=callbacks).prune()
        assert ("latency" in plan.achieved, plan.latency is not None) == (kept, kept)
        if kept:
            assert plan.achieved["latency"] == pytest.approx(0.6, rel=TOLERANCE) and plan.latency["batch_size"] == 2


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("8", 8)])
def test_the_command_line_takes_a_number_or_auto(text, value):
    (args,) = GroupedParser([MRPFConfig]).parse_args_into_dataclasses(
        ["--output_dir", "never", "--use_cpu", "--round_to", text, "--target_metric", "latency"]
    )
    assert args.round_to == value and args.target_metric == "latency"


def test_the_command_line_refuses_other_words(capsys):
    with pytest.raises(SystemExit):
        GroupedParser([MRPFConfig]).parse_args(["--output_dir", "never", "--round_to", "best"])
    assert "'best' is no whole number; write 8, or auto" in capsys.readouterr().err


def planned_together(model):
    """Each process has a clock of its own, and the second one's is wrong."""
    import torch.distributed as dist

    clock = FakeDevice(by_macs(overhead=0.5 + 100 * dist.get_rank()))
    hf_mrpf.latency.latency_rounds = clock
    options = {"allocation": "uniform", "target": 0.6, "target_metric": "latency", "round_to": "auto"}
    return plan_pruning(model, EXAMPLE, distributed=True, **options), len(clock.calls)


@pytest.mark.slow
def test_of_two_processes_the_first_measures_and_both_get_its_plan():
    (one, calls), (two, none) = on_processes(2, planned_together, narrow_resnet())
    assert one == two and calls > 2 and none == 0


TINY = [
    *("--backbone_kwargs", json.dumps({"layers": [1, 1, 1, 1], "channels": [16, 16, 24, 24]}), "--use_cpu"),
    *("--max_train_samples", "64", "--max_eval_samples", "20", "--base_epochs", "1", "--num_train_epochs", "1"),
    *("--control_epochs", "0", "--num_steps", "1", "--eval_num_steps", "1", "--sensitivity_steps", "1"),
    *("--calibration_sets", "1", "--calibration_set_size", "16", "--recalibration_samples", "32", "--eps", "1/255"),
    *("--disable_tqdm", "True", "--target_metric", "latency", "--target", "0.7", "--round_to", "auto"),
]


@pytest.mark.slow
def test_a_run_that_was_stopped_after_measuring_does_not_measure_again(device, monkeypatch, tmp_path, capsys):
    clock = device(lambda model: 0.5 + count_macs(model, torch.zeros(1, 3, 16, 16)) / 1e6)
    monkeypatch.setattr(sys, "argv", ["recipes/prune.py", "--output_dir", str(tmp_path / "run"), *TINY])

    def run(stopped_at: str) -> None:
        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stopped_at, stop)
            runpy.run_path(str(REPOSITORY / "recipes" / "prune.py"), run_name="recipe")["main"]()

    run("hf_mrpf.trainer.prune")
    stage, calls = tmp_path / "run" / "stages" / "pruned", len(clock.calls)
    plan = PruningPlan.load(stage / "measured_plan.json")
    assert calls > 4  # before any training, and for the plan
    run("hf_mrpf.evaluation.evaluate_robustness")
    applied = PruningPlan.load(stage / "pruning_plan.json")
    assert applied.kept == plan.kept and applied.latency == plan.latency
    assert applied.achieved["latency"] == pytest.approx(0.7, rel=TOLERANCE)
    said = capsys.readouterr().out
    assert re.search(r"^\[pruned\] .* latency=0\.\d+ latency_quartiles=0\.\d+\.\.0\.\d+ .*round_to=\d+", said, re.M)
    run("hf_mrpf.evaluation.evaluate_robustness")
    assert len(clock.calls) == calls

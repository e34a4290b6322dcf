"""Pruning in rounds: what each aims at, what they keep of the dense model, and the recipe that runs them."""

import contextlib
import copy
import io
import json
import runpy
import shutil
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from pruning_reference import narrow_resnet, randomise
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_mrpf import (
    MRPFConfig,
    MRPFTrainer,
    PrunedForImageClassification,
    PruningPlan,
    load_image_data,
    plan_pruning,
    prune,
)
from hf_mrpf.attacks import logits_of
from hf_mrpf.cli import RoundArguments
from hf_mrpf.fingerprint import weights_sha256
from hf_mrpf.hub import plan_summary, write_plans
from hf_mrpf.model_card import CardInfo, PlanSummary, render_card
from hf_mrpf.rounds import compose_kept, fraction_after, round_cells, round_rows, round_target, stage_names

SIZE = 32
REPOSITORY = Path(__file__).resolve().parent.parent
NETWORK = {"layers": [1, 1, 1, 1], "channels": [16, 16, 24, 24], "stem_type": "deep", "stem_width": 8}
TINY = [
    *("--backbone_kwargs", json.dumps(NETWORK), "--max_train_samples", "64", "--max_eval_samples", "20", "--use_cpu"),
    *("--base_epochs", "1", "--num_train_epochs", "2", "--control_epochs", "0", "--num_steps", "1", "--optim", "adam"),
    *("--calibration_sets", "2", "--calibration_set_size", "16", "--sensitivity_steps", "1", "--eval_num_steps", "1"),
    *("--recalibration_samples", "32", "--disable_tqdm", "True", "--eps", "0.1"),
    *("--pruning_rounds", "2", "--recovery_epochs", "1"),
]


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


@pytest.mark.slow
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


def test_the_card_tells_the_rounds_and_what_they_left_in_all(monkeypatch):
    first, second = plans = one_after_another(narrow_resnet(), (0.8, 0.8))
    summary = PlanSummary.from_plan(PruningPlan.of_rounds(plans), rounds=2)
    assert summary.achieved["macs"] == second.after["macs"] / first.before["macs"]
    assert summary.target == pytest.approx(0.8 * first.achieved["macs"])
    assert [unit["width"] for unit in summary.units] == [unit.width for unit in first.units]
    figures = [{"pruned": {"accuracy": 0.5, "robust_accuracy": 0.25}}, {"pruned": {"accuracy": 0.4}}]
    heading, one, two = round_cells(round_rows(plans, figures))
    assert heading == ["round", "MACs", "parameters", "pruned: clean", "pruned: robust"]
    assert one[0] == "1" and one[3:] == ["50.0 %", "25.0 %"] and two[3:] == ["40.0 %", ""]
    assert two[1] == f"{second.after['macs']:,} ({100 * second.after['macs'] / first.before['macs']:.1f} %)"
    info = CardInfo("own", "timm/resnet18", plan=plan_summary(plans), rounds=round_rows(plans, figures))
    card, without = (render_card(each).text for each in (info, replace(info, rounds=round_rows(plans))))
    shares = "Each round, with shares of the model that the first one began with"
    assert f"{shares} and accuracies on the validation split:" in card and f"{shares}:" in without
    assert "below are those of the first round, what was removed is of all" in card
    monkeypatch.setattr("hf_mrpf.hub.whole_plan", lambda plans: None)
    card = render_card(replace(info, plan=plan_summary(plans))).text
    assert "below are those of the last round, and what it removed" in card


# ---- By hand, with a trainer --------------------------------------------------------------------------------------


@dataclass
class Watch(TrainerCallback):
    """Notes the pruning events and, at the begin of each training, what it trains with."""

    events: list = field(default_factory=list)
    trainings: list = field(default_factory=list)

    def on_sensitivity_end(self, args, state, control, *, sensitivity, **kwargs):
        self.events.append("sensitivity")

    def on_plan_end(self, args, state, control, *, plan, **kwargs):
        self.events.append("plan")

    def on_prune_end(self, args, state, control, *, plan, **kwargs):
        self.events.append("prune")

    def on_train_begin(self, args, state, control, *, optimizer, lr_scheduler, model, **kwargs):
        tensors = {id(p) for group in optimizer.param_groups for p in group["params"]}
        live = {id(p) for p in model.parameters()}
        begun = (optimizer, tensors == live, lr_scheduler.get_last_lr()[0], state.global_step, len(optimizer.state))
        self.trainings.append(begun)


def test_a_trainer_prunes_and_trains_again_with_optimizer_schedule_and_checkpoints_of_each_round(tmp_path):
    data = load_image_data(max_train_samples=64, max_eval_samples=20)
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, **NETWORK
    )
    args = MRPFConfig(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, eps=0.1, num_steps=1, eval_num_steps=1,
        calibration_sets=2, calibration_set_size=16, sensitivity_steps=1, recalibration_samples=32, max_steps=3,
        per_device_train_batch_size=32, save_strategy="steps", save_steps=1, save_total_limit=1, warmup_steps=0,
    )  # fmt: skip
    watch = Watch()
    trainer = MRPFTrainer(model, args, data.train, data.validation, callbacks=[watch])
    trainer.train()
    dense = sum(p.numel() for p in trainer.model.parameters())
    sizes = [dense]
    for number in (1, 2):
        trainer.args.output_dir, trainer.args.target = str(tmp_path / f"round-{number}"), 0.7
        trainer.prune()
        trainer.train()
        sizes.append(sum(p.numel() for p in trainer.model.parameters()))
        (checkpoint,) = (tmp_path / f"round-{number}").glob("checkpoint-*")
        assert checkpoint.name == "checkpoint-3"
        saved = PrunedForImageClassification.from_pretrained(checkpoint)
        assert sum(p.numel() for p in saved.parameters()) == sizes[-1]
        assert trainer.lr_scheduler.last_epoch == 3 and trainer.state.global_step == 3
    assert watch.events == ["sensitivity", "plan", "prune"] * 2
    assert len({id(optimizer) for optimizer, *_ in watch.trainings}) == 3
    assert [begun[1:] for begun in watch.trainings] == [(True, args.learning_rate, 0, 0)] * 3
    assert sizes[0] > sizes[1] > sizes[2]
    assert [plan.after["params"] for plan in trainer.plans] == sizes[1:]
    assert (tmp_path / "checkpoint-3").is_dir()  # the dense model's is left alone
    assert PruningPlan.of_rounds(trainer.plans).achieved["params"] == sizes[2] / sizes[0]


# ---- The recipe ---------------------------------------------------------------------------------------------------


@dataclass
class Rounds:
    folder: Path
    output: str
    trainings: list  # (output_dir, optimizer, steps of the schedule, steps wanted)
    events: list

    def plan(self, stage: str) -> PruningPlan:
        return PruningPlan.load(self.folder / "stages" / stage / "pruning_plan.json")

    def model(self, stage: str) -> PrunedForImageClassification:
        return PrunedForImageClassification.from_pretrained(self.folder / "stages" / stage / "model")

    def report(self) -> dict:
        return json.loads((self.folder / "robustness_report.json").read_text())


def run_recipe(folder: Path, *options: str) -> Rounds:
    """recipes/prune.py in this process, with a note of every training and every pruning event."""
    trainings, events = [], []
    train, fire = MRPFTrainer.train, MRPFTrainer._fire

    def noted_train(self, *args, **kwargs):
        output = train(self, *args, **kwargs)
        steps = (self.lr_scheduler.last_epoch, self.state.max_steps)
        trainings.append((Path(self.args.output_dir), self.optimizer, *steps))
        return output

    def noted_fire(self, event, **payload):
        events.append(event)
        return fire(self, event, **payload)

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(MRPFTrainer, "train", noted_train)
        patch.setattr(MRPFTrainer, "_fire", noted_fire)
        patch.setattr(sys, "argv", ["recipes/prune.py", "--output_dir", str(folder), *TINY, *options])
        runpy.run_path(str(REPOSITORY / "recipes" / "prune.py"), run_name="recipe")["main"]()
    return Rounds(folder, output.getvalue(), trainings, events)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    return run_recipe(tmp_path_factory.mktemp("rounds") / "digits")


def test_each_round_has_stages_trainer_optimizer_schedule_and_events_of_its_own(rounds):
    stages = rounds.folder / "stages"
    names = ["dense", "recovered-1", "fine-tuned"]
    assert [folder for folder, *_ in rounds.trainings] == [stages / name / "training" for name in names]
    assert len({id(optimizer) for _, optimizer, *_ in rounds.trainings}) == 3
    assert [steps for *_, steps in rounds.trainings] == [2, 2, 4]
    assert all(scheduled == steps for *_, scheduled, steps in rounds.trainings)
    assert rounds.events == ["on_sensitivity_end", "on_plan_end", "on_prune_end"] * 2
    lines = [line.split("]")[0][1:] for line in rounds.output.splitlines() if line.startswith("[")]
    wanted = ["data", "rounds", "dense", "pruned-1", "recovered-1", "pruned", "fine-tuned", "evaluation"]
    assert list(dict.fromkeys(lines)) == wanted
    assert "[rounds] rounds=2 macs=0.7071,0.5000 max_ratio=" in rounds.output


def test_every_round_is_planned_on_the_model_that_the_one_before_left_and_trained(rounds):
    first, second = rounds.plan("pruned-1"), rounds.plan("pruned")
    assert first.weights_sha256 == weights_sha256(rounds.model("dense"))
    assert second.weights_sha256 == weights_sha256(rounds.model("recovered-1"))
    assert second.before == first.after
    assert first.module_scores.keys() == second.module_scores.keys()
    assert all(first.module_scores[name] != score for name, score in second.module_scores.items() if score)


def test_the_target_is_met_within_one_percent_of_the_dense_model(rounds):
    first, second = rounds.plan("pruned-1"), rounds.plan("pruned")
    dense = first.before["macs"]
    assert first.target == pytest.approx(0.5**0.5)
    assert second.target == pytest.approx(0.5 * dense / first.after["macs"])
    assert second.after["macs"] / dense == pytest.approx(0.5, rel=0.01)
    table = rounds.report()["table"]
    assert [row["macs"] for row in table] == [dense, second.after["macs"], second.after["macs"]]


def test_the_plan_of_the_result_leaves_of_the_dense_model_what_the_rounds_left(rounds):
    plan = PruningPlan.load(rounds.folder / "pruning_plan.json")
    content = json.loads((rounds.folder / "pruning_plan.json").read_text())
    assert [PruningPlan.from_dict(one) for one in content["rounds"]] == [rounds.plan("pruned-1"), rounds.plan("pruned")]
    pruned = prune(rounds.model("dense"), plan)
    final = load_file(rounds.folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in pruned.state_dict().items()} == {
        name: tensor.shape for name, tensor in final.items()
    }
    assert plan.target == pytest.approx(0.5) and plan.scores == rounds.plan("pruned-1").scores


def test_report_and_card_hold_every_round(rounds):
    stages = rounds.report()["stages"]
    assert list(stages) == ["dense", "pruned-1", "recovered-1", "pruned", "fine-tuned"]
    assert stages["recovered-1"]["epochs"] == 1
    info = json.loads((rounds.folder / "stages" / "card.json").read_text())
    assert (info["plan"]["rounds"], info["recovery"]) == (2, "1 epoch of `trades`")
    assert info["rounds"][0]["figures"]["pruned"] == stages["pruned-1"]["steps"]["recalibrated"]
    assert info["rounds"][0]["figures"]["trained"]["accuracy"] == stages["recovered-1"]["best"]["eval_accuracy"]
    assert (
        info["rounds"][1]["kept"]["macs"]
        == rounds.plan("pruned").after["macs"] / rounds.plan("pruned-1").before["macs"]
    )
    text = ModelCard.load(rounds.folder / "README.md").content
    assert "2 rounds." in text and "Sensitivities were measured again before each round. After each round but" in text
    assert "but the last came 1 epoch of `trades`. Channels and MRS below" in text
    cells = " | ".join(round_cells(info["rounds"])[2])
    assert f"| {cells} |" in text
    assert (rounds.folder / "mrs.png").stat().st_size > 10_000


def test_the_card_tells_the_recovery_that_was_and_no_sensitivities_that_were_not(tmp_path):
    few = run_recipe(tmp_path / "few", "--max_steps", "1", "--allocation", "uniform")
    assert "on_sensitivity_end" not in few.events
    assert few.report()["stages"]["recovered-1"]["steps"] == 1
    text = ModelCard.load(few.folder / "README.md").content
    assert "- After each round but the last came 1 step of `trades`. Channels below are those of the first" in text
    assert "Sensitivities were" not in text


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_its_round(rounds, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(rounds.folder, folder)
    for stage in ("pruned", "fine-tuned"):
        shutil.rmtree(folder / "stages" / stage)
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | {"finished": False}))
    again = run_recipe(folder)
    kept = [line.partition("]")[0] for line in again.output.splitlines() if "] kept from before" in line]
    assert kept == ["[dense", "[pruned-1", "[recovered-1"]
    assert again.plan("pruned") == rounds.plan("pruned")
    first, second = (load_file(path / "model.safetensors") for path in (rounds.folder, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- Options ------------------------------------------------------------------------------------------------------


def test_options_of_rounds_are_checked_and_none_is_ignored():
    assert RoundArguments() == RoundArguments(1, None)
    assert RoundArguments(3).recovery_epochs == 5.0
    assert RoundArguments(2, 0.0).recovery_epochs == 0.0
    for values, message in (
        ((0,), "--pruning_rounds 0 must be at least 1"),
        ((1, 2.0), "--recovery_epochs 2 is about the time between rounds, and there is one round"),
        ((2, -1.0), "--recovery_epochs -1.0 must be a number of epochs, at least 0"),
        ((2, float("nan")), "--recovery_epochs nan must be"),
    ):
        with pytest.raises(ValueError, match=message):
            RoundArguments(*values)


def refuse_unreachable(**settings):
    """The recipe's early check of a narrow network, on its own."""
    names = runpy.run_path(str(REPOSITORY / "recipes" / "prune.py"), run_name="recipe")
    data = load_image_data(max_train_samples=64, max_eval_samples=20)
    torch.manual_seed(0)
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, **NETWORK
    )
    rounds = settings.pop("rounds")
    quick = {"calibration_sets": 1, "calibration_set_size": 8, "report_to": "none", "use_cpu": True}
    before = copy.deepcopy(model.state_dict())
    names["refuse_unreachable"](model, data, RoundArguments(rounds), MRPFConfig("never", **quick, **settings))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_no_round_could_meet_is_refused_before_any_training(capsys):
    # One round may take half of a unit, so a tenth of the cost is out of reach; four rounds may each take that.
    with pytest.raises(ValueError, match="target 0.1 cannot be met"):
        refuse_unreachable(rounds=1, target=0.1, max_ratio=0.5, min_channels=1)
    refuse_unreachable(rounds=4, target=0.1, max_ratio=0.5, min_channels=1)
    said = capsys.readouterr().out
    assert "[rounds] rounds=4 macs=0.5623,0.3162,0.1778,0.1000 max_ratio=" in said
    assert "max_ratio=0.5 " in said
    with pytest.raises(
        ValueError, match=r"round \d of 2 \(\d+.\d% of what the one before leaves\): target .* cannot be met"
    ):
        refuse_unreachable(rounds=2, target=0.05, min_channels=8)

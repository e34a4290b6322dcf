"""
Prunes a robust image classifier and fine-tunes it adversarially.

    accelerate launch recipes/prune.py

runs the whole story on the handwritten digits that scikit-learn ships: a small ResNet is trained by TRADES, scored by
Module Robustness Sensitivity, pruned to half of its multiply-accumulates, fine-tuned, and measured under attack beside
its parent. The result is a folder that `AutoModelForImageClassification.from_pretrained` loads. On CIFAR-10:

    accelerate launch recipes/prune.py --dataset_name uoft-cs/cifar10 --model_name_or_path timm/resnet18 --small_images
"""

import copy
import dataclasses
import itertools
import json
import time
from importlib.util import find_spec
from pathlib import Path

from hf_mrpf.config import MRPFConfig
from hf_mrpf.console import errors_told
from hf_mrpf.recipe_options import parse_recipe


def parse_arguments():
    return parse_recipe(
        "prune",
        usage="accelerate launch recipes/prune.py [options]",
        description=__doc__.split("\n\n")[0],
    )


ARGUMENTS = None
if __name__ == "__main__":
    # What is wrong with the command line shows now, before the imports below, which take seconds.
    with errors_told():
        ARGUMENTS = parse_arguments()

# ruff: noqa: E402
import torch
from transformers import TrainerCallback

from hf_mrpf import PrunedForImageClassification, PruningPlan, RobustnessReport
from hf_mrpf.cli import ModelArguments, RoundArguments, run_settings
from hf_mrpf.console import announce, quieten, report_errors, say, show
from hf_mrpf.data import ImageData, calibration_batches
from hf_mrpf.delivery import check_repository_id, push_result, repository, shown_again
from hf_mrpf.efficiency import count_macs, count_parameters, device_name, file_size, measure_latency
from hf_mrpf.evaluation import evaluate_robustness
from hf_mrpf.figures import plot_sensitivity
from hf_mrpf.fingerprint import weights_sha256
from hf_mrpf.hub import SETTINGS, plan_summary, shown_plan, write_plans
from hf_mrpf.interruption import repeatable_command, resumable
from hf_mrpf.launch import check_world_size
from hf_mrpf.logs import end_of_run
from hf_mrpf.measured_allocation import MEASURED
from hf_mrpf.model_card import CardInfo, render_card
from hf_mrpf.named_attacks import QUICK
from hf_mrpf.objectives import dense_objective
from hf_mrpf.progress import shows_progress
from hf_mrpf.pruning import plan_pruning, prune
from hf_mrpf.report import paired_difference
from hf_mrpf.results import ResultRow, results_table
from hf_mrpf.rounds import fraction_after, round_rows, round_target, share_left, stage_names
from hf_mrpf.run_folder import RunFolder, remove_folder, write_json
from hf_mrpf.stage_lines import evaluation_figures, pruning_figures, stage_line, training_figures
from hf_mrpf.stages import (
    check_forced_place,
    dense_stage,
    finish,
    finished_model,
    make_trainer,
    run_folder,
    settle_augmentation,
    stage_arguments,
    tell,
    train,
    trained_stage,
)
from hf_mrpf.starting_point import (
    build_model,
    check_default_data,
    check_outlives_overwriting,
    load_data,
    starting_config,
)

# Of a stage whose plan hangs on measured times or losses, from when it is planned.
MEASURED_PLAN = "measured_plan.json"
LONGER = (
    "The fine-tuned model was trained for longer than the dense one, so that the difference is not the pruning's alone."
)


def main() -> None:
    data_args, model_args, round_args, run_args, args = ARGUMENTS or parse_arguments()
    check_world_size(args.world_size, run_args.expected_world_size)
    announce(args)
    quieten()
    settings = run_settings(data_args, model_args, round_args, args)
    run = run_folder(settings, args, overwrite=run_args.overwrite_output_dir)
    run.check()
    if shown_again(run, run_args, args):
        return

    check_outlives_overwriting(model_args.model_name_or_path, args.output_dir, run_args.overwrite_output_dir)
    check_forced_place(run, args)
    check_repository_id(args)
    if find_spec("matplotlib") is None:
        raise ImportError("The picture of the pruning plan needs matplotlib: pip install hf-mrpf[plots].")
    start = starting_config(model_args)
    check_default_data(model_args.model_name_or_path, start, data_args)
    with args.main_process_first(desc="decoding of images"):  # the others find them in the cache
        data = load_data(data_args, model_args.image_size or (start and start.image_size))
    settle_augmentation(data, args)
    torch.manual_seed(args.seed)
    model = build_model(model_args, data).to(args.device)
    first_stage, _ = stage_names(round_args.pruning_rounds)[0]
    if run_args.overwrite_output_dir or not (run.stage(first_stage) / MEASURED_PLAN).is_file():
        refuse_unreachable(model, data, round_args, args)
    if args.push_to_hub:
        # The id in full is on the card; a token or a name that cannot work shows before any training.
        args.hub_model_id = repository(args)

    with run:
        dense = dense_stage(run, model, data, model_args, args)
        control = control_stage(run, model.config, data, model_args, args)
        pruned, plans = pruning_rounds(run, dense, data, round_args, args)
        finetuned = trained_stage(run, "fine-tuned", pruned, data, args, after="pruned", teacher=dense)
        models = {"dense": dense, "pruned": pruned, "fine-tuned": finetuned}
        reports = test_reports(run, models | ({"control": control} if control else {}), data, args)
        if args.process_index == 0:
            rows = result_rows(run, models, reports, args)
            write_result(run, finetuned, plans, reports, rows, data, round_args, run_args, args)
            run.finish()
            push_result(run, args)
        args.distributed_state.wait_for_everyone()


def refuse_unreachable(
    model: PrunedForImageClassification, data: ImageData, round_args: RoundArguments, args: MRPFConfig
) -> None:
    """Everything the pruning stages could refuse, before hours of training rather than after."""
    calibration_batches(data.train, args.calibration_sets, args.calibration_set_size, seed=args.seed)
    example = torch.zeros(1, 3, data.image_size, data.image_size, device=args.device)
    limits = {name: getattr(args, name) for name in ("max_ratio", "min_channels", "round_to", "latency_batch_size")}
    rounds, metric = round_args.pruning_rounds, args.target_metric
    if args.round_to == "auto" and metric != "latency":
        limits["round_to"] = 1  # which multiple is fastest changes nothing: this one is always among the candidates
    trial, kept = copy.deepcopy(model) if rounds > 1 else model, [1.0]
    for number in range(1, rounds + 1):
        target = round_target(args.target, number, rounds, kept[-1])
        try:
            plan = plan_pruning(
                trial, example, target=target, target_metric=metric, allocation="uniform",
                ignore=tuple(args.ignore), heads=args.prune_heads, distributed=args.world_size > 1, **limits,
            )  # fmt: skip
        except ValueError as error:
            which = f"round {number} of {rounds} ({target:.1%} of what the one before leaves): " if rounds > 1 else ""
            raise ValueError(f"{which}{error}") from error
        kept.append(kept[-1] * plan.achieved[metric])
        if rounds > 1:
            prune(trial, plan)
    if rounds > 1:
        steps = ",".join(f"{fraction_after(args.target, number, rounds):.4f}" for number in range(1, rounds + 1))
        figures = {"rounds": rounds, metric: steps, "max_ratio": args.max_ratio}
        say(args, stage_line("rounds", figures | {"recovery_epochs": round_args.recovery_epochs}))


def control_stage(run: RunFolder, config, data: ImageData, model_args: ModelArguments, args: MRPFConfig):
    """The same network, from fresh weights, trained without any attack: at a fair eps it must fail under attack."""
    if not model_args.control_epochs:
        return None
    if finished := finished_model(run, "control", args):
        return finished
    torch.manual_seed(args.seed)
    model = PrunedForImageClassification(config).to(args.device)
    changes = {"objective": "standard", "awp_gamma": None, "num_train_epochs": model_args.control_epochs}
    changes |= {"load_best_model_at_end": False, "eval_strategy": "no"}
    model, result = train(run, "control", model, data, args, **changes)
    result["figures"] = training_figures("standard", result)
    model = finish(run, "control", model, result, args)
    tell("control", result, args)
    return model


def pruning_rounds(run: RunFolder, dense, data: ImageData, round_args: RoundArguments, args: MRPFConfig):
    """Round after round, each on sensitivities of its own, with recovery between them; the one-shot run has one."""
    model, plans, kept, dense_size = dense, [], 1.0, None
    for number, (stage, recovery) in enumerate(stage_names(round_args.pruning_rounds), start=1):
        target = round_target(args.target, number, round_args.pruning_rounds, kept)
        model, plan = pruned_stage(run, stage, model, data, dataclasses.replace(args, target=target), dense_size)
        plans.append(plan)
        dense_size = plans[0].before
        kept = share_left(plans, args.target_metric)
        if number < round_args.pruning_rounds:
            model = trained_stage(
                run, recovery, model, data, args, round_args.recovery_epochs, after=stage, teacher=dense
            )
    return model, plans


def pruned_stage(
    run: RunFolder, stage: str, model, data: ImageData, args: MRPFConfig, dense: dict[str, int] | None = None
):
    """Sensitivities, plan, removal, repair, BatchNorm recalibration; `dense` is what the first round began with."""
    plan_file = run.stage(stage) / "pruning_plan.json"
    if finished := finished_model(run, stage, args):
        return finished, PruningPlan.load(plan_file)
    start = time.perf_counter()
    trainer = make_trainer(copy.deepcopy(model), data, stage_arguments(run, stage, args))
    plan = trainer.prune(measured_before(run, stage, model, trainer))
    end_of_run(args)
    result = {"seconds": round(time.perf_counter() - start, 1), "steps": trainer.pruning_report}
    result["figures"] = pruning_figures(plan, result, dense or plan.before)
    if trainer.repair_report is not None:
        result["repair"] = dataclasses.asdict(trainer.repair_report)
        for layer, reason in trainer.repair_report.left.items():
            say(args, stage_line(stage, {"layer": layer, "reason": reason}, "not repaired"))
    if args.process_index == 0:
        plan_file.parent.mkdir(parents=True, exist_ok=True)
        plan.save(plan_file)
    model = finish(run, stage, trainer.model, result, args)
    tell(stage, result, args)
    return model, plan


def measured_before(run: RunFolder, stage: str, model, trainer) -> PruningPlan | None:
    """The plan that an interrupted pruning had found by measurement; a new one is kept as soon as it is made."""
    file = run.stage(stage) / MEASURED_PLAN
    trainer.add_callback(KeepMeasuredPlan(file))
    plan = PruningPlan.load(file) if file.is_file() else None
    # A stage before this one may have been done again.
    return plan if plan is not None and plan.weights_sha256 == weights_sha256(model) else None


class KeepMeasuredPlan(TrainerCallback):
    """Writes a plan that hangs on measured times, which would differ the second time, or on a search that took long."""

    def __init__(self, file: Path):
        self.file = file

    def on_plan_end(self, args, state, control, *, plan, **kwargs):
        if (plan.latency is not None or plan.allocation in MEASURED) and args.process_index == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, plan.to_dict())


def test_reports(run: RunFolder, models: dict, data: ImageData, args: MRPFConfig) -> dict[str, RobustnessReport]:
    """The only place that reads the test split, after every choice has been made."""
    start = time.perf_counter()
    reports = {
        name: evaluate_robustness(
            model, data.test, QUICK, args.attack, seed=args.seed, batch_size=args.per_device_eval_batch_size,
            data_name=data.name, progress=shows_progress(args), distributed=args.world_size > 1,
            journal=run.stage("evaluation") / f"{name}.jsonl",
        )
        for name, model in models.items()
    }  # fmt: skip
    change = paired_difference(reports["fine-tuned"], reports["dense"], "pgd20")
    seconds = round(time.perf_counter() - start, 1)
    result = {
        "seconds": seconds,
        "models": [evaluation_figures(name, report) for name, report in reports.items()],
        "figures": {
            "seconds": seconds,
            "fine_tuned_minus_dense_pgd20": change.difference,
            "at_least": change.interval[0],
            "at_most": change.interval[1],
        },
    }
    run.finish_stage("evaluation", result)
    for figures in result["models"]:
        say(args, stage_line("evaluation", figures))
    tell("evaluation", result, args)
    return reports


def result_rows(run: RunFolder, models: dict, reports: dict, args: MRPFConfig) -> list[ResultRow]:
    """One row of the final table for each of the three stages."""
    size = models["dense"].config.image_size
    example = torch.zeros(1, 3, size, size, device=args.device)
    latency = {batch: measure_latency(models, size, batch) for batch in (1, 64)}
    return [
        ResultRow.from_report(
            name,
            reports[name],
            parameters=count_parameters(model),
            macs=count_macs(model, example),
            file_size=file_size(run.stage(name) / "model"),
            latency={str(batch): times[name] for batch, times in latency.items()},
        )
        for name, model in models.items()
    ]


def write_result(
    run: RunFolder, model, plans, reports, rows, data: ImageData, round_args: RoundArguments, run_args, args
) -> None:
    """Writes everything into a draft, then moves it into the output folder at once."""
    draft = run.stage("result")
    remove_folder(draft)
    model.save_pretrained(draft)
    write_plans(plans, draft / "pruning_plan.json")
    plot_sensitivity(shown_plan(plans), draft / "mrs.png")
    rounds = stage_names(round_args.pruning_rounds)
    stages = {name: run.stage_result(name) for name in ("dense", *itertools.chain.from_iterable(rounds))}
    change = paired_difference(reports["fine-tuned"], reports["dense"], "pgd20")
    report = reports["fine-tuned"].to_dict() | {
        "table": [dataclasses.asdict(row) for row in rows],
        "models": {name: other.to_dict() for name, other in reports.items() if name != "fine-tuned"},
        "fine_tuned_minus_dense_pgd20": dataclasses.asdict(change),
        "stages": stages,
        "data": data.description,
    }
    write_json(draft / "robustness_report.json", report)
    info = card_info(model, plans, reports, rows, stages, data, args)
    if len(plans) > 1:
        recovery = recovery_text(stages[rounds[0][1]], args)
        figures = [round_figures(stages[pruned], stages[after], args) for pruned, after in rounds]
        info = dataclasses.replace(info, rounds=round_rows(plans, figures), recovery=recovery)
    if run_args.card_note:
        info = dataclasses.replace(info, notes=[*info.notes, run_args.card_note])
    write_json(run.stage("card.json"), info.to_dict())  # what the card can be rendered from again
    render_card(info).save(draft / "README.md")
    run.publish(draft)
    show(args, results_table(rows))
    show(args, f"result in {run.path}")


def recovery_text(recovered: dict, args: MRPFConfig) -> str | None:
    """The training that a round was followed by, as long as it was; None where there was none."""
    if not recovered.get("steps"):
        return None
    count, unit = (recovered["steps"], "step") if args.max_steps > 0 else (recovered["epochs"], "epoch")
    return f"{count:g} {unit}{'' if count == 1 else 's'} of `{args.objective}`"


def round_figures(pruned: dict, after: dict, args: MRPFConfig) -> dict[str, dict[str, float]]:
    """Accuracies on the validation split after the pruning of a round, and after the training that followed."""
    figures = {"pruned": list(pruned["steps"].values())[-1]} if pruned["steps"] else {}
    if chosen := after.get("best" if args.load_best_model_at_end else "last"):
        names = ("accuracy", "robust_accuracy")  # neither is there with --prediction_loss_only
        figures["trained"] = {name: chosen[f"eval_{name}"] for name in names if f"eval_{name}" in chosen}
    return figures


def card_info(model, plans, reports, rows, stages, data: ImageData, args: MRPFConfig) -> CardInfo:
    """Everything the model card of the result says."""
    values = args.to_dict() | {"processes": args.world_size}
    settings = {name: str(values[name]) for name in SETTINGS if values[name] is not None}
    if dense_objective(args.objective) != args.objective:
        settings |= {"objective of the dense model": dense_objective(args.objective)}
    epochs = {stage: stages[stage]["epochs"] or "0, taken as it is" for stage in ("dense", "fine-tuned")}
    settings |= {f"epochs of the {stage} model": number for stage, number in epochs.items()}
    settings |= {
        f"time of the {stage} stage": f"{result['seconds']:,} s"
        for stage, result in stages.items()
        if "seconds" in result and not result.get("resumed_from")  # else those before the interruption are not known
    }
    settings |= {"device": device_name(args.device)}
    settings |= {"dense model started from": stages["dense"].get("start", "fresh weights")}
    settings |= {"backbone arguments": json.dumps(model.config.backbone.get("kwargs", {}))}
    control = reports.get("control")
    change = paired_difference(reports["fine-tuned"], reports["dense"], "pgd20")
    return CardInfo(
        model_name=args.hub_model_id.split("/")[-1] if args.hub_model_id else Path(args.output_dir).absolute().name,
        repo_id=args.hub_model_id,
        base_model=stages["dense"].get("base_model"),
        backbone=model.config.backbone.get("name") or model.config.backbone["config"]["model_type"],
        image_size=model.config.image_size,
        class_names=data.class_names,
        dataset_id=data.name,
        dataset_config=data.description["dataset_config_name"],
        dataset_split=data.description["splits"]["test"]["from"],
        dataset_on_hub="/" in data.name,
        rows=rows,
        control=ResultRow.from_report("the same network, ordinary training", control) if control else None,
        plan=plan_summary(plans),
        pruning_steps=stages["pruned"]["steps"],
        selection={key: stages["fine-tuned"][key] for key in ("best", "last") if key in stages["fine-tuned"]},
        training=settings,
        figure="mrs.png",
        notes=[
            "This run read the test split once, after every choice of its own had been made on the validation split.",
            f"Fine-tuned minus dense under PGD-20, image by image: {100 * change.difference:+.1f} points, "
            f"95 % interval [{100 * change.interval[0]:+.1f}, {100 * change.interval[1]:+.1f}].",
            *([LONGER] if any(stages[name].get("epochs") for name in stages.keys() - {"dense", "control"}) else []),
        ],
        versions=reports["fine-tuned"].versions,
        seed=args.seed,
        command=repeatable_command(),
    )


if __name__ == "__main__":
    report_errors(resumable(main))

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
import json
import shlex
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub.utils import validate_repo_id

from hf_mrpf import MRPFConfig, PrunedForImageClassification, PruningPlan, RobustnessReport
from hf_mrpf.cli import (
    DataArguments,
    GroupedParser,
    ModelArguments,
    RunArguments,
    build_model,
    load_data,
    own_config,
    run_settings,
)
from hf_mrpf.console import announce, quieten, report_errors, say
from hf_mrpf.data import ImageData, calibration_batches
from hf_mrpf.efficiency import count_macs, count_parameters, device_name, file_size, measure_latency
from hf_mrpf.evaluation import evaluate_robustness
from hf_mrpf.figures import plot_sensitivity
from hf_mrpf.hub import create_repository, push_folder
from hf_mrpf.interruption import resumable
from hf_mrpf.model_card import CardInfo, PlanSummary, render_card
from hf_mrpf.pruning import plan_pruning
from hf_mrpf.report import paired_difference
from hf_mrpf.results import ResultRow, results_table
from hf_mrpf.run_folder import RunFolder, read_json, write_json
from hf_mrpf.stages import (
    KeepSensitivity,
    check_forced_place,
    dense_stage,
    finish,
    finished_model,
    kept_sensitivity,
    make_trainer,
    run_folder,
    train,
    trained,
    validation_figures,
)

ATTACKS = ("clean", "fgsm", "pgd20", "cw")
# A ResNet of one block a stage; its stem has 2 * stem_width channels. About 0.3 M parameters.
NARROW_RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_type": "deep", "stem_width": 8}
# The embedded digits: eps at which a normally trained net fails, and settings for a few minutes on two cores.
DIGITS = {"eps": 0.2, "num_steps": 5, "per_device_train_batch_size": 32, "crop_padding": 1}
DIGITS_MODEL = {
    "backbone_kwargs": json.dumps(NARROW_RESNET | {"channels": [16, 32, 32, 32]}),  # 59 k parameters
    "control_epochs": 8.0,
    "base_epochs": 28.0,
    "num_train_epochs": 20.0,
}
EVERY_RUN = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "load_best_model_at_end": True,
    "save_total_limit": 1,
    "report_to": "none",
    "num_train_epochs": 20.0,
}


def parse_arguments():
    groups = [DataArguments, ModelArguments, RunArguments, MRPFConfig]
    usage = "accelerate launch recipes/prune.py [options]"
    parser = GroupedParser(groups, usage=usage, description=__doc__.split("\n\n")[0])
    parser.set_defaults(**EVERY_RUN)
    # Defaults follow from the data and the model; with none named, --help shows those of the embedded run.
    known, _ = parser.parse_known_args([option for option in sys.argv[1:] if option not in ("-h", "--help")])
    embedded, named = known.dataset_name in (None, "digits"), known.model_name_or_path
    folder = "digits" if embedded else Path(known.dataset_name).name
    parser.set_defaults(output_dir=f"outputs/{folder}-{Path(named).name}" if named else f"outputs/{folder}")
    if named is None:
        narrow = {"model_name_or_path": "timm/resnet18", "small_images": True}
        parser.set_defaults(**narrow, backbone_kwargs=json.dumps(NARROW_RESNET))
    if embedded:
        parser.set_defaults(**DIGITS if named else DIGITS | DIGITS_MODEL)
        if known.optim == "sgd":
            parser.set_defaults(learning_rate=0.2)
    return parser.parse_args_into_dataclasses()


def main() -> None:
    data_args, model_args, run_args, args = parse_arguments()
    announce(args)
    quieten()
    settings = run_settings(data_args, model_args, args)
    run = run_folder(settings, args, overwrite=run_args.overwrite_output_dir)
    run.check()
    if run.finished and not run_args.overwrite_output_dir:
        say(args, f"{run.path} is finished with these settings; --overwrite_output_dir would start again.")
        say(args, results_table(read_json(run.path / "robustness_report.json")["table"]))
        push_result(run, args)
        return

    check_forced_place(run, args)
    if args.hub_model_id:
        validate_repo_id(args.hub_model_id)
    if find_spec("matplotlib") is None:
        raise ImportError("The picture of the pruning plan needs matplotlib: pip install hf-mrpf[plots].")
    start = own_config(model_args.model_name_or_path, model_args.model_revision)
    data = load_data(data_args, model_args.image_size or (start and start.image_size), args.seed)
    args.horizontal_flip = args.horizontal_flip and data.flip
    torch.manual_seed(args.seed)
    model = build_model(model_args, data).to(args.device)
    refuse_unreachable(model, data, args)
    if args.push_to_hub:
        # The id in full is on the card; a token or a name that cannot work shows before any training.
        args.hub_model_id = repository(args)

    with run:
        dense = dense_stage(run, model, data, model_args, args)
        control = control_stage(run, model.config, data, model_args, args)
        pruned, plan = pruned_stage(run, dense, data, args)
        finetuned = finetuned_stage(run, pruned, data, args)
        models = {"dense": dense, "pruned": pruned, "fine-tuned": finetuned}
        reports = test_reports(run, models | ({"control": control} if control else {}), data, args)
        if args.process_index == 0:
            rows = result_rows(run, models, reports, args)
            write_result(run, finetuned, plan, reports, rows, data, run_args, args)
            run.finish()
            push_result(run, args)
        args.distributed_state.wait_for_everyone()


def repository(args: MRPFConfig) -> str:
    """The id on the Hub, made sure of by the main process."""
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    if args.process_index == 0:
        name = create_repository(name, private=args.hub_private_repo, token=args.hub_token)
    return name


def push_result(run: RunFolder, args: MRPFConfig) -> None:
    """Sends the finished folder; where that fails, the folder stays whole and the error says how to send it again."""
    if args.push_to_hub and args.process_index == 0:
        options = {"private": args.hub_private_repo, "revision": args.hub_revision, "token": args.hub_token}
        pushed = push_folder(run.path, args.hub_model_id or run.path.absolute().name, **options)
        say(args, f"pushed to {pushed.commit_url}")


def refuse_unreachable(model: PrunedForImageClassification, data: ImageData, args: MRPFConfig) -> None:
    """Everything the pruning stage could refuse, before hours of training rather than after."""
    calibration_batches(data.train, args.calibration_sets, args.calibration_set_size, seed=args.seed)
    example = torch.zeros(1, 3, data.image_size, data.image_size, device=args.device)
    limits = {name: getattr(args, name) for name in ("max_ratio", "min_channels", "round_to")}
    plan_pruning(
        model, example, target=args.target, target_metric=args.target_metric, allocation="uniform",
        ignore=tuple(args.ignore), heads=args.prune_heads, **limits,
    )  # fmt: skip


def control_stage(run: RunFolder, config, data: ImageData, model_args: ModelArguments, args: MRPFConfig):
    """The same network, from fresh weights, trained without any attack: at a fair eps it must fail under attack."""
    if not model_args.control_epochs:
        return None
    if finished := finished_model(run, "control", args):
        return finished
    torch.manual_seed(args.seed)
    model = PrunedForImageClassification(config).to(args.device)
    changes = {"objective": "standard", "num_train_epochs": model_args.control_epochs}
    changes |= {"load_best_model_at_end": False, "eval_strategy": "no"}
    model, result = train(run, "control", model, data, args, **changes)
    model = finish(run, "control", model, result, args)
    say(args, f"[control] {trained('standard', result)}")
    return model


def pruned_stage(run: RunFolder, dense, data: ImageData, args: MRPFConfig):
    """Sensitivities, plan, removal, repair, BatchNorm recalibration."""
    plan_file = run.stage("pruned") / "pruning_plan.json"
    if finished := finished_model(run, "pruned", args):
        return finished, PruningPlan.load(plan_file)
    start = time.perf_counter()
    stage_args = dataclasses.replace(args, output_dir=str(run.stage("pruned") / "training"), push_to_hub=False)
    trainer = make_trainer(copy.deepcopy(dense), data, stage_args)
    sensitivity_file = run.stage("pruned") / "sensitivity.json"
    scores = kept_sensitivity(sensitivity_file, dense, args)
    trainer.add_callback(KeepSensitivity(sensitivity_file))
    plan = trainer.prune(scores=scores)
    result = {"seconds": round(time.perf_counter() - start, 1), "steps": trainer.pruning_report}
    if trainer.repair_report is not None:
        result["repair"] = dataclasses.asdict(trainer.repair_report)
        for layer, reason in trainer.repair_report.left.items():
            say(args, f"[pruned] {layer} is not repaired: {reason}")
    if args.process_index == 0:
        plan_file.parent.mkdir(parents=True, exist_ok=True)
        plan.save(plan_file)
    model = finish(run, "pruned", trainer.model, result, args)
    kept = ", ".join(f"{value:.1%} of {name}" for name, value in plan.achieved.items())
    steps = " -> ".join(f"{name} {figures['robust_accuracy']:.1%}" for name, figures in trainer.pruning_report.items())
    say(args, f"[pruned] kept {kept} in {result['seconds']} s; validation robust accuracy {steps}")
    return model, plan


def finetuned_stage(run: RunFolder, pruned, data: ImageData, args: MRPFConfig):
    """Adversarial fine-tuning of the pruned network."""
    if finished := finished_model(run, "fine-tuned", args):
        return finished
    result = {"epochs": 0}
    model = copy.deepcopy(pruned)
    if args.num_train_epochs or args.max_steps > 0:
        model, result = train(run, "fine-tuned", model, data, args)
    model = finish(run, "fine-tuned", model, result, args)
    say(args, f"[fine-tuned] {trained(args.objective, result)}{validation_figures(result)}")
    return model


def test_reports(run: RunFolder, models: dict, data: ImageData, args: MRPFConfig) -> dict[str, RobustnessReport]:
    """The only place that reads the test split, after every choice has been made."""
    start = time.perf_counter()
    reports = {
        name: evaluate_robustness(
            model, data.test, ATTACKS, args.attack, seed=args.seed, batch_size=args.per_device_eval_batch_size,
            data_name=data.name, progress=not args.disable_tqdm, distributed=args.world_size > 1,
            journal=run.stage("evaluation") / f"{name}.jsonl",
        )
        for name, model in models.items()
    }  # fmt: skip
    say(args, f"[evaluation] {len(reports)} models, {len(ATTACKS)} attacks in {time.perf_counter() - start:.1f} s")
    for name, report in reports.items():
        say(args, f"[evaluation] {name}: {report}")
    change = paired_difference(reports["fine-tuned"], reports["dense"], "pgd20")
    say(
        args,
        f"[evaluation] fine-tuned minus dense, PGD-20, paired: {100 * change.difference:+.1f} points "
        f"[{100 * change.interval[0]:+.1f}, {100 * change.interval[1]:+.1f}]",
    )
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


def write_result(run: RunFolder, model, plan: PruningPlan, reports, rows, data: ImageData, run_args, args) -> None:
    """Writes everything into a draft, then moves it into the output folder at once."""
    draft = run.stage("result")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    plan.save(draft / "pruning_plan.json")
    plot_sensitivity(plan, draft / "mrs.png")
    stages = {name: run.stage_result(name) for name in ("dense", "pruned", "fine-tuned")}
    change = paired_difference(reports["fine-tuned"], reports["dense"], "pgd20")
    report = reports["fine-tuned"].to_dict() | {
        "table": [dataclasses.asdict(row) for row in rows],
        "models": {name: other.to_dict() for name, other in reports.items() if name != "fine-tuned"},
        "fine_tuned_minus_dense_pgd20": dataclasses.asdict(change),
        "stages": stages,
        "data": data.description,
    }
    write_json(draft / "robustness_report.json", report)
    info = card_info(model, plan, reports, rows, stages, data, args)
    if run_args.card_note:
        info = dataclasses.replace(info, notes=[*info.notes, run_args.card_note])
    write_json(run.stage("card.json"), info.to_dict())  # what the card can be rendered from again
    render_card(info).save(draft / "README.md")
    run.publish(draft)
    say(args, results_table(rows))
    say(args, f"result in {run.path}")


def card_info(model, plan, reports, rows, stages, data: ImageData, args: MRPFConfig) -> CardInfo:
    """Everything the model card of the result says."""
    names = ("objective", "beta", "norm", "eps", "num_steps", "optim", "learning_rate", "weight_decay")
    names += ("lr_scheduler_type", "per_device_train_batch_size")
    settings = {name: str(getattr(value := getattr(args, name), "value", value)) for name in names}
    settings |= {f"epochs of the {stage} model": stages[stage]["epochs"] for stage in ("dense", "fine-tuned")}
    settings |= {
        f"time of the {stage} stage": f"{result['seconds']:,} s"
        for stage, result in stages.items()
        if "seconds" in result and not result.get("resumed_from")  # else those before the interruption are not known
    }
    settings |= {"device": device_name(args.device)}
    settings |= {"dense model started from": stages["dense"].get("start", "fresh weights")}
    settings |= {"backbone arguments": json.dumps(model.config.backbone.get("kwargs", {}))}
    control = reports.get("control")
    command = "accelerate launch " + shlex.join(sys.argv)
    if args.hub_token:
        command = command.replace(args.hub_token, "***")
    change = paired_difference(reports["fine-tuned"], reports["dense"], "pgd20")
    return CardInfo(
        model_name=args.hub_model_id.split("/")[-1] if args.hub_model_id else Path(args.output_dir).name,
        repo_id=args.hub_model_id,
        backbone=model.config.backbone.get("name") or model.config.backbone["config"]["model_type"],
        image_size=model.config.image_size,
        class_names=data.class_names,
        dataset_id=data.name,
        dataset_config=data.description["dataset_config_name"],
        dataset_on_hub="/" in data.name,
        rows=rows,
        control=ResultRow.from_report("the same network, ordinary training", control) if control else None,
        plan=PlanSummary.from_plan(plan),
        pruning_steps=stages["pruned"]["steps"],
        selection={key: stages["fine-tuned"][key] for key in ("best", "last") if key in stages["fine-tuned"]},
        training=settings,
        figure="mrs.png",
        notes=[
            "The test split was read once, after every choice had been made on the validation split.",
            f"Fine-tuned minus dense under PGD-20, image by image: {100 * change.difference:+.1f} points, "
            f"95 % interval [{100 * change.interval[0]:+.1f}, {100 * change.interval[1]:+.1f}].",
        ],
        versions=reports["fine-tuned"].versions,
        seed=args.seed,
        command=command,
    )


if __name__ == "__main__":
    report_errors(resumable(main))

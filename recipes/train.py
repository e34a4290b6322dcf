"""
Trains a robust image classifier, dense: the model that recipes/prune.py can start from.

    accelerate launch recipes/train.py
    accelerate launch recipes/prune.py --model_name_or_path outputs/digits-dense

The first command trains a small ResNet by TRADES on the handwritten digits that scikit-learn ships, the second prunes
it without training it again. Figures are of the validation split: the test split is left to recipes/prune.py and
recipes/evaluate.py, except for the control of finished runs, which is compared with them and chooses nothing:

    accelerate launch recipes/train.py --model_name_or_path outputs/digits --fresh_weights --dense_epochs 28 \
        --num_train_epochs 20 --report_split test

trains the shape of a pruned model from scratch, at the total compute of 28 dense epochs and 20 of its own.
"""

import dataclasses
import time

from hf_mrpf.config import MRPFConfig
from hf_mrpf.console import errors_told
from hf_mrpf.recipe_options import parse_recipe


def parse_arguments():
    return parse_recipe(
        "train",
        usage="accelerate launch recipes/train.py [options]",
        description=__doc__.split("\n\n")[0],
    )


ARGUMENTS = None
if __name__ == "__main__":
    # What is wrong with the command line shows now, before the imports below, which take seconds.
    with errors_told():
        ARGUMENTS = parse_arguments()

# ruff: noqa: E402
import torch

from hf_mrpf import RobustnessReport
from hf_mrpf.cli import run_settings
from hf_mrpf.console import announce, quieten, report_errors, show
from hf_mrpf.data import ImageData
from hf_mrpf.delivery import check_repository_id, push_result, repository, shown_again
from hf_mrpf.evaluation import evaluate_robustness
from hf_mrpf.fresh import equal_compute_epochs, with_fresh_weights
from hf_mrpf.hub import write_record
from hf_mrpf.interruption import repeatable_command, resumable
from hf_mrpf.launch import check_world_size
from hf_mrpf.named_attacks import QUICK
from hf_mrpf.progress import shows_progress
from hf_mrpf.results import results_table
from hf_mrpf.run_folder import RunFolder, remove_folder, write_json
from hf_mrpf.stage_lines import evaluation_figures
from hf_mrpf.stages import check_forced_place, dense_stage, run_folder, settle_augmentation, tell
from hf_mrpf.starting_point import (
    build_model,
    check_default_data,
    check_outlives_overwriting,
    load_data,
    starting_config,
)

NOTE = "These are figures of the validation split{picked}; this run has not read the test split."
PICKED = ", on which the best epoch was picked, so they flatter the model a little"
CONTROL_NOTE = (
    "A control: figures of the test split, which nothing was chosen on, to stand beside those of finished runs."
)


def main() -> None:
    data_args, model_args, control_args, run_args, args = ARGUMENTS or parse_arguments()
    if args.objective == "rslad":
        raise ValueError(
            "--objective rslad distils from a dense parent, and this recipe trains one; give it to recipes/prune.py, "
            "or another objective here."
        )
    if control_args.dense_epochs and args.max_steps > 0:
        raise ValueError(
            f"--dense_epochs {control_args.dense_epochs:g} adds epochs, and --max_steps {args.max_steps} counts steps; "
            "leave one of them out."
        )
    check_world_size(args.world_size, run_args.expected_world_size)
    announce(args)
    quieten()
    settings = run_settings(data_args, model_args, control_args, args)
    run = run_folder(settings, args, overwrite=run_args.overwrite_output_dir)
    run.check()
    if shown_again(run, run_args, args):
        return

    check_outlives_overwriting(model_args.model_name_or_path, args.output_dir, run_args.overwrite_output_dir)
    check_forced_place(run, args)
    check_repository_id(args)
    start = starting_config(model_args)
    check_default_data(model_args.model_name_or_path, start, data_args)
    with args.main_process_first(desc="decoding of images"):  # the others find them in the cache
        data = load_data(data_args, model_args.image_size or (start and start.image_size))
    settle_augmentation(data, args)
    torch.manual_seed(args.seed)
    model = build_model(model_args, data).to(args.device)
    epochs = args.num_train_epochs or float(args.max_steps > 0)  # steps, where they are given, are what counts
    if control_args.fresh_weights:
        if start is None:
            raise ValueError(
                f"--fresh_weights keeps the shape of a model of this library, and {model_args.model_name_or_path} is "
                "none; give the folder or Hub id of one, or leave the option out: an architecture starts fresh anyway."
            )
        torch.manual_seed(args.seed)
        model = with_fresh_weights(model)
        epochs = equal_compute_epochs(model, control_args.dense_epochs, epochs)
    if args.push_to_hub:
        # The id in full is on the card; a token or a name that cannot work shows before any training.
        args.hub_model_id = repository(args)

    with run:
        trained = dataclasses.replace(model_args, base_epochs=epochs)
        dense = dense_stage(run, model, data, trained, args, fresh=control_args.fresh_weights)
        report = final_report(run, dense, data, control_args.report_split, args)
        if args.process_index == 0:
            write_result(run, dense, report, data, control_args.report_split, run_args, args)
            run.finish()
            push_result(run, args)
        args.distributed_state.wait_for_everyone()


def final_report(run: RunFolder, model, data: ImageData, split: str, args: MRPFConfig) -> RobustnessReport:
    """How robust the model is: on the split that its training was watched on, or, for a control, on the test split."""
    start = time.perf_counter()
    report = evaluate_robustness(
        model, getattr(data, split), QUICK, args.attack, seed=args.seed, batch_size=args.per_device_eval_batch_size,
        data_name=data.name, progress=shows_progress(args), distributed=args.world_size > 1,
        journal=run.stage("evaluation") / "dense.jsonl",
    )  # fmt: skip
    result = {"seconds": round(time.perf_counter() - start, 1)}
    result["figures"] = evaluation_figures("dense", report) | {"split": split} | result
    run.finish_stage("evaluation", result)
    tell("evaluation", result, args)
    return report


def write_result(
    run: RunFolder, model, report: RobustnessReport, data: ImageData, split: str, run_args, args: MRPFConfig
) -> None:
    """Writes everything into a draft, then moves it into the output folder at once."""
    draft, stage = run.stage("result"), run.stage_result("dense") or {}
    remove_folder(draft)
    model.save_pretrained(draft)
    info = write_record(
        draft,
        model,
        args.hub_model_id,
        plans=(),
        report=report,
        split=split if split == "validation" else data.description["splits"][split]["from"],
        settings=args.to_dict()
        | {"processes": args.world_size, "num_train_epochs": stage.get("epochs", args.num_train_epochs)},
        pruning_steps={},
        selection={key: stage[key] for key in ("best", "last") if key in stage},
        model_name=args.hub_model_id.split("/")[-1] if args.hub_model_id else run.path.absolute().name,
        base_model=stage.get("base_model"),
        dataset_config=data.description["dataset_config_name"],
        dataset_on_hub="/" in data.name,
        notes=notes(split, stage, run_args.card_note, args),
        command=repeatable_command(),
    )
    content = {"split": split, "table": [dataclasses.asdict(row) for row in info.rows]}
    content |= {"stages": {"dense": stage}, "data": data.description}
    write_json(draft / "robustness_report.json", report.to_dict() | content)
    write_json(run.stage("card.json"), info.to_dict())  # what the card can be rendered from again
    run.publish(draft)
    show(args, results_table(info.rows))
    show(args, f"result in {run.path}")


def notes(split: str, stage: dict, of_user: str | None, args: MRPFConfig) -> list[str]:
    """What a reader of the card must know."""
    picked = PICKED if "best" in stage and args.load_best_model_at_end else ""
    lines = [NOTE.format(picked=picked) if split == "validation" else CONTROL_NOTE]
    lines.append(f"Started from: {stage.get('start', 'fresh weights')}.")
    return [*lines, of_user] if of_user else lines


if __name__ == "__main__":
    report_errors(resumable(main))

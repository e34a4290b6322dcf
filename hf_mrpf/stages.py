"""The stages of a run, each in its own folder: trained from its last checkpoint on, saved, and then kept."""

import copy
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import TensorBoardCallback

from .augmentation import crop_padding_of
from .checkpoints import check_complete, newest_complete, written_by
from .cli import ModelArguments
from .config import MRPFConfig
from .console import StageProgress, say
from .data import ImageData
from .interruption import StopBetweenSteps, stopping_between_steps
from .logs import end_of_run
from .modeling import PrunedForImageClassification
from .objectives import dense_objective
from .processes import Processes
from .run_folder import STAGES, RunFolder, remove_folder
from .stage_lines import pruned_before, stage_line, training_figures
from .starting_point import base_model, own_config, starts_fresh
from .trainer import MRPFTrainer


def make_trainer(model, data: ImageData, args: MRPFConfig, teacher=None) -> MRPFTrainer:
    """The trainer of a stage: progress bars, but no line an epoch; TensorBoard's files stay when checkpoints go."""
    trainer = MRPFTrainer(model, args, train_dataset=data.train, eval_dataset=data.validation, teacher=teacher)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(StageProgress())
    trainer.add_callback(StopBetweenSteps())
    trainer.pop_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(str(args.output_dir)).parent / "logs")
    return trainer


def settle_augmentation(data: ImageData, args: MRPFConfig) -> None:
    """Puts into `args` what was left to the data: padding of the crops, mirroring; and says so in one line."""
    if args.crop_padding is None:
        args.crop_padding = crop_padding_of(data.image_size)
    if args.horizontal_flip is None:
        args.horizontal_flip = data.flip
    images = {part: split["num_images"] for part, split in data.description["splits"].items()}
    figures = {"name": data.name, "classes": len(data.class_names), "image_size": data.image_size, **images}
    augmentation = {"crop_padding": args.crop_padding, "horizontal_flip": args.horizontal_flip}
    say(args, stage_line("data", figures | augmentation))


def stage_arguments(run: RunFolder, stage: str, args: MRPFConfig, **changes) -> MRPFConfig:
    """The settings of a stage, whose folder for checkpoints and whose name in the reporters are its own."""
    name = f"{args.run_name or run.path.absolute().name}-{stage}"
    folder = str(run.stage(stage) / "training")
    return dataclasses.replace(args, output_dir=folder, run_name=name, push_to_hub=False, **changes)


def run_folder(settings: dict[str, Any], args: MRPFConfig, *, overwrite: bool) -> RunFolder:
    """The folder of a run, which its main process alone reads and writes."""
    processes = Processes.of(args.world_size > 1)
    return RunFolder(
        str(args.output_dir), settings, overwrite=overwrite, is_main=processes.is_main, share=processes.from_main
    )


def check_forced_place(run: RunFolder, args: MRPFConfig) -> None:
    """
    Refuses a `--resume_from_checkpoint` that no stage of this run would go on from.

    Raises:
        ValueError: where it is torn, of another folder, or of a stage that is finished or does not train.
    """
    if not args.resume_from_checkpoint:
        return
    place = Path(args.resume_from_checkpoint)
    stage, home = place.absolute().parent.parent, (run.path / STAGES).absolute()
    if place.absolute().parent.name != "training" or stage.parent.resolve() != home.resolve():
        raise ValueError(
            f"--resume_from_checkpoint {place} is no checkpoint of this run; its checkpoints are "
            f"{run.path / STAGES}/<stage>/training/checkpoint-<step>."
        )
    if run.stage_result(stage.name) is not None:
        raise ValueError(
            f"--resume_from_checkpoint {place}: the stage {stage.name} is finished and is kept. To do it again remove "
            f"{run.stage(stage.name)} and the stages made after it."
        )
    check_complete(place)


def place_to_go_on(folder: Path, args: MRPFConfig) -> Path | None:
    """The checkpoint from which the training in `folder` goes on, the same on every process; None for a fresh start."""
    processes, place = Processes.of(args.world_size > 1), None
    if processes.is_main:
        forced = Path(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
        if forced is not None and forced.resolve().parent == folder.resolve():  # a place in this stage, not in another
            place = forced
        else:
            place = newest_complete(folder, say=lambda line: say(args, line))
        if place is not None and (count := written_by(place)) != args.world_size:
            say(
                args,
                f"{place} was written by {count} processes; with {args.world_size} the weights come out otherwise.",
            )
    return processes.from_main(place)


def train(run: RunFolder, stage: str, model, data: ImageData, args: MRPFConfig, teacher=None, **changes) -> tuple:
    """Trains `model` in the stage's own folder; goes on from a checkpoint where there is one."""
    folder = run.stage(stage) / "training"
    trainer = make_trainer(model, data, stage_arguments(run, stage, args, **changes), teacher)
    last = place_to_go_on(folder, args)
    start = time.perf_counter()
    with stopping_between_steps():
        trainer.train(resume_from_checkpoint=last)
    end_of_run(args)
    result: dict[str, Any] = {"epochs": round(trainer.state.epoch, 2), "steps": trainer.state.global_step}
    result |= {"seconds": round(time.perf_counter() - start, 1), "resumed_from": last and last.name}
    result |= {"loaded": "best" if args.load_best_model_at_end else "last", "warnings": trainer.warnings}
    return trainer.model, result | trainer.best_and_last()


def finish(run: RunFolder, stage: str, model, result: dict, args: MRPFConfig) -> PrunedForImageClassification:
    """Saves the stage's model, marks the stage as finished, drops its checkpoints; gives the model as it was saved."""
    if args.process_index == 0:
        remove_folder(run.stage(stage) / "model")
        model.save_pretrained(run.stage(stage) / "model")
        run.finish_stage(stage, result)
        _drop_checkpoints(run, stage)
    args.distributed_state.wait_for_everyone()
    # What comes after must be the same, bit for bit, as in a run that was interrupted here.
    return _saved_model(run, stage, args)


def finished_model(run: RunFolder, stage: str, args: MRPFConfig) -> PrunedForImageClassification | None:
    """
    The model of a stage that an earlier call has finished.

    Raises:
        ValueError: where a file of the model is not as it was written.
    """
    processes, finished, error = Processes.of(args.world_size > 1), False, None
    if processes.is_main:
        finished = run.stage_result(stage) is not None
        if finished:
            try:
                run.check_stage(stage)
            except ValueError as refusal:
                error = str(refusal)
            _drop_checkpoints(run, stage)
    finished, error = processes.from_main((finished, error))
    if error:
        raise ValueError(error)
    if not finished:
        return None
    say(args, stage_line(stage, (run.stage_result(stage) or {}).get("figures", {}), "kept from before"))
    return _saved_model(run, stage, args)


def _saved_model(run: RunFolder, stage: str, args: MRPFConfig) -> PrunedForImageClassification:
    return PrunedForImageClassification.from_pretrained(run.stage(stage) / "model").to(args.device)


def _drop_checkpoints(run: RunFolder, stage: str) -> None:
    shutil.rmtree(run.stage(stage) / "training", ignore_errors=True)  # of a finished stage: they only take space


def tell(stage: str, result: dict, args: MRPFConfig) -> None:
    """Prints the line of a stage that has just ended: the figures of its `stage.json`."""
    say(args, stage_line(stage, result["figures"], "" if result.get("epochs", 1) else "taken as it is"))


def dense_stage(
    run: RunFolder, model, data: ImageData, model_args: ModelArguments, args: MRPFConfig, *, fresh: bool = False
):
    """The robust dense parent: trained here, or the trained model that was named, of which `fresh` keeps the shape."""
    if finished := finished_model(run, "dense", args):
        return finished
    name = model_args.model_name_or_path
    own, start = own_config(name, model_args.model_revision), "fresh weights"
    if name and own:
        past = f"{Path(name).name}, {'pruned before' if own.pruning else 'not pruned before'}"
        start = f"fresh weights in the shape of {past}" if fresh else past
    elif name and not starts_fresh(model_args):
        start = f"pretrained {Path(name).name if Path(name).is_dir() else name}"
    epochs = model_args.base_epochs
    if epochs is None:
        # Other classes mean a new head, which must be trained.
        epochs = 0 if own and own.num_labels == model.config.num_labels else 20
    result: dict[str, Any] = {"epochs": 0}
    if epochs:
        model, result = train(
            run, "dense", model, data, args, num_train_epochs=epochs, objective=dense_objective(args.objective)
        )
    result |= {"start": start, "base_model": None if fresh else base_model(model_args)}
    result["figures"] = training_figures(dense_objective(args.objective), result)
    model = finish(run, "dense", model, result, args)
    tell("dense", result, args)
    return model


def trained_stage(
    run: RunFolder,
    stage: str,
    model,
    data: ImageData,
    args: MRPFConfig,
    epochs: float | None = None,
    *,
    after: str,
    teacher: PrunedForImageClassification | None = None,
) -> PrunedForImageClassification:
    """
    A copy of `model` after adversarial training, of `epochs` or else of what `args` say; with none, as it is.

    `after` is the stage that pruned it, whose shares kept the line of this one repeats, and `teacher` the dense parent.
    """
    if finished := finished_model(run, stage, args):
        return finished
    changes = {} if epochs is None else {"num_train_epochs": epochs}
    wanted = args.num_train_epochs or args.max_steps > 0 if epochs is None else epochs
    result: dict[str, Any] = {"epochs": 0}
    model = copy.deepcopy(model)
    if wanted:
        model, result = train(run, stage, model, data, args, teacher, **changes)
    result["figures"] = training_figures(args.objective, result, pruned_before(run.stage_result(after)))
    model = finish(run, stage, model, result, args)
    tell(stage, result, args)
    return model

"""The stages of a run, each in its own folder: trained from its last checkpoint on, saved, and then kept."""

import copy
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers import ProgressCallback, TrainerCallback

from .checkpoints import check_complete, newest_complete, written_by
from .cli import ModelArguments, own_config, starts_fresh
from .config import MRPFConfig
from .console import StageProgress, say
from .data import ImageData
from .fingerprint import weights_sha256
from .interruption import StopBetweenSteps, stopping_between_steps
from .modeling import PrunedForImageClassification
from .processes import Processes
from .run_folder import STAGES, RunFolder, read_json, write_json
from .sensitivity import SensitivityResult
from .trainer import MRPFTrainer


def make_trainer(model, data: ImageData, args: MRPFConfig) -> MRPFTrainer:
    """The trainer of a stage, with one progress bar in place of a line an epoch."""
    trainer = MRPFTrainer(model=model, args=args, train_dataset=data.train, eval_dataset=data.validation)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(StageProgress())
    trainer.add_callback(StopBetweenSteps())
    return trainer


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


def train(run: RunFolder, stage: str, model, data: ImageData, args: MRPFConfig, **changes) -> tuple:
    """Trains `model` in the stage's own folder; goes on from a checkpoint where there is one."""
    folder = run.stage(stage) / "training"
    stage_args = dataclasses.replace(args, output_dir=str(folder), push_to_hub=False, **changes)
    trainer = make_trainer(model, data, stage_args)
    last = place_to_go_on(folder, args)
    start = time.perf_counter()
    with stopping_between_steps():
        trainer.train(resume_from_checkpoint=last)
    result: dict[str, Any] = {"epochs": round(trainer.state.epoch, 2), "steps": trainer.state.global_step}
    result |= {"seconds": round(time.perf_counter() - start, 1), "resumed_from": last and last.name}
    return trainer.model, result | trainer.best_and_last()


def finish(run: RunFolder, stage: str, model, result: dict, args: MRPFConfig) -> PrunedForImageClassification:
    """Saves the stage's model, marks the stage as finished, drops its checkpoints; gives the model as it was saved."""
    if args.process_index == 0:
        shutil.rmtree(run.stage(stage) / "model", ignore_errors=True)
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
    say(args, f"[{stage}] kept from before")
    return _saved_model(run, stage, args)


class KeepSensitivity(TrainerCallback):
    """Writes the sensitivities down as soon as they are measured: they are the costly part of a pruning."""

    def __init__(self, file: Path):
        self.file = file

    def on_sensitivity_end(self, args, state, control, *, sensitivity, model, **kwargs):
        if args.process_index == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {"weights_sha256": weights_sha256(model), "sensitivity": sensitivity.to_dict()})


def kept_sensitivity(file: Path, model: nn.Module, args: MRPFConfig) -> SensitivityResult | None:
    """
    The sensitivities that an earlier call measured on the weights of `model`, the same on every process.

    Raises:
        ValueError: where the file was changed so that it cannot be read.
    """
    processes, kept, error = Processes.of(args.world_size > 1), None, None
    if processes.is_main and file.is_file():
        try:
            content = read_json(file)
            if content.get("weights_sha256") == weights_sha256(model):
                kept = SensitivityResult.from_dict(content.get("sensitivity") or {}, source=str(file))
        except ValueError as refusal:
            error = f"{refusal} Remove {file}, and they are measured again."
    kept, error = processes.from_main((kept, error))
    if error:
        raise ValueError(error)
    if kept is not None:
        say(args, f"[{file.parent.name}] sensitivities kept from before")
    return kept


def _saved_model(run: RunFolder, stage: str, args: MRPFConfig) -> PrunedForImageClassification:
    return PrunedForImageClassification.from_pretrained(run.stage(stage) / "model").to(args.device)


def _drop_checkpoints(run: RunFolder, stage: str) -> None:
    shutil.rmtree(run.stage(stage) / "training", ignore_errors=True)


def trained(objective: str, result: dict) -> str:
    """What a stage's training did, in a few words."""
    if not result["epochs"]:
        return "taken as it is"
    since = f" since {result['resumed_from']}" if result["resumed_from"] else ""
    return f"{objective} for {result['epochs']:g} epochs, {result['seconds']} s{since}"


def validation_figures(result: dict) -> str:
    best = result.get("best")
    if not best:
        return ""
    last = result["last"]
    return (
        f"; validation best (epoch {best['epoch']:g}) {best['eval_accuracy']:.1%} clean, "
        f"{best['eval_robust_accuracy']:.1%} robust, last {last['eval_robust_accuracy']:.1%} robust"
    )


def dense_stage(run: RunFolder, model, data: ImageData, model_args: ModelArguments, args: MRPFConfig):
    """The robust dense parent: trained here, or the trained model that was named."""
    if finished := finished_model(run, "dense", args):
        return finished
    name = model_args.model_name_or_path
    own, start = own_config(name, model_args.model_revision), "fresh weights"
    if name and own:
        start = f"{Path(name).name}, {'pruned before' if own.pruning else 'not pruned before'}"
    elif name and not starts_fresh(model_args):
        start = f"pretrained {Path(name).name if Path(name).is_dir() else name}"
    epochs = model_args.base_epochs
    if epochs is None:
        # Other classes mean a new head, which must be trained.
        epochs = 0 if own and own.num_labels == model.config.num_labels else 20
    result: dict[str, Any] = {"epochs": 0}
    if epochs:
        model, result = train(run, "dense", model, data, args, num_train_epochs=epochs)
    result["start"] = start
    model = finish(run, "dense", model, result, args)
    say(args, f"[dense] {trained(args.objective, result)}{validation_figures(result)}")
    return model


def trained_stage(
    run: RunFolder, stage: str, model, data: ImageData, args: MRPFConfig, epochs: float | None = None
) -> PrunedForImageClassification:
    """A copy of `model` after adversarial training, of `epochs` or else of what `args` say; with none, as it is."""
    if finished := finished_model(run, stage, args):
        return finished
    changes = {} if epochs is None else {"num_train_epochs": epochs}
    wanted = args.num_train_epochs or args.max_steps > 0 if epochs is None else epochs
    result: dict[str, Any] = {"epochs": 0}
    model = copy.deepcopy(model)
    if wanted:
        model, result = train(run, stage, model, data, args, **changes)
    model = finish(run, stage, model, result, args)
    say(args, f"[{stage}] {trained(args.objective, result)}{validation_figures(result)}")
    return model

"""The stages of a run, each in its own folder: trained from its last checkpoint on, saved, and then kept."""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from .cli import ModelArguments, own_config, starts_fresh
from .config import MRPFConfig
from .console import StageProgress, say
from .data import ImageData
from .modeling import PrunedForImageClassification
from .run_folder import RunFolder
from .trainer import MRPFTrainer


def make_trainer(model, data: ImageData, args: MRPFConfig) -> MRPFTrainer:
    """The trainer of a stage, with one progress bar in place of a line an epoch."""
    trainer = MRPFTrainer(model=model, args=args, train_dataset=data.train, eval_dataset=data.validation)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(StageProgress())
    return trainer


def train(run: RunFolder, stage: str, model, data: ImageData, args: MRPFConfig, **changes) -> tuple:
    """Trains `model` in the stage's own folder; goes on from a checkpoint where there is one."""
    folder = run.stage(stage) / "training"
    stage_args = dataclasses.replace(args, output_dir=str(folder), push_to_hub=False, **changes)
    trainer = make_trainer(model, data, stage_args)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    wanted = args.resume_from_checkpoint
    if wanted and Path(wanted).resolve().parent == folder.resolve():  # a place in this stage, not in another
        last = wanted
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    result: dict[str, Any] = {"epochs": round(trainer.state.epoch, 2), "steps": trainer.state.global_step}
    result |= {"seconds": round(time.perf_counter() - start, 1), "resumed_from": last and Path(last).name}
    return trainer.model, result | trainer.best_and_last()


def finish(run: RunFolder, stage: str, model, result: dict, args: MRPFConfig) -> None:
    """Saves the stage's model, then marks the stage as finished, then drops its checkpoints."""
    if args.process_index == 0:
        model.save_pretrained(run.stage(stage) / "model")
        run.finish_stage(stage, result)
        shutil.rmtree(run.stage(stage) / "training", ignore_errors=True)
    args.distributed_state.wait_for_everyone()


def finished_model(run: RunFolder, stage: str, args: MRPFConfig) -> PrunedForImageClassification | None:
    """The model of a stage that an earlier call has finished."""
    if run.stage_result(stage) is None:
        return None
    say(args, f"[{stage}] kept from before")
    return PrunedForImageClassification.from_pretrained(run.stage(stage) / "model").to(args.device)


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
    finish(run, "dense", model, result, args)
    say(args, f"[dense] {trained(args.objective, result)}{validation_figures(result)}")
    return model
